"""The parts of `gpu_run.sh`; each runs in a process of its own: `python benchmarks/gpu_parts.py PART [--dry-run]`.

A part says what it does on standard error; its last line on standard output is one JSON document. What fails within a
part is recorded in it and does not stop the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import gpu
import numpy as np
import torch
import torch.nn.functional as F
from figures import CannotRun, matrix_rate, say, seconds, synchronize
from gpu import Sizes, packed, split
from gpu_imports import (
    BACKENDS,
    GOLDEN,
    Checkpoint,
    Packing,
    ScGPT,
    attention_module,
    build_model,
    distinct,
    load_checkpoint,
    load_tokeniser,
    obstacle,
    to_device,
)
from gpu_variants import Variant, attend, forward, on_device, use

LEAST_COSINE = 0.999  # of a vector in bfloat16 with the one in float64


# (a) Correctness


class Checks:
    """What was compared, what was found and whether it is within bounds."""

    def __init__(self) -> None:
        self.found: list[dict[str, object]] = []

    def add(self, name: str, value: float, bound: float, *, least: bool = False) -> None:
        """Record a difference that may be at most `bound`, or with `least` a cosine that is at least it."""
        ok = value >= bound if least else value <= bound
        self.found.append({"check": name, "value": float(f"{value:.3g}") if not least else round(value, 6),
                           "bound": bound, "ok": bool(ok)})  # fmt: skip
        say(f"{'ok  ' if ok else 'FAIL'} {name}: {value:.6g} (bound {bound:g})")

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Record an exception as a failed check."""
        try:
            yield
        except Exception as exc:
            traceback.print_exc()
            self.found.append({"check": name, "error": _in_short(exc), "ok": False})


def correctness(sizes: Sizes) -> dict[str, object]:
    checks, device = Checks(), torch.device(sizes.device)
    backends = [name for name in BACKENDS if not obstacle(name, device, torch.bfloat16)]
    say(f"backends in bfloat16: {', '.join(backends)}")
    for layout in ("flash", "torch"):
        _golden(checks, layout, sizes.device, backends)
    checkpoint = sizes.checkpoint()
    _against_float64(checks, sizes, checkpoint, backends)
    if sizes.device == "cuda":
        with checks.of("out of memory"):
            _out_of_memory(checks, sizes, checkpoint)
    missing = {name: obstacle(name, device, torch.bfloat16) for name in BACKENDS if name not in backends}
    failed = [check for check in checks.found if not check["ok"]]
    not_run = {} if sizes.device == "cuda" else {"out of memory": "needs a GPU"}
    return {"ok": not failed, "checks": len(checks.found), "failed": failed, "backends": backends,
            "not_available": missing, "not_run": not_run, "all": checks.found}  # fmt: skip


def _model(checkpoint: Checkpoint, device: str, dtype: torch.dtype, backend: str) -> ScGPT:
    os.environ[attention_module.SETTING] = backend
    return build_model(checkpoint, device=device, dtype=dtype)


def _golden(checks: Checks, layout: str, device: str, backends: list[str]) -> None:
    """The stored outputs of scgpt 0.2.4, with the tolerances that the tests have for the CPU."""
    checkpoint = load_checkpoint(GOLDEN / f"checkpoint_{layout}")
    with np.load(GOLDEN / "transformer.npz") as arrays:
        wanted = dict(arrays)
    with np.load(GOLDEN / "static.npz") as arrays:
        static = dict(arrays)
    lengths = wanted["lengths"].tolist()
    real = ~wanted["key_padding_mask"]
    genes, values = torch.from_numpy(wanted["gene_ids"][real]).long(), torch.from_numpy(wanted["values"][real])
    for dtype, backend in [(torch.float32, "sdpa"), *((torch.bfloat16, name) for name in backends)]:
        name = f"golden {layout}, {str(dtype).removeprefix('torch.')}, {backend}"
        with checks.of(name):
            model = _model(checkpoint, device, dtype, backend)
            output = model(genes, values, lengths).cpu().numpy()
            cls = model(genes, values, lengths, cls_only=True).cpu().numpy()
            if dtype == torch.float32:
                checks.add(f"{name}: every token", abs(output - wanted["output"][real]).max(), 1e-4)
                checks.add(f"{name}: cls_only", abs(cls - wanted["cls"]).max(), 1e-4)
                vectors = model.gene_vectors(torch.from_numpy(static["token_ids"]).to(device)).cpu().numpy()
                checks.add(f"{name}: static", abs(vectors - static["embeddings"]).max(), 1e-5)
            else:
                checks.add(f"{name}: every token", abs(output - wanted["output"][real]).max(), 0.02)
                checks.add(f"{name}: cosine", _cosine(output, wanted["output"][real]), 0.9999, least=True)
                checks.add(f"{name}: cls_only, cosine", _cosine(cls, wanted["cls"]), 0.9999, least=True)


def _against_float64(checks: Checks, sizes: Sizes, checkpoint: Checkpoint, backends: list[str]) -> None:
    """One-token cells, a cell of 1,200 genes and mixed lengths, on a random model of the size that is measured."""
    longest = max(sizes.genes) + 1
    exact = _model(checkpoint, "cpu", torch.float32, "auto").double()
    for case, lengths in {
        "one-token cells": [1, 1, 1],
        f"a cell of {longest - 1} genes": [longest],
        "mixed lengths": [longest, 1, 37, longest // 2, longest // 2, 1, longest // 3],
    }.items():
        genes, values, _ = packed(np.array(lengths), len(checkpoint.vocabulary))
        wanted = exact(genes, values.double(), lengths).numpy()
        first = np.cumsum([0, *lengths[:-1]])
        for dtype, backend in [(torch.float32, "sdpa"), *((torch.bfloat16, name) for name in backends)]:
            name = f"{case}, {str(dtype).removeprefix('torch.')}, {backend}"
            with checks.of(name):
                model = _model(checkpoint, sizes.device, dtype, backend)
                output = model(genes, values, lengths).cpu().numpy()
                cls = model(genes, values, lengths, cls_only=True).cpu().numpy()
                least = 0.999999 if dtype == torch.float32 else LEAST_COSINE
                checks.add(f"{name}: every token, cosine", _cosine(output, wanted), least, least=True)
                checks.add(f"{name}: cls_only, cosine", _cosine(cls, wanted[first]), least, least=True)


def _out_of_memory(checks: Checks, sizes: Sizes, checkpoint: Checkpoint) -> None:
    """What the embedder relies on: the error's class and text, and that half a batch runs after it."""
    model = _model(checkpoint, sizes.device, torch.bfloat16, "auto")
    lengths = np.full(128, max(sizes.genes) + 1)
    whole, half = (packed(part, sizes.n_genes) for part in (lengths, lengths[:64]))
    peaks = []
    for batch in (half, whole):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        wanted = model(*batch, cls_only=True).cpu()
        peaks.append(torch.cuda.max_memory_reserved())
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((peaks[0] + peaks[1]) / 2 / total)
    try:
        model(*whole, cls_only=True)
        checks.add("out of memory: no error was raised", 1, 0)
        return
    except RuntimeError as exc:
        checks.add("out of memory: the message says so", float("out of memory" not in str(exc)), 0)
    torch.cuda.empty_cache()
    n = 64 * int(lengths[0])
    halves = [(genes, values, lengths[:64].tolist()) for genes, values in zip(*(x.split(n) for x in whole[:2]))]  # noqa: B905
    found = torch.cat([model(*part, cls_only=True).cpu() for part in halves])
    checks.add("out of memory: halves give the whole, cosine", _cosine(found, wanted), LEAST_COSINE, least=True)
    torch.cuda.set_per_process_memory_fraction(1.0)


def _cosine(a: object, b: object) -> float:
    """The least cosine of two sets of vectors; NaN counts as -1."""
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    return float(torch.nan_to_num(F.cosine_similarity(a, b, dim=-1), nan=-1.0).min())


# (b) Ours, upstream's, the ceiling


def engine(sizes: Sizes) -> dict[str, object]:
    figures = gpu.run(sizes)
    return figures | {"ok": True}


# (c) Variants

# queries, keys, warps and stages of our attention kernel that are tried
BLOCKS = ("128/64/4/3", "128/128/8/3", "128/64/8/3", "64/64/4/3", "64/128/4/2")


def kernels(sizes: Sizes) -> dict[str, object]:
    """Attention alone: TFLOP/s of each kernel that exists here, and its difference from float64."""
    found: dict[str, object] = {}
    for genes in sizes.genes:
        length, heads, width = genes + 1, sizes.heads, sizes.d // sizes.heads
        n_cells = max(1, sizes.sweep[-1] // 4 // length)
        projected = torch.randn(n_cells * length, 3 * heads, width, generator=torch.Generator().manual_seed(0))
        q, k, v = projected.to(sizes.device, torch.bfloat16).chunk(3, dim=1)
        exact = F.scaled_dot_product_attention(*(x[:length].cpu().double().transpose(0, 1) for x in (q, k, v)))
        for name in _attentions(sizes):
            with _recorded(found, f"{name}, {genes} genes"), torch.inference_mode():
                use(name)
                cells = Packing([length] * n_cells, q.device, name)
                out = attend(name)(q, k, v, cells)
                difference = float((out[:length].cpu().double() - exact.transpose(0, 1)).abs().max())
                taken = _fast(lambda: attend(name)(q, k, v, cells), sizes.device)  # noqa: B023
                rate = 4 * n_cells * length**2 * sizes.d / taken / 1e12
                found[f"{name}, {genes} genes"] = {"tflops": _round(rate), "difference": float(f"{difference:.2g}")}
                say(f"attention {name}, {genes} genes: {rate:.3g} TFLOP/s, difference from float64 {difference:.2g}")
                if difference > 0.02:
                    raise ValueError(f"attention {name} differs from float64 by {difference:.3g}")
    return {"ok": _all_ran(found), "attention": found}


def _attentions(sizes: Sizes) -> list[str]:
    """Every kernel that may run here; one that does not is recorded with the reason."""
    if sizes.device != "cuda":
        return ["sdpa"]
    names = [name for name in BACKENDS if not obstacle(name, torch.device("cuda"), torch.bfloat16)]
    return [*names, "cudnn", "cudnn-dense", *(f"triton/{blocks}" for blocks in BLOCKS)]


def variants(sizes: Sizes) -> dict[str, object]:
    """Cells/s of each variant at 1,024 genes, checked against float64; then batch sizes and CUDA graphs of the best."""
    checkpoint = sizes.checkpoint()
    model = build_model(checkpoint, device=sizes.device, dtype=torch.bfloat16)
    exact = build_model(checkpoint).double()
    genes = sizes.genes[1]
    sample = packed(np.array([genes + 1, 1, 37, genes // 3]), sizes.n_genes)
    wanted = exact(sample[0], sample[1].double(), sample[2], cls_only=True)
    lengths, tokens = np.full(sizes.n_cells, genes + 1), sizes.sweep[len(sizes.sweep) // 2]
    found: dict[str, object] = {}
    rates: dict[Variant, float] = {}

    def measure(variant: Variant) -> None:
        with _recorded(found, str(variant)):
            use(variant.attention)
            cosine = _cosine(forward(model, variant, *sample).cpu(), wanted)
            rate = _cells_per_s(lambda *batch: forward(model, variant, *batch), lengths, tokens, sizes)
            found[str(variant)] = {"cells_per_s": _round(rate), "cosine": round(cosine, 6)}
            say(f"{variant}: {rate:.5g} cells/s, least cosine {cosine:.6f}")
            if cosine < LEAST_COSINE:
                raise ValueError(f"least cosine with float64 {cosine:.6f}, {LEAST_COSINE} wanted")
            rates[variant] = rate

    with _recorded(found, "package"):
        rate = _cells_per_s(lambda *batch: model(*batch, cls_only=True), lengths, tokens, sizes)
        found["package"] = {"cells_per_s": _round(rate), "attention": model.backend}
        say(f"the package as it is ({model.backend}): {rate:.5g} cells/s")
    for name in _attentions(sizes):
        measure(Variant(name))
    if not rates:
        return {"ok": False, "variants": found}
    fastest = max(rates, key=rates.__getitem__).attention
    measure(Variant(fastest, "torch", torch.bfloat16))
    for norm in ("triton", "compiled"):
        for residual in (torch.float32, torch.bfloat16):
            measure(Variant(fastest, norm, residual))
    best = max(rates, key=rates.__getitem__)
    measure(Variant(best.attention, best.norm, best.residual, epilogue=True))
    best = max(rates, key=rates.__getitem__)
    use(best.attention)
    sizes_found: dict[str, object] = {}
    for size in (sizes.sweep[0] // 2, *sizes.sweep[:-1]):
        with _recorded(sizes_found, str(size)):
            rate = _cells_per_s(lambda *batch: forward(model, best, *batch), lengths, size, sizes)
            sizes_found[str(size)] = _round(rate)
            say(f"best variant, {size} tokens a batch: {rate:.5g} cells/s")
    graphs: dict[str, object] = {}
    if sizes.device == "cuda":
        for cells in (1, 4, 16, 64):
            with _recorded(graphs, str(cells)):
                graphs[str(cells)] = _graph(model, best, cells, genes, sizes)
                say(f"CUDA graph, {cells} cells: {graphs[str(cells)]}")
    return {"ok": _all_ran(found, sizes_found, graphs), "tokens_a_batch": tokens, "genes": genes, "best": str(best),
            "variants": found, "tokens": sizes_found, "graphs": graphs}  # fmt: skip


def _cells_per_s(run: Callable[..., torch.Tensor], lengths: np.ndarray, tokens: int, sizes: Sizes) -> float:
    """Rate of whole passes, batches queued first and vectors fetched after: as `gpu.cells_per_s`."""
    batches = [packed(part, sizes.n_genes) for part in split(lengths, tokens)]

    def embed() -> None:
        for vectors in [run(*batch) for batch in batches]:
            vectors.cpu()

    return len(lengths) / seconds(embed, device=sizes.device)


def _graph(model: ScGPT, variant: Variant, n_cells: int, genes: int, sizes: Sizes) -> dict[str, object]:
    """Milliseconds of one batch of a fixed shape, from the host and back, with and without a CUDA graph."""
    device = torch.device(sizes.device)
    tokens, values, lengths = packed(np.full(n_cells, genes + 1), sizes.n_genes)
    bins, bin_of = distinct(values)
    host = [x.pin_memory() for x in (tokens, bins, bin_of)]
    static = [x.to(device) for x in host]
    cells = Packing(lengths, device, variant.attention)

    def run() -> torch.Tensor:
        return on_device(model, variant, *static, cells)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            wanted = run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(captured):
        out = run()

    def fill() -> None:
        for to, given in zip(static, host, strict=True):
            to.copy_(given, non_blocking=True)

    def with_graph() -> None:
        fill()
        captured.replay()
        out.cpu()

    def without() -> None:
        fill()
        run().cpu()

    with torch.inference_mode():
        eager, replayed = (seconds(work, repeats=9, device=sizes.device) * 1e3 for work in (without, with_graph))
    cosine = _cosine(out.cpu(), wanted.cpu())
    if cosine < 0.9999:
        raise ValueError(f"the graph's vectors differ: least cosine {cosine:.6f}")
    return {"ms": _round(eager), "ms_with_graph": _round(replayed)}


# (d) Profile

KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa", "softmax"),
    "products": ("gemm", "cutlass", "cublas", "nvjet", "xmma", "addmm", "mm"),
    "norms": ("norm",),
    "copies": ("memcpy", "memset"),
}


def profile(sizes: Sizes) -> dict[str, object]:
    """The 15 kernels that take most time, and each kind's FLOP or bytes against its ceiling."""
    device, genes = sizes.device, sizes.genes[1]
    model = sizes.model()
    n_cells = max(1, sizes.sweep[len(sizes.sweep) // 2] // (genes + 1))
    batch = packed(np.full(n_cells, genes + 1), sizes.n_genes)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    model(*batch, cls_only=True).cpu()
    passes = 3
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(passes):
            model(*batch, cls_only=True).cpu()
        synchronize(device)
    averages = seen.key_averages()
    on_card = [event for event in averages if event.device_type != torch.autograd.DeviceType.CPU]
    attribute = "self_device_time_total" if on_card else "self_cpu_time_total"
    events = sorted(on_card or averages, key=lambda event: -getattr(event, attribute))
    total = sum(getattr(event, attribute) for event in events) or 1
    times: dict[str, float] = dict.fromkeys([*KINDS, "elementwise and the rest"], 0.0)
    for event in events:
        times[_kind(event.key)] += getattr(event, attribute) / 1e6 / passes  # µs to s
    top = [{"kernel": event.key[:120], "share": round(getattr(event, attribute) / total, 4),
            "calls": event.count // passes} for event in events[:15]]  # fmt: skip
    product = matrix_rate(torch.bfloat16, device=device, n=sizes.product) * 1e9
    memory = _copy_rate(sizes)
    work = reckoned(n_cells, genes + 1, sizes)
    against = {
        kind: {
            "seconds": float(f"{spent:.3g}"),
            **({"tflops": _round(work[kind] / spent / 1e12), "of_product_rate": round(work[kind] / spent / product, 3)}
               if kind in ("attention", "products") and spent else {}),
            **({"gb_per_s": _round(work[kind] / spent / 1e9), "of_copy_rate": round(work[kind] / spent / memory, 3)}
               if kind in ("norms", "elementwise and the rest") and spent else {}),
        }
        for kind, spent in times.items()
    }  # fmt: skip
    for line in top:
        say(f"{line['share']:7.1%} {line['calls']:5} x {line['kernel']}")
    say(json.dumps(against, indent=1))
    return {"ok": bool(top), "top": top, "kinds": against, "product_tflops": _round(product / 1e12),
            "copy_gb_per_s": _round(memory / 1e9), "tokens": n_cells * (genes + 1)}  # fmt: skip


def reckoned(n_cells: int, length: int, sizes: Sizes) -> dict[str, float]:
    """FLOP of products and attention, and bytes that sums, ReLU and norms read and write as the package runs them."""
    tokens, d, layers = n_cells * length, sizes.d, sizes.layers - 1  # the last layer is one of few tokens
    elementwise = tokens * d * (4 + 2 + 4)  # x + attended: float32, bfloat16 in, float32 out
    return {
        "products": 2.0 * tokens * 6 * d * d * layers,
        "attention": 4.0 * n_cells * length**2 * d * layers,
        "norms": 2.0 * layers * tokens * d * (4 + 4),
        # two sums, two casts to bfloat16, one ReLU
        "elementwise and the rest": layers * (2.0 * elementwise + 2 * tokens * d * (4 + 2) + tokens * d * (2 + 2)),
    }


def _kind(kernel: str) -> str:
    lower = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)),
                "elementwise and the rest")  # fmt: skip


def _copy_rate(sizes: Sizes) -> float:
    """Bytes read and written a second by a copy on the device."""
    x = torch.empty(2**28 if sizes.device == "cuda" else 2**20, device=sizes.device)
    y = torch.empty_like(x)
    return 8 * len(x) / _fast(lambda: y.copy_(x), sizes.device)


# (e) The host


def host(sizes: Sizes) -> dict[str, object]:
    """Can the host feed the card: cells/s of each stage on one core and on all, and copies to and from the card."""
    genes, cores = sizes.genes[1], len(os.sched_getaffinity(0))
    n_cells = 512 if sizes.device == "cuda" else 8
    one = _stages(n_cells, genes)
    with ProcessPoolExecutor(cores) as pool:
        for _ in pool.map(_stages, [4] * cores, [genes] * cores):  # imports and first calls do not count
            pass
        each = list(pool.map(_stages, [n_cells] * cores, [genes] * cores))
    stages = {name: {"one_core": _round(rate), "all_cores": _round(sum(part[name] for part in each))}
              for name, rate in one.items()}  # fmt: skip
    for name, rates in stages.items():
        say(f"{name}: {rates['one_core']:.5g} cells/s on one core, {rates['all_cores']:.5g} on {cores}")
    copies = _copies(sizes) if sizes.device == "cuda" else {}
    say(f"copies: {copies}")
    missing = "reading rows, filtering, normalising and the choice of variable genes: they need anndata and scanpy"
    return {"ok": True, "cores": cores, "genes": genes, "stages": stages, "copies": copies, "not_measured": missing}


def _stages(n_cells: int, genes: int) -> dict[str, float]:
    """Cells/s of binning, tokenising and of finding the distinct values, with one thread."""
    torch.set_num_threads(1)
    tokeniser, rng = load_tokeniser(), np.random.default_rng(0)
    lengths = np.full(n_cells, genes)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    counts = rng.poisson(1.0, indptr[-1]).astype(np.float32) + 1
    columns = np.tile(np.arange(genes, dtype=np.int32), n_cells)
    hashes = rng.integers(0, 2**63, genes).astype(np.uint64)[columns]
    matrix = _Csr(counts, columns, indptr)
    parameters = _TieBreak("random", 0)

    def binned() -> np.ndarray:
        return tokeniser.bin_values(counts, indptr, hashes, parameters, n_bins=tokeniser.COLLATOR_BINS)

    tokens, _ = tokeniser.tokenize(_Csr(binned(), columns, indptr), np.arange(genes), cls_id=genes, cls_value=-2.0)
    if len(tokens.genes) != n_cells * (genes + 1) or tokens.values.max() > tokeniser.COLLATOR_BINS - 1:
        raise ValueError("the tokeniser answers other than it should")
    values = torch.from_numpy(tokens.values)
    stages = {
        "binning": binned,
        "tokenising": lambda: tokeniser.tokenize(matrix, np.arange(genes), cls_id=genes, cls_value=-2.0),
        "distinct values": lambda: distinct(values),
    }
    rates = {name: n_cells / seconds(work) for name, work in stages.items()}
    return rates | {"all three": 1 / sum(1 / rate for rate in rates.values())}


class _Csr:
    """What the tokeniser asks of a sparse matrix."""

    def __init__(self, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray) -> None:
        self.data, self.indices, self.indptr = data, indices, indptr


class _TieBreak:
    """What binning asks of the parameters."""

    def __init__(self, tie_break: str, seed: int) -> None:
        self.tie_break, self.seed = tie_break, seed


def _copies(sizes: Sizes) -> dict[str, object]:
    """Copies of a batch, and the model's rate with inputs pinned as it sends them, pinned before, and on a stream."""
    model = sizes.model()
    device, genes = torch.device(sizes.device), sizes.genes[1]
    lengths, tokens = np.full(sizes.n_cells, genes + 1), sizes.sweep[len(sizes.sweep) // 2]
    batches = [packed(part, sizes.n_genes) for part in split(lengths, tokens)]
    first = batches[0][0]
    gigabytes = first.numel() * first.element_size() / 1e9
    pinned = first.pin_memory()
    found: dict[str, object] = {
        "pinning_gb_per_s": _round(gigabytes / seconds(lambda: first.pin_memory(), device=sizes.device)),
        "pageable_gb_per_s": _round(gigabytes / seconds(lambda: first.to(device), device=sizes.device)),
        "pinned_gb_per_s": _round(gigabytes / seconds(lambda: pinned.to(device), device=sizes.device)),
    }
    variant = Variant(model.backend)

    def rate(prepare: Callable[[], list[tuple[torch.Tensor, ...]]]) -> float:
        def embed() -> None:
            outputs = [on_device(model, variant, *x, Packing(batch[2], device, model.backend))
                       for x, batch in zip(prepare(), batches, strict=True)]  # fmt: skip
            for vectors in outputs:
                vectors.cpu()

        return sizes.n_cells / seconds(embed, device=sizes.device)

    ready = [tuple(x.pin_memory() for x in (batch[0], *distinct(batch[1]))) for batch in batches]
    there = [tuple(x.to(device) for x in batch) for batch in ready]
    stream = torch.cuda.Stream()

    def on_a_stream() -> list[tuple[torch.Tensor, ...]]:
        with torch.cuda.stream(stream):
            sent = [tuple(x.to(device, non_blocking=True) for x in batch) for batch in ready]
        torch.cuda.current_stream().wait_stream(stream)
        for batch in sent:
            for x in batch:
                x.record_stream(torch.cuda.current_stream())
        return sent

    ways = {
        "as the package sends": lambda: [tuple(to_device(x, device) for x in (b[0], *distinct(b[1]))) for b in batches],
        "pinned before": lambda: [tuple(x.to(device, non_blocking=True) for x in batch) for batch in ready],
        "pinned before, on a stream": on_a_stream,
        "on the card already": lambda: there,
    }
    for name, way in ways.items():
        with _recorded(found, name):
            found[name] = {"cells_per_s": _round(rate(way))}
            say(f"inputs {name}: {found[name]}")
    return found


# What the parts share


def _fast(work: Callable[[], object], device: str) -> float:
    """Seconds of a call that is short: of many in a row, so that launches and timers do not count."""
    if device != "cuda":
        return seconds(work)
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    started, n = time.perf_counter(), 20
    for _ in range(n):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / n


@contextmanager
def _recorded(found: dict[str, object], name: str) -> Iterator[None]:
    """Record what fails beside what was found, and go on."""
    try:
        yield
    except Exception as exc:
        traceback.print_exc()
        found[name] = {**(found.get(name) or {}), "error": _in_short(exc)}  # type: ignore[dict-item]


def _all_ran(*parts: dict[str, object]) -> bool:
    return not any(isinstance(value, dict) and "error" in value for part in parts for value in part.values())


def _in_short(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {str(exc).strip()[:300]}"


def _round(x: float) -> float:
    return float(f"{x:.4g}") if math.isfinite(x) else x


PARTS = {"correctness": correctness, "engine": engine, "kernels": kernels, "variants": variants, "profile": profile,
         "host": host}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="One part of the GPU benchmark.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU: shows that the code runs")
    args = parser.parse_args()
    sizes = gpu.SMALL if args.dry_run else Sizes()
    if sizes.device == "cuda" and not torch.cuda.is_available():
        raise CannotRun("there is no CUDA GPU; --dry-run runs on the CPU")
    print(json.dumps(PARTS[args.part](sizes)))


if __name__ == "__main__":
    try:
        main()
    except CannotRun as exc:
        sys.exit(f"benchmarks/gpu_parts.py: {exc}")
