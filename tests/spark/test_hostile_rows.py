"""Rows as an attacker would write them, through `embed`: each fails alone, in bounded time and memory.

Files by the same author come in through `ingest`.
"""

import json
import threading
import time
from contextlib import contextmanager

import numpy as np
import pandas as pd
import psutil
import pytest
from pyspark.sql import functions as F

from scgpt_batch.cli.main import OK
from scgpt_batch.inference.engine import load_embedder
from scgpt_batch.parameters import Parameters
from scgpt_batch.spark import tables
from scgpt_batch.spark.pending import n_tasks, pending_rows
from tests.helpers import assert_close, random_adata, small_rows, write_rows

CAP = 2_500_000_000  # bytes of a Python worker, of which libraries take 700 MB
SECONDS = 900  # of the whole run, which takes 200 on two busy cores
FORGED = "id'`\"\\ ${env:HOME}\n2026-01-01 00:00:00,000 ERROR forged\r\x1b[2K\x1b[1A"
LONG = "x" * 1_000_000


def split(index, **columns):
    """A table as pandas' JSON, orient="split"."""
    data = [list(row) for row in zip(*columns.values(), strict=True)] or [[] for _ in index]
    return json.dumps({"columns": list(columns), "index": index, "data": data})


def labels(label):
    return split(["a", "b", "c"], donor=["d", "d", label])


def genes(row, name):
    return split([*json.loads(row["adata_var"])["index"][:-1], name])


# adata_id: (the columns that are spoilt, what the ledger says)
HOSTILE = {
    "wide obs": (
        lambda row: {"adata_obs": split(["a", "b", "c"], **{str(i): [0] * 3 for i in range(300_000)})},
        "adata_obs has 300,000 columns; the limit is 10,000",
    ),
    "deep obs": (lambda row: {"adata_obs": "[" * 1_000_000}, "adata_obs is not JSON: maximum recursion depth"),
    "deep var": (lambda row: {"adata_var": '{"columns":' * 100_000}, "adata_var is not JSON: maximum recursion"),
    "huge number": (lambda row: {"adata_obs": labels(0).replace("0", "9" * 1_000_000)}, "adata_obs is not JSON"),
    "indptr beyond data": (
        lambda row: {"x_indptr": [0, 1, 2, 2**40]},
        "x_indptr ends at 1099511627776, but x_data has",
    ),
    "indptr negative": (lambda row: {"x_indptr": [0, -(2**40), 2, 3]}, "x_indptr must start at 0 and never decrease"),
    "indptr overflowing": (
        lambda row: {
            "x_indptr": [0, 2**63 - 1, -(2**63), -1, len(row["x_data"])],
            "adata_obs": split(["a", "b", "c", "d"], donor=["d"] * 4),
            "n_obs": 4,
        },
        "x_indptr must start at 0 and never decrease",
    ),
    "indices beyond genes": (
        lambda row: {"x_indices": [*row["x_indices"][:-1], 2**31 - 1]},
        "x_indices contains 2147483647, but the genes of adata_var are 0 to 39",
    ),
    "indices negative": (
        lambda row: {"x_indices": [-(2**31), *row["x_indices"][1:]]},
        "x_indices contains -2147483648",
    ),
    "infinity": (lambda row: {"x_data": [float("inf"), *row["x_data"][1:]]}, "x_data contains NaN or infinity"),
    "NaN": (lambda row: {"x_data": [float("nan"), *row["x_data"][1:]]}, "x_data contains NaN or infinity"),
    "n_obs negative": (lambda row: {"n_obs": -(2**31)}, "n_obs is -2147483648, but adata_obs has 3 rows"),
    "n_obs huge": (lambda row: {"n_obs": 2**31 - 1}, "n_obs is 2147483647, but adata_obs has 3 rows"),
    "n_vars negative": (lambda row: {"n_vars": -1}, "n_vars is -1, but adata_var has 40 rows"),
    "n_vars huge": (lambda row: {"n_vars": 2**31 - 1}, "n_vars is 2147483647, but adata_var has 40 rows"),
    "long cell name": (
        lambda row: {"adata_obs": split(["a", "b", LONG], donor=["d"] * 3)},
        "adata_obs contains a name of 1,000,000 characters ('xxx",
    ),
    "long label": (lambda row: {"adata_obs": labels(LONG)}, "column 'donor' contains a label of 1,000,000 characters"),
    "long gene name": (lambda row: {"adata_var": genes(row, LONG)}, "adata_var contains a name of 1,000,000"),
    "long type": (lambda row: {"x_dtype": LONG}, "x_dtype is 'xxx"),
    "many values of nothing": (lambda row: {"adata_obs": "[" + "{}," * 10_000_000 + "{}]"}, "adata_obs must be pandas"),
    "i" * 1_000_000: (lambda row: {}, "adata_id contains a key of 1,000,000 characters"),
    FORGED: (lambda row: {"x_data": [-1.0, *row["x_data"][1:]]}, "x_data contains negative values"),
    "forged gene": (
        lambda row: {"adata_var": genes(row, FORGED), "x_data": [-1.0] * len(row["x_data"])},
        "x_data contains negative values",
    ),
}


@contextmanager
def watched_workers(cap):
    """The largest resident size of a Python worker of Spark; one beyond the cap is killed."""
    seen, done = [0], threading.Event()

    def watch():
        while not done.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "pyspark.daemon" in " ".join(process.cmdline()):
                        seen[0] = max(seen[0], size := process.memory_info().rss)
                        if size > cap:
                            process.kill()
                except psutil.Error:
                    continue

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield seen
    finally:
        done.set()
        watching.join()


@pytest.fixture
def rows(golden):
    """Four good rows, and a hostile one of each kind."""
    good = [row | {"adata_obs": labels("e")} for row in small_rows(4, golden)]
    plain = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in good[0].items()}
    return good, [plain | spoil(plain) | {"adata_id": key} for key, (spoil, _) in HOSTILE.items()]


def test_hostile_rows_fail_alone_in_bounded_time_and_memory(spark, run, tmp_path, model, golden, rows, caplog):
    good, hostile = rows
    table, out = f"delta.`{tmp_path}/rows`", f"delta.`{tmp_path}/out`"
    write_rows(spark, [*good, *hostile], table)
    words = ["embed", "--model-uri", model, "--input-table", table, "--output-table", out, "--mode", "contextual"]
    words += ["--group-by", "donor", "--need-preprocess", "false", "--max-failed-fraction", "1"]
    began = time.monotonic()
    with watched_workers(CAP) as largest:
        code, summary, err = run(*words)
    seconds = time.monotonic() - began
    assert (code, summary["rows_ok"], summary["rows_failed"]) == (OK, len(good), len(HOSTILE)), err[-3000:]
    assert seconds < SECONDS and 0 < largest[0] < CAP, (seconds, largest)

    failed = spark.table(f"delta.`{tmp_path}/out_ledger`").where("status = 'failed'").collect()
    found = {line["adata_id"]: line for line in failed}
    assert found.keys() == HOSTILE.keys()
    for key, (_, wanted) in HOSTILE.items():
        assert found[key]["error_class"] == "PayloadError", (key[:99], found[key]["error_message"])
        message = found[key]["error_message"]
        assert wanted in message and len(message) <= 2_000 and message.isprintable(), (key[:99], message[:500])

    embedder = load_embedder(golden / "checkpoint_flash")
    lines = spark.table(out).toPandas().set_index(["adata_id", "group", "gene"])
    assert set(lines.index.get_level_values(0)) == {row["adata_id"] for row in good}
    for row in good:
        answer = embedder.embed(row, Parameters(mode="contextual", group_by="donor", need_preprocess=False))
        keys = [(row["adata_id"], group, gene) for group, gene in zip(answer.groups, answer.genes, strict=True)]
        assert_close(np.stack(lines.loc[keys, "embedding"]), answer.gene_embeddings, atol=1e-5)

    logged = [*caplog.messages, *err.splitlines()]
    assert not [line for line in logged if line.startswith("2026-01-01") or "\x1b" in line or len(line) > 10_000]


@pytest.mark.parametrize("n_obs", ["-3", "cast('NaN' AS double)", "cast('Infinity' AS double)", "1e300", "10L"])
def test_impossible_n_obs_still_plans_waves(spark, n_obs):
    """Tables that others wrote may hold any number type."""
    rows = spark.range(3).selectExpr(
        "cast(id AS string) AS adata_id", f"if(id = 0, {n_obs}, 3) AS n_obs", "'hash' AS content_hash",
        "cast(null AS string) AS sample_id", "cast(null AS timestamp) AS ingested_at",
    )  # fmt: skip
    nothing = spark.createDataFrame([], tables.LEDGER)
    pending = pending_rows(rows, nothing, counts=F.lit(True), samples=False, name="t")
    (wave,) = pending.waves(2_000)
    assert sorted(wave["cells"]) == [3, 3, 10 if n_obs == "10L" else 1_000]
    assert n_tasks(wave) == 3


def test_a_file_with_a_long_label_fails_alone_in_ingest(spark, run, tmp_path):
    for name, label in {"good": "d", "bad": "x" * 1_001}.items():
        adata = random_adata(4, 5)
        adata.obs["donor"] = pd.Categorical([label, "d", "d", "d"])
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    table = f"delta.`{tmp_path}/rows`"
    words = ["--input", tmp_path / "*.h5ad", "--table", table, "--split-by", "donor", "--max-failed-fraction", "1"]
    code, summary, err = run("ingest", *words)
    assert (code, summary["rows"], summary["files_failed"]) == (OK, 1, 1), err
    (line,) = spark.table(summary["files_table"]).where("status = 'failed'").collect()
    assert "column 'donor' contains a label of 1,001 characters" in line["error_message"]


def test_labels_with_any_characters_are_kept(spark, run, tmp_path, model, golden):
    """As labels that split and name rows, as samples and as groups; the column's own name is as odd."""
    odd = ["o'brien", 'a"b`c', "back\\slash\\", "${env:HOME}", "$spark", FORGED, "a;--", "é\u2028ü", "%s{}", "a=b&c/.."]
    genes = json.loads(next(iter(small_rows(1, golden)))["adata_var"])["index"]
    adata = random_adata(2 * len(odd), len(genes), genes=genes)
    adata.obs[FORGED] = odd * 2
    adata.write_h5ad(tmp_path / "f.h5ad")
    table, out = f"delta.`{tmp_path}/rows`", f"delta.`{tmp_path}/out`"
    words = ["--input", tmp_path / "f.h5ad", "--table", table, "--split-by", FORGED, "--sample-id", FORGED]
    code, summary, err = run("ingest", *words)
    assert (code, summary["rows"]) == (OK, len(odd)), err
    assert {row["sample_id"] for row in spark.table(table).collect()} == set(odd)
    words = ["--input-table", table, "--output-table", out, "--mode", "contextual", "--group-by", FORGED]
    for skipped in (0, len(odd)):
        code, summary, err = run("embed", "--model-uri", model, *words, "--need-preprocess", "false")
        assert (code, summary["rows_ok"], summary["rows_skipped"]) == (OK, len(odd) - skipped, skipped), err
    lines = spark.table(out).select("adata_id", "group").distinct().collect()
    assert {tuple(line) for line in lines} == {(name, name) for name in odd}
