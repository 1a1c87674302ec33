"""The device that a model runs on, and the report of a GPU that cannot be used."""

import pytest
import torch

from scgpt_batch.errors import GPU_UNUSABLE, ConfigError
from scgpt_batch.models import device
from scgpt_batch.registry.register import REQUIREMENTS, pip_requirements


@pytest.fixture(autouse=True)
def computed_anew():
    device.gpu_problem.cache_clear()
    yield
    device.gpu_problem.cache_clear()


@pytest.fixture
def gpu_without_driver(monkeypatch):
    """A machine with a GPU whose driver is too old for torch."""

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(device, "_has_gpu", lambda: True)


def test_unusable_gpu_is_an_error_in_the_log(gpu_without_driver, caplog):
    assert device.choose_device() == "cpu"
    (record,) = caplog.records
    assert record.levelname == "ERROR" and GPU_UNUSABLE in record.getMessage()
    assert "driver on your system is too old" in record.getMessage() and "--requirement" in record.getMessage()


def test_hidden_gpu_is_not_a_problem(gpu_without_driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.gpu_problem() is None


def test_machine_without_gpu_is_not_a_problem(gpu_without_driver, monkeypatch, caplog):
    monkeypatch.setattr(device, "_has_gpu", lambda: False)
    assert (device.choose_device(), caplog.records) == ("cpu", [])


def test_requirement_replaces_the_installed_version(caplog):
    packages = pip_requirements(["torch==2.6.0+cu124", "hf-transfer==0.1.9"])
    assert "torch==2.6.0+cu124" in packages and len(packages) == len(REQUIREMENTS) + 1
    assert "endpoints install torch==2.6.0+cu124; this registration is checked with torch==" in caplog.text


@pytest.mark.parametrize("wrong", ["torch 2.6", "--no-deps", "pyspark==4.0.0"])
def test_invalid_requirement_is_rejected(wrong):
    with pytest.raises(ConfigError, match=r"requirement"):
        pip_requirements([wrong])
