"""The device of a model, and why a GPU that is there cannot be used."""

import logging
import os
import warnings
from functools import cache
from pathlib import Path

import torch

from scgpt_batch.errors import GPU_UNUSABLE

logger = logging.getLogger(__name__)


def choose_device() -> str:
    """Return "cuda" if torch can use a GPU, else "cpu"; log an error if the machine has a GPU that torch cannot use."""
    if torch.cuda.is_available():
        return "cuda"
    if problem := gpu_problem():
        logger.error("%s", problem)
    return "cpu"


@cache
def gpu_problem() -> str | None:
    """Return why torch cannot use this machine's GPU; None if it can, if there is none, or if the GPU is hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    if hidden or torch.cuda.is_available() or not _has_gpu():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch also warns of what it raises
            torch.cuda.init()
        why = "unknown reason"
    except (RuntimeError, AssertionError) as exc:  # torch raises the latter if it was built without CUDA
        why = " ".join(str(exc).split())
    return (
        f"{GPU_UNUSABLE} (torch {torch.__version__}: {why}): the model runs on the CPU, which is many times slower. "
        "Install a torch build that the NVIDIA driver supports; for a registered model, register it with --requirement"
    )


def _has_gpu() -> bool:
    """Return whether NVIDIA's driver shows a GPU; it does in containers too, whatever torch was built for."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
