"""The GPU benchmark on the CPU: its Triton kernel in Triton's interpreter, and all of its parts with small shapes."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.paths import REPO

BENCHMARKS = REPO / "benchmarks"

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
ATTENTION = """
import torch
from gpu_imports import Packing, attention
from gpu_variants import attend
for blocks in ("16/16/4/2", "64/32/4/2"):
    for lengths in ([1], [1, 5, 33, 64, 65, 16]):
        # the interpreter has no bfloat16 products
        for dtype, atol in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
            q, k, v = torch.randn(sum(lengths), 3 * 2, 16).to(dtype).chunk(3, dim=1)
            cells = Packing(lengths, q.device, "sdpa")
            found = attend("triton/" + blocks)(q, k, v, cells)
            wanted = attention(q.float(), k.float(), v.float(), cells)
            torch.testing.assert_close(found.float(), wanted, atol=atol, rtol=0)
print("compared")
"""


COMPILED = """
import gpu_kernels, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def ptx(kernel, signature, constants, **options):
    signature = dict(pair.split(":") for pair in signature.split()) | dict.fromkeys(constants, "constexpr")
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or "stride" in name]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

pointers = "x_ptr:*fp32 y_ptr:*bf16 weight_ptr:*fp32 bias_ptr:*fp32 out_ptr:*fp32 half_ptr:*bf16 n_rows:i32 eps:fp32"
assert "st.global" in ptx(gpu_kernels.add_norm_kernel, pointers, {"WIDTH": 512, "ROWS": 4, "HALF": True}, num_warps=4)
pointers = "q_ptr:*bf16 k_ptr:*bf16 v_ptr:*bf16 out_ptr:*bf16 ends_ptr:*i32 scale:fp32 stride:i32 out_stride:i32"
text = ptx(gpu_kernels.packed_attention_kernel, pointers, {"WIDTH": 64, "QUERIES": 128, "KEYS": 64, "TAIL": 16},
           num_warps=4, num_stages=3)
assert "wgmma" in text and "cp.async" in text  # Hopper's products, and loads ahead of them
print("compiled")
"""


def interpreted(program):
    """Run a program with Triton's interpreter, which has to be chosen before Triton is imported."""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS)}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)


def test_triton_attention_equals_torch_in_the_interpreter():
    done = interpreted(ATTENTION)
    assert done.stdout == "compared\n", done.stderr


def test_triton_add_norm_equals_torch_in_the_interpreter():
    done = interpreted(KERNEL)
    assert done.stdout == "compared\n", done.stderr


def test_triton_kernels_compile_for_hopper():
    env = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "compiled\n", done.stderr


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
