"""The blog's wrapper under `mlflow models serve` against `scgpt-batch serve`: the same rows over HTTP, in one run.

Regime: rows of 50 cells x 100 genes and of 500 x 3,000 (PBMC3k, log-normalised), static mode with its preprocessing, a
random checkpoint of the published size, 1, 8 and 32 clients that ask again as soon as they are answered. The blog's
side gets dense JSON, all it reads; ours the same bytes ("dense"), and what its own client sends ("csr": CSR columns,
gzip, an answer in base64). Ours logs every request to its inference table meanwhile; MLflow's server logs nothing.
Clients, server and the other load of the machine share its cores. Both servers have answered before the clock starts.

The ceiling is our embedder called in a loop in this process, one thread, with no HTTP and no JSON.

    .venv/bin/python benchmarks/serving.py [--side blog|ours] [--rows small|large] [--clients 1 8 32]
    .venv/bin/python benchmarks/serving.py --soak memory      # 20,000 requests: does memory grow?
    .venv/bin/python benchmarks/serving.py --soak log         # 10,000 requests at 32 clients: are all in the table?

Everything is kept below .cache/bench-serving. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anndata
import mlflow
import numpy as np
import orjson
from deltalake import DeltaTable
from full_size_checkpoint import write_checkpoint
from pbmc_rows import cell_rows, gene_names, read_cells

from scgpt_batch.io.rows import PAYLOAD_COLUMNS, to_row
from scgpt_batch.parameters import Parameters
from scgpt_batch.registry.register import register
from scgpt_batch.registry.resolve import ResolvedModel, load

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".cache" / "bench-serving"
PBMC = ROOT / "tests" / "data" / "pbmc3k.h5ad"
UPSTREAM = ROOT / ".venv-upstream" / "bin"
COMMAND = Path(sys.executable).parent / "scgpt-batch"

SIZES = {"small": (50, 100), "large": (500, 3000)}
DISTINCT = 4  # different rows that are sent in turns
SECONDS = 6.0  # of load for each of our figures
PACKED = {"Content-Encoding": "gzip"}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- requests -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A request, ready to be sent."""

    body: bytes
    headers: dict[str, str]


def questions(size: str, spelled: str) -> list[Question]:
    """Some rows of a size as dense JSON, or as this package's client sends them."""
    n_cells, n_genes = SIZES[size]
    cells = read_cells(PBMC, n_genes=n_genes)
    return [_question(row, spelled) for row in cell_rows(cells, n_rows=DISTINCT, n_cells=n_cells)]


def _question(row, spelled: str) -> Question:
    tables = {"adata_obs": row.obs, "adata_var": row.var}
    if spelled == "dense":
        document = {
            "dataframe_records": [{"adata_sparsematrix": row.matrix.toarray().astype(float).tolist(), **tables}]
        }
        return Question(json.dumps(document).encode(), {})
    csr = {"x_data": row.matrix.data, "x_indices": row.matrix.indices, "x_indptr": row.matrix.indptr, **tables}
    return _packed({"dataframe_records": [csr], "params": {"encoding": "float32_base64"}})


def _packed(document: dict) -> Question:
    return Question(gzip.compress(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), 1), PACKED)


def real_row() -> dict[str, float]:
    """What 500 real cells with all 32,738 genes weigh: as dense JSON, and as the client sends them."""
    row = to_row(anndata.read_h5ad(PBMC)[:500])
    csr = {name: row[name] for name in PAYLOAD_COLUMNS if row[name] is not None}
    dense = anndata.read_h5ad(PBMC)[:500].X.toarray().astype(float).tolist()
    tables = {"adata_obs": row["adata_obs"], "adata_var": row["adata_var"]}
    dense_mb = len(json.dumps({"dataframe_records": [{"adata_sparsematrix": dense, **tables}]})) / 1e6
    client_mb = len(_packed({"dataframe_records": [csr]}).body) / 1e6
    return {
        "dense_json_mb": round(dense_mb, 2),
        "csr_gzip_mb": round(client_mb, 2),
        "ratio": round(dense_mb / client_mb, 1),
    }


# --- who answers ----------------------------------------------------------------------------------


@contextmanager
def server(command: Sequence[object], port: int, **environment: str) -> Iterator[subprocess.Popen]:
    """Run a server until it is up, and end it afterwards."""
    with (WORK / "server.log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, command)), cwd=WORK, env=os.environ | environment, stdout=log, stderr=log
        )
    try:
        _wait_until_up(process, port)
        yield process
    finally:
        process.terminate()
        process.wait(120)


def _wait_until_up(process: subprocess.Popen, port: int) -> None:
    for _ in range(1800):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/ping")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
        if process.poll() is not None:
            break
    raise SystemExit(f"the server did not start: see {WORK / 'server.log'}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def checkpoint() -> Path:
    folder = WORK / "checkpoint"
    if not (folder / "args.json").exists():
        say(f"making a random checkpoint of full size in {folder}")
        write_checkpoint(folder, genes=gene_names(PBMC))
    return folder


@contextmanager
def blog() -> Iterator[tuple[int, subprocess.Popen]]:
    """The blog's wrapper under MLflow's own server; with time enough for its answers."""
    store, port = _fresh("blog_mlflow"), free_port()
    code = "import sys, pathlib, blog_wrapper; blog_wrapper.register(*map(pathlib.Path, sys.argv[1:]))"
    register = [UPSTREAM / "python", "-c", code, checkpoint(), store]
    subprocess.run(register, cwd=Path(__file__).parent, check=True, stdout=sys.stderr)
    uri = "models:/blog_scgpt/1"
    command = [
        UPSTREAM / "mlflow",
        "models",
        "serve",
        "-m",
        uri,
        "-p",
        port,
        "-h",
        "127.0.0.1",
        "--env-manager",
        "local",
    ]
    tracking = f"sqlite:///{store / 'mlflow.db'}"
    path = f"{UPSTREAM}:{os.environ['PATH']}"
    with server(
        command, port, MLFLOW_TRACKING_URI=tracking, PATH=path, MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT="1800"
    ) as process:
        yield port, process


def registered() -> ResolvedModel:
    """Our model, registered anew: it carries this code."""
    store = _fresh("our_mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{store / 'mlflow.db'}")
    mlflow.create_experiment("bench", artifact_location=(store / "artifacts").as_uri())
    os.environ["MLFLOW_EXPERIMENT_NAME"] = "bench"
    return register(str(checkpoint()), "scgpt_bench")


@contextmanager
def ours(model: ResolvedModel) -> Iterator[tuple[int, subprocess.Popen]]:
    """`scgpt-batch serve` with an empty inference table."""
    _fresh("payload"), _fresh("payload_spool")
    port = free_port()
    command = [COMMAND, "serve", "--model-uri", model.uri, "--port", port]
    command += ["--inference-table", f"delta.`{WORK / 'payload'}`"]
    with server(command, port, MLFLOW_TRACKING_URI=mlflow.get_tracking_uri()) as process:
        yield port, process


def _fresh(name: str) -> Path:
    shutil.rmtree(WORK / name, ignore_errors=True)
    (WORK / name).mkdir(parents=True)
    return WORK / name


# --- the load -------------------------------------------------------------------------------------


class Load:
    """Clients on threads; each sends the next question as soon as its last is answered."""

    def __init__(self, port: int, workload: Sequence[Question], *, clients: int, requests: int, seconds: float) -> None:
        self._port, self._next, self._lock = port, itertools.cycle(workload), threading.Lock()
        self._left, self._until = requests, time.perf_counter() + seconds
        self.latencies: list[float] = []
        self.sent = self.received = self.failed = 0
        began = time.perf_counter()
        threads = [threading.Thread(target=self._client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.elapsed = time.perf_counter() - began

    def _take(self) -> Question | None:
        with self._lock:
            self._left -= 1
            return next(self._next) if self._left >= 0 and time.perf_counter() < self._until else None

    def _client(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=1800)
        while (question := self._take()) is not None:
            began = time.perf_counter()
            headers = {"Content-Type": "application/json", **question.headers}
            connection.request("POST", "/invocations", question.body, headers)
            answer = connection.getresponse()
            content = answer.read()
            with self._lock:
                self.latencies.append(time.perf_counter() - began)
                self.failed += answer.status != 200
                self.sent += len(question.body)
                self.received += len(content)

    def figures(self) -> dict[str, float]:
        p50, p95, p99 = np.percentile(self.latencies, [50, 95, 99]) * 1000
        n = len(self.latencies)
        return {
            "requests": n,
            "failed": self.failed,
            "per_second": round(n / self.elapsed, 3),
            "p50_ms": round(float(p50), 1),
            "p95_ms": round(float(p95), 1),
            "p99_ms": round(float(p99), 1),
            "request_kb": round(self.sent / n / 1e3, 1),
            "answer_kb": round(self.received / n / 1e3, 1),
        }


def measure(
    port: int, workload: Sequence[Question], clients: int, *, requests: int, seconds: float
) -> dict[str, float]:
    Load(port, workload, clients=1, requests=1, seconds=600)  # imports, compiled kernels
    found = Load(port, workload, clients=clients, requests=requests, seconds=seconds).figures()
    say(f"  {clients:2} clients: {found}")
    return found


def ceiling(model: ResolvedModel, size: str) -> float:
    """Rows a second of the embedder alone, one thread."""
    n_cells, n_genes = SIZES[size]
    rows = cell_rows(read_cells(PBMC, n_genes=n_genes), n_rows=DISTINCT, n_cells=n_cells)
    given = [
        {"x_data": r.matrix.data, "x_indices": r.matrix.indices, "x_indptr": r.matrix.indptr, "adata_obs": r.obs}
        | {"adata_var": r.var}
        for r in rows
    ]
    embedder = load(model)
    for row in given:
        embedder.embed(row, Parameters())
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS / 2:
        embedder.embed(given[n % DISTINCT], Parameters())
        n += 1
    return n / (time.perf_counter() - began)


def compare(args: argparse.Namespace) -> dict[str, object]:
    result: dict[str, object] = {"real_row_500x32738": real_row()}
    say(f"500 real cells x 32,738 genes: {result['real_row_500x32738']}")
    if args.side != "ours":
        with blog() as (port, _):
            for size in args.rows:
                say(f"the blog's wrapper, {size}")
                workload = questions(size, "dense")
                # every client asks at least once, and there are at least four answers
                result[f"blog_{size}"] = {
                    n: measure(port, workload, n, requests=max(n, 4), seconds=1800) for n in args.clients
                }
    if args.side != "blog":
        model = registered()
        for size in args.rows:
            result[f"ceiling_{size}_per_second"] = round(ceiling(model, size), 2)
            say(f"ceiling, {size}: {result[f'ceiling_{size}_per_second']} rows a second")
        with ours(model) as (port, _):
            for size, spelled in itertools.product(args.rows, ("dense", "csr")):
                say(f"ours, {size}, {spelled}")
                workload = questions(size, spelled)
                result[f"ours_{size}_{spelled}"] = {
                    n: measure(port, workload, n, requests=10**9, seconds=SECONDS) for n in args.clients
                }
    return result | ratios(result, args)


def ratios(result: dict, args: argparse.Namespace) -> dict[str, object]:
    """How many times the blog's requests a second, and which share of the ceiling."""
    found: dict[str, object] = {}
    for size, spelled in itertools.product(args.rows, ("dense", "csr")):
        for n in args.clients:
            if args.side is None:
                ratio = result[f"ours_{size}_{spelled}"][n]["per_second"] / result[f"blog_{size}"][n]["per_second"]
                found[f"ratio_{size}_{spelled}_{n}"] = round(ratio, 1)
            if args.side != "blog":
                best = result[f"ceiling_{size}_per_second"]
                share = result[f"ours_{size}_{spelled}"][n]["per_second"] / best
                found[f"share_of_ceiling_{size}_{spelled}_{n}"] = round(share, 2)
    return found


# --- long ones ------------------------------------------------------------------------------------


def quick_questions() -> list[Question]:
    """Small real rows, answered with few genes: many requests in little time."""
    n_cells, n_genes = SIZES["small"]
    cells = read_cells(PBMC, n_genes=n_genes)
    params = {"need_preprocess": False, "genes": cells.var_names[:10].tolist(), "encoding": "float32_base64"}
    workload = []
    for row in cell_rows(cells, n_rows=DISTINCT, n_cells=n_cells):
        csr = {"x_data": row.matrix.data, "x_indices": row.matrix.indices, "x_indptr": row.matrix.indptr}
        workload.append(
            _packed({"dataframe_records": [csr | {"adata_obs": row.obs, "adata_var": row.var}], "params": params})
        )
    return workload


def soak_memory(requests: int, clients: int) -> dict[str, object]:
    """Ask in ten equal parts; the server's resident memory after each."""
    workload, sizes = quick_questions(), []
    with ours(registered()) as (port, process):
        for _ in range(10):
            load = Load(port, workload, clients=clients, requests=requests // 10, seconds=1800)
            sizes.append(resident_mb(process.pid))
            say(f"{load.figures()}, resident {sizes[-1]} MB")
            if load.failed:
                raise SystemExit(f"{load.failed} requests failed")
    return {"requests": requests, "clients": clients, "resident_mb": sizes, "grown_mb": round(sizes[-1] - sizes[1], 1)}


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6, 1)


def soak_log(requests: int, clients: int) -> dict[str, object]:
    """Ask, stop the server, and count the table's rows."""
    with ours(registered()) as (port, _):
        load = Load(port, quick_questions(), clients=clients, requests=requests, seconds=1800)
        say(f"{load.figures()}")
    table = DeltaTable(WORK / "payload")
    ids = table.to_pyarrow_table()["databricks_request_id"]
    return {
        "requests": len(load.latencies),
        "failed": load.failed,
        "clients": clients,
        "rows": len(ids),
        "distinct": len(ids.unique()),
        "commits": table.version(),
        "per_second": load.figures()["per_second"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The blog's wrapper over HTTP against ours.")
    parser.add_argument("--side", choices=["blog", "ours"], help="one side alone")
    parser.add_argument("--rows", nargs="+", choices=list(SIZES), default=list(SIZES), help="sizes of the rows")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32], help="how many ask at once")
    parser.add_argument("--soak", choices=["memory", "log"], help="the long runs, each by itself")
    parser.add_argument("--requests", type=int, help="of a long run (memory: 20,000; log: 10,000)")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if args.soak == "memory":
        result = soak_memory(args.requests or 20_000, 32)
    elif args.soak == "log":
        result = soak_log(args.requests or 10_000, 32)
    else:
        result = compare(args)
    machine = {"cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(machine | result))


if __name__ == "__main__":
    main()
