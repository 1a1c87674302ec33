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

from scgpt_batch.models import attention as attention_module  # noqa: E402
from scgpt_batch.models.attention import BACKENDS, Packing, activate, attention, obstacle, to_device  # noqa: E402
from scgpt_batch.models.scgpt.checkpoint import Checkpoint, build_model, load_checkpoint  # noqa: E402
from scgpt_batch.models.scgpt.transformer import ScGPT, distinct  # noqa: E402

__all__ = [
    "BACKENDS", "GOLDEN", "ROOT", "Checkpoint", "Packing", "ScGPT", "activate", "attention", "attention_module",
    "build_model", "distinct", "load_checkpoint", "load_tokeniser", "obstacle", "to_device",
]  # fmt: skip

GOLDEN = ROOT / "tests" / "data" / "golden"
# What `load_tokeniser` takes from these files: functions of numpy and torch alone
TOKENISER = {
    ROOT / "scgpt_batch" / "models" / "interface.py": {"Tokens"},
    ROOT / "scgpt_batch" / "preprocessing" / "binning.py": {
        "BLOCK", "COLLATOR_BINS", "_bin_block", "_blocks", "_edges_passed", "_mix", "_quantiles", "_sort_rows",
        "bin_values", "cell_noise",
    },
    ROOT / "scgpt_batch" / "preprocessing" / "tokens.py": {"tokenize"},
}  # fmt: skip


def load_tokeniser() -> SimpleNamespace:
    """Return binning and tokenising, without the rest of their modules, which import anndata and scanpy."""
    space = {"np": np, "torch": torch, "sys": sys, "dataclass": dataclass, "__name__": __name__}
    for path, names in TOKENISER.items():
        kept = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if _names(node) & names]
        found = set().union(*map(_names, kept))
        if missing := names - found:
            raise ImportError(f"{path.name} has no {', '.join(sorted(missing))}: adapt benchmarks/gpu_imports.py")
        future = ast.parse("from __future__ import annotations").body
        module = ast.Module(body=[*future, *kept], type_ignores=[])
        exec(compile(module, str(path), "exec"), space)
    return SimpleNamespace(**{name: space[name] for names in TOKENISER.values() for name in names})


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}
