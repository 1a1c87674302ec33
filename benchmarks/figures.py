"""What all regimes share: words on standard error, medians, the rate of matrix products, the other environment."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".cache" / "bench"
PBMC = ROOT / "tests" / "data" / "pbmc3k.h5ad"
UPSTREAM_PYTHON = ROOT / ".venv-upstream" / "bin" / "python"


class CannotRun(Exception):
    """This machine lacks what the regime needs."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def seconds(work: Callable[[], object], *, repeats: int = 3, device: str = "cpu") -> float:
    """Median seconds of a call, after one that does not count."""
    work()
    taken = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def matrix_rate(dtype: torch.dtype, *, device: str = "cpu", n: int = 2048) -> float:
    """GFLOP/s of a square matrix product: what the model's arithmetic could reach at best."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, repeats=5, device=device) / 1e9


def model_gflop(lengths: list[int], *, d: int, d_hid: int, layers: int, cls_only: bool) -> float:
    """Work of the layers on real tokens, as it is done: with `cls_only`, of the last layer little but K and V."""
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    a_layer = 2 * tokens * (4 * d * d + 2 * d * d_hid) + 4 * pairs * d
    first_token = 2 * len(lengths) * (2 * d * d + 2 * d * d_hid) + 4 * tokens * d + 2 * tokens * 2 * d * d
    return (a_layer * (layers - 1) + (first_token if cls_only else a_layer)) / 1e9


def upstream(script: str, *arguments: object) -> dict[str, object]:
    """Run a script of this folder where the real scgpt is; return the JSON document of its last line."""
    if not UPSTREAM_PYTHON.exists():
        raise CannotRun(f"no environment of the real scgpt at {UPSTREAM_PYTHON.relative_to(ROOT)}: call `make bench`")
    command = [str(UPSTREAM_PYTHON), str(Path(__file__).parent / script), *map(str, arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"TQDM_DISABLE": "1"}
    )
    return json.loads(done.stdout.strip().splitlines()[-1])
