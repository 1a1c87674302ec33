"""What the GPU benchmarks import from the package, in one place: a move of modules changes this file alone.

The machine with the card has torch, triton, numpy and safetensors, and not the package. So the repository
is put on the path, and nothing is imported that needs more than these.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scgpt_batch.model import Checkpoint, ScGPT, load_checkpoint  # noqa: E402
from scgpt_batch.model import attention as attention_module  # noqa: E402
from scgpt_batch.model.attention import BACKENDS, Packing, activate, attention, obstacle, send  # noqa: E402
from scgpt_batch.model.transformer import distinct  # noqa: E402

__all__ = [
    "BACKENDS", "GOLDEN", "ROOT", "Checkpoint", "Packing", "ScGPT", "activate", "attention", "attention_module",
    "distinct", "load_checkpoint", "load_tokeniser", "obstacle", "send",
]  # fmt: skip

GOLDEN = ROOT / "tests" / "data" / "golden"
TOKENISER = ROOT / "scgpt_batch" / "preprocess.py"
# What `load_tokeniser` takes from there: functions of numpy and torch alone
TOKENISER_NAMES = {
    "BLOCK", "COLLATOR_BINS", "Tokens", "_bin_block", "_blocks", "_edges_passed", "_mix", "_quantiles", "_sort_rows",
    "bin_values", "cell_noise", "tokenize",
}  # fmt: skip


def load_tokeniser() -> SimpleNamespace:
    """Return binning and tokenising, without the rest of their module, which imports anndata and scanpy."""
    tree = ast.parse(TOKENISER.read_text(encoding="utf-8"))
    kept = [node for node in tree.body if _names(node) & TOKENISER_NAMES]
    found = set().union(*map(_names, kept))
    if missing := TOKENISER_NAMES - found:
        raise ImportError(f"{TOKENISER.name} has no {', '.join(sorted(missing))}: adapt benchmarks/gpu_imports.py")
    future = ast.parse("from __future__ import annotations").body
    module = ast.Module(body=[*future, *kept], type_ignores=[])
    space = {"np": np, "torch": torch, "sys": sys, "dataclass": dataclass, "__name__": __name__}
    exec(compile(module, str(TOKENISER), "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in TOKENISER_NAMES})


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}
