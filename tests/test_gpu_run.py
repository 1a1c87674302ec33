"""The GPU benchmark on the CPU: its Triton kernel in Triton's interpreter, and all of its parts with small shapes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

KERNEL = """
import torch
from gpu_kernels import add_norm
norm = torch.nn.LayerNorm(64).requires_grad_(False)
norm.weight.normal_(), norm.bias.normal_()
for rows in (1, 131):
    for residual in (torch.float32, torch.bfloat16):
        x, y = torch.randn(rows, 64).to(residual), torch.randn(rows, 64).bfloat16()
        out, half = add_norm(x, y, norm, torch.bfloat16)
        wanted = norm(x.float() + y.float())
        torch.testing.assert_close(half, wanted.bfloat16(), atol=0, rtol=2**-7)
        torch.testing.assert_close(out, wanted.to(residual), atol=1e-5, rtol=0 if residual == torch.float32 else 2**-7)
        assert out.dtype == residual and half.dtype == torch.bfloat16
        assert (out is half) == (residual == torch.bfloat16)
print("compared")
"""


def test_triton_add_norm_equals_torch_in_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run([sys.executable, "-c", KERNEL], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "compared\n", done.stderr


def test_dry_run_of_the_gpu_benchmark_runs_every_part(tmp_path):
    env = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(BENCHMARKS / "gpu_run.sh"), "--dry-run"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert list(parts) == ["correctness", "engine", "kernels", "variants", "profile", "host"]
    assert all(part["ok"] for part in parts.values())
    assert parts["correctness"]["checks"] == 24 and len(parts["profile"]["top"]) == 15
    assert done.stdout == (tmp_path / "table.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "results.json", "table.txt"]


@pytest.fixture
def gpu_run(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_run", BENCHMARKS / "gpu_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_part_that_fails_or_takes_too_long_is_recorded(gpu_run, tmp_path):
    with (tmp_path / "log").open("w") as log:
        late = gpu_run.run_part("correctness", 0.01, log, dry=True)
        wrong = gpu_run.run_part("no such part", 100, log, dry=True)
    assert (late["ok"], late["error"]) == (False, "did not end in 0 s")
    assert (wrong["ok"], wrong["error"]) == (False, "ended with code 2")
    table = gpu_run.as_table({"correctness": late, "engine": wrong}, gpu_run.machine(), 1)
    assert "engine        FAILED" in table and "invalid choice: 'no such part'" in table
