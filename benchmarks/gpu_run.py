"""Run the parts of the GPU benchmark one after the other, each in a process with a time limit; see `gpu_run.sh`."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUDGET = 455  # seconds of all parts together
# Most important first, with the seconds that each may take. What a part does not use, later ones may.
LIMITS = {"correctness": 90, "engine": 110, "kernels": 70, "variants": 150, "profile": 50, "host": 60}


def main() -> int:
    dry = "--dry-run" in sys.argv[1:]
    slower = 10 if dry else 1  # a dry run is no measurement, and its machine may be slow or busy
    out, started = Path(os.environ["OUT"]), time.monotonic()
    results: dict[str, dict[str, object]] = {}
    with (out / "log.txt").open("w") as log:
        for part, limit in LIMITS.items():
            left = slower * BUDGET - (time.monotonic() - started)
            results[part] = (
                run_part(part, min(slower * limit, left), log, dry=dry) if left > 5 else _failed("no time was left")
            )
            (out / "results.json").write_text(json.dumps({"machine": machine(), "parts": results}, indent=1))
    table = as_table(results, machine(), time.monotonic() - started)
    (out / "table.txt").write_text(table)
    print(table, end="")
    return 0 if all(result.get("ok") for result in results.values()) else 1


def run_part(part: str, limit: float, log: object, *, dry: bool) -> dict[str, object]:
    """Run a part in a process of its own, which is ended with its children at the limit; return its JSON document."""
    command = [sys.executable, "-X", "faulthandler", str(HERE / "gpu_parts.py"), part, *["--dry-run"] * dry]
    environment = os.environ | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry else {})
    print(f"--- {part} (at most {limit:.0f} s)", file=sys.stderr, flush=True)
    print(f"--- {part}", file=log, flush=True)  # type: ignore[call-overload]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
                               start_new_session=True)  # fmt: skip
    try:
        output, words = process.communicate(timeout=limit)
        end = f"ended with code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, words = process.communicate()
        end = f"did not end in {limit:.0f} s"
    print(words, file=log, flush=True)  # type: ignore[call-overload]
    lines = output.strip().splitlines()
    try:
        result = json.loads(lines[-1]) if process.returncode == 0 else _failed(end, words)
    except (IndexError, ValueError):
        result = _failed(f"{end} without a result", words)
    seconds = round(time.monotonic() - started, 1)
    print(f"    {'ok' if result['ok'] else 'FAILED'} after {seconds} s", file=sys.stderr, flush=True)
    return result | {"seconds": seconds}


def _failed(why: str, words: str = "") -> dict[str, object]:
    return {"ok": False, "error": why, "last_words": words.strip().splitlines()[-5:]}


def machine() -> dict[str, object]:
    packages = {}
    for name in ("torch", "triton", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as exc:
        card = f"none: {type(exc).__name__}"
    cores = len(os.sched_getaffinity(0))
    date = datetime.now(UTC).date().isoformat()
    return packages | {"card": card, "cores": cores, "python": platform.python_version(), "date": date}


def as_table(results: dict[str, dict[str, object]], on: dict[str, object], seconds: float) -> str:
    lines = [f"card {on['card']}; torch {on['torch']}, triton {on['triton']}; {on['cores']} cores; {on['date']}", ""]
    for part, result in results.items():
        error = f": {result['error']}" if "error" in result else ""
        lines.append(f"{part:<14}{'ok' if result['ok'] else 'FAILED'} in {result.get('seconds', 0)} s{error}")
        lines += [f"    {line}" for line in result.get("last_words", ())]  # type: ignore[attr-defined]
        lines += [f"    {line}" for line in LINES[part](result)] if "error" not in result else []
    return "\n".join([*lines, "", f"all parts: {seconds:.0f} s"]) + "\n"


def _correctness(result: dict) -> list[str]:
    missing = [f"{name} not run: {why}" for name, why in (result["not_available"] | result["not_run"]).items()]
    failed = [f"FAILED {check['check']}: {check.get('error', check.get('value'))}" for check in result["failed"]]
    return [f"{result['checks']} checks; backends: {', '.join(result['backends'])}", *failed, *missing]


def _engine(result: dict) -> list[str]:
    lines = [f"{'genes':<8}{'ours':>10}{'padded':>10}{'ratio':>8}{'of product rate':>18}  cells/s by tokens a batch"]
    for name in [key.removeprefix("ours") for key in result if key.startswith("ours")]:
        sweep = " ".join(f"{tokens}: {rate}" for tokens, rate in result[f"sweep{name}"].items())
        genes = name.removesuffix("_genes").strip("_") or "mixed"
        lines.append(f"{genes:<8}{result[f'ours{name}']:>10}{result[f'upstream{name}']:>10}{result[f'ratio{name}']:>8}"
                     f"{result[f'share_of_ceiling{name}']:>18.1%}  {sweep}")  # fmt: skip
    return [f"attention {result['attention']}; product rate {result['ceiling_tflops']} TFLOP/s", *lines]


def _kernels(result: dict) -> list[str]:
    return [f"{name:<28}" + (found.get("error") or f"{found['tflops']:>9} TFLOP/s, off by {found['difference']}")
            for name, found in result["attention"].items()]  # fmt: skip


def _variants(result: dict) -> list[str]:
    lines = []
    for name, found in result["variants"].items():
        rate = f"{found['cells_per_s']:>9} cells/s" if "cells_per_s" in found else ""
        lines.append(f"{name:<72}{rate} {found.get('error', '')}".rstrip())
    lines += [f"best with {size:>7} tokens a batch: {rate}" for size, rate in result.get("tokens", {}).items()]
    return lines + [f"CUDA graph, {cells:>3} cells: {found}" for cells, found in result.get("graphs", {}).items()]


def _profile(result: dict) -> list[str]:
    lines = [f"product rate {result['product_tflops']} TFLOP/s, copies {result['copy_gb_per_s']} GB/s"]
    lines += [f"{kind:<26}{found}" for kind, found in result["kinds"].items()]
    return lines + [f"{line['share']:7.1%} {line['calls']:>5} x {line['kernel']}" for line in result["top"]]


def _host(result: dict) -> list[str]:
    lines = [f"{stage:<18}{rates['one_core']:>10} cells/s on one core, {rates['all_cores']:>10} on {result['cores']}"
             for stage, rates in result["stages"].items()]  # fmt: skip
    lines += [f"{name}: {found}" for name, found in result["copies"].items()]
    return [*lines, f"not measured: {result['not_measured']}"]


LINES = {"correctness": _correctness, "engine": _engine, "kernels": _kernels, "variants": _variants,
         "profile": _profile, "host": _host}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
