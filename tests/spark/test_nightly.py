"""The unattended run: killed, doubled, poisoned, planned, streamed, and over samples of several rows."""

import itertools
import os
import re
import sys
import threading
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from unittest.mock import patch

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark import TaskContext
from pyspark.sql import functions as F

from scgpt_batch.cli.main import FAILED, OK, WRONG_USAGE, main
from scgpt_batch.errors import printable
from scgpt_batch.inference.engine import load_embedder
from scgpt_batch.inference.results import warning_kind
from scgpt_batch.io.rows import to_row
from scgpt_batch.parameters import Parameters
from scgpt_batch.spark import embed, tables
from scgpt_batch.spark import pending as missing
from scgpt_batch.spark.isolation import isolates
from scgpt_batch.spark.pending import key_range_filter, n_tasks, pending_rows, with_tasks
from tests.helpers import assert_close, small_rows, write_rows
from tests.paths import DATA

CELLS = ["--mode", "cell", "--need-preprocess", "false", "--data-is-raw", "true"]
KEY = ("adata_id", "cell_id", "mode", "model_version", "params_hash")


@pytest.fixture
def rows(spark, tmp_path, golden):
    """Twelve rows of three cells."""
    table = f"delta.`{tmp_path}/rows`"
    write_rows(spark, small_rows(12, golden), table)
    return table


@pytest.fixture
def words(tmp_path, model, rows):
    """The command's words: waves of four rows."""
    out = f"delta.`{tmp_path}/out`"
    return ["embed", "--model-uri", model, "--input-table", rows, "--output-table", out, "--wave-cells", "12", *CELLS]


def assert_each_cell_once(spark, folder, *, cells=36, rows=12):
    out = spark.table(f"delta.`{folder}/out`")
    assert out.count() == cells
    assert out.groupBy(*KEY).count().where("count > 1").count() == 0
    ledger = spark.table(f"delta.`{folder}/out_ledger`")
    assert ledger.count() == ledger.select("adata_id").distinct().count() == rows


def test_lost_worker_repeats_the_wave(spark, run, tmp_path, words, monkeypatch):
    static_vectors, fallen = embed.static_vectors, tmp_path / "fallen"

    def die_once(model):
        give = static_vectors(model)

        def run(batches):
            if not fallen.exists():
                fallen.touch()
                os._exit(1)
            yield from give(batches)

        return run

    monkeypatch.setattr(embed, "static_vectors", die_once)
    code, summary, err = run(*words, "--mode", "static", "--wave-cells", 36)
    assert (code, summary["rows_ok"]) == (OK, 12), err
    assert fallen.exists()
    out = spark.table(f"delta.`{tmp_path}/out`")
    assert out.count() == summary["embeddings"] == out.select("adata_id", "gene").distinct().count()


def test_run_killed_between_commits_is_completed(spark, run, tmp_path, words, monkeypatch):
    replace, lines = tables.replace, []

    def die(rows, table, condition):
        if table.endswith("_ledger`"):
            lines.append(table)
            if len(lines) == 2:
                raise OSError("no space left on device")
        replace(rows, table, condition)

    monkeypatch.setattr(tables, "replace", die)
    code, _, err = run(*words)
    assert code == FAILED and "no space left" in err.strip().splitlines()[-1] and "Traceback" not in err
    monkeypatch.undo()
    assert spark.table(f"delta.`{tmp_path}/out`").count() == 24  # two waves; the ledger knows of one

    code, told, _ = run(*words)
    assert (code, told["rows_ok"], told["rows_skipped"]) == (OK, 8, 4)
    assert_each_cell_once(spark, tmp_path)
    status = {r["status"] for r in spark.table(f"delta.`{tmp_path}/out_runs`").collect()}
    assert status == {"failed", "finished"}


def test_concurrent_runs_produce_the_tables_of_one(spark, tmp_path, words):
    codes = []
    both = [threading.Thread(target=lambda: codes.append(main([*words]))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert codes == [OK, OK]
    assert_each_cell_once(spark, tmp_path)


def test_plan_counts_pending_rows_and_writes_nothing(spark, run, tmp_path, words):
    code, plan, _ = run(*words, "--plan")
    assert (code, plan["rows"], plan["cells"], plan["waves"], plan["partitions"]) == (OK, 12, 36, 3, 12)
    assert plan["seconds_expected"] is None and not (tmp_path / "out").exists()
    run(*words)
    again = run(*words, "--plan", "--seed", "1")[1]
    assert again["rows"] == 12 and again["seconds_expected"] > 0
    assert run(*words, "--plan")[1]["rows"] == 0


def status(spark):
    """Where Spark tells of its last 1,000 queries, all that have ended among them."""
    spark.sparkContext._jsc.sc().listenerBus().waitUntilEmpty()
    return spark._jsparkSession.sharedState().statusStore()


def last_query(spark):
    """The number of the last query."""
    return status(spark).executionsList().last().executionId()


def queries(spark, since):
    """What Spark tells of the queries after number `since`, in their order."""
    told, found = status(spark).executionsList(), []
    for i in reversed(range(told.size())):
        query = told.apply(i)
        if query.executionId() <= since:
            break
        found.append(query)
    return found[::-1]


def scanned(spark, since):
    """Columns that queries after number `since` have read from Parquet, by folder."""
    plans = [query.physicalPlanDescription() for query in queries(spark, since)]
    columns = defaultdict(set)
    scan = r"Location: [^\n]*/(\w+)\]\n(?:[^\n]+\n)*?ReadSchema: struct<(.*)>"
    for folder, read in re.findall(scan, "\n".join(plans)):
        assert "..." not in read  # Spark has cut it short
        columns[folder] |= {column.partition(":")[0] for column in read.split(",")}
    return columns


def test_run_without_pending_rows_reads_no_payload(spark, run, tmp_path, words, rows):
    spark.sql(f"UPDATE {rows} SET content_hash = md5(adata_id)")  # as ingest does; without, payload must be hashed
    run(*words)
    before = last_query(spark)
    assert run(*words)[1]["rows_skipped"] == 12
    columns = scanned(spark, before)
    assert {"adata_id"} < columns["rows"] <= {"adata_id", "content_hash", "n_obs", "sample_id", "ingested_at"}
    assert {"adata_id"} < columns["out_ledger"] and "embedding" not in columns["out"]


def payload_files(spark, since):
    """How many files of the input each query after number `since` has read payload from."""
    store, files = status(spark), []
    for query in queries(spark, since):
        if "x_data" in query.physicalPlanDescription():
            nodes = store.planGraph(query.executionId()).allNodes()
            values = store.executionMetrics(query.executionId())
            for node in (nodes.apply(i) for i in range(nodes.size())):
                metrics = node.metrics()
                for metric in (metrics.apply(i) for i in range(metrics.size())):
                    counted = metric.name() == "number of files read" and values.contains(metric.accumulatorId())
                    if counted and re.search("ReadSchema.*x_data", node.desc()):
                        files.append(int(values.apply(metric.accumulatorId())))
    return files


def test_a_wave_reads_the_payload_of_its_own_files(spark, run, tmp_path, words, golden):
    """Three commits of four rows, told apart by their time alone and a wave each; then one of two new rows."""
    table = f"delta.`{tmp_path}/table`"
    words[words.index("--input-table") + 1] = table
    made = [row | {"content_hash": row["adata_id"]} for row in small_rows(14, golden)]
    made[12]["adata_id"] = "a-new-one"
    parts = [*(made[i:12:3] for i in range(3)), made[12:]]
    parts = [[row | {"ingested_at": datetime(2026, 1, day)} for row in part] for day, part in enumerate(parts, 1)]
    for part in parts[:3]:
        write_rows(spark, part, table)
    files = len(spark.table(table).inputFiles())
    before = last_query(spark)
    assert run(*words)[1]["rows_ok"] == 12
    assert payload_files(spark, before) == [files // 3] * 3
    write_rows(spark, parts[3], table)
    before = last_query(spark)
    assert run(*words)[1]["rows_ok"] == 2
    assert payload_files(spark, before) == [len(spark.table(table).inputFiles()) - files]


def test_rows_without_time_are_read_by_key_range(spark, tmp_path, golden):
    table, made = f"delta.`{tmp_path}/table`", list(small_rows(12, golden))
    for part in (made[:4], made[4:8], made[8:]):
        write_rows(spark, part, table)
    rows = tables.read(spark, table, tables.ADATA_ROWS)
    files = len(spark.table(table).inputFiles())
    pending = pending_rows(rows, spark.createDataFrame([], tables.LEDGER), counts=F.lit(True), samples=True, name=table)
    for wave, part in zip(pending.waves(12), (made[:4], made[4:8], made[8:]), strict=True):
        before = last_query(spark)
        near = rows.where(key_range_filter(wave)).select("adata_id", F.size("x_data")).collect()
        assert sorted(row["adata_id"] for row in near) == [row["adata_id"] for row in part]
        assert payload_files(spark, before) == [files // 3]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_waves_are_bounded_and_start_with_the_largest_row(data):
    n = data.draw(st.integers(1, 40))

    def column(values):
        return data.draw(st.lists(values, min_size=n, max_size=n))

    pending = pd.DataFrame(
        {
            "adata_id": [f"row-{i:02}" for i in range(n)],
            "cells": column(st.integers(1, 30)),
            "sample": column(st.sampled_from([None, None, "a", "b"])),
            "ingested_at": pd.array(column(st.sampled_from([None, 1, 2])), "Int64"),
        }
    ).sort_values("cells", ascending=False)
    with patch.object(missing, "WAVE_ROWS", 5):
        waves = list(missing.PendingRows(n, pending).waves(40))
    assert sorted(name for wave in waves for name in wave["adata_id"]) == sorted(pending["adata_id"])
    assert waves[0]["cells"].max() == pending["cells"].max()
    ranges = []
    for wave in waves:
        alone = wave["sample"].isna()
        one_sample = wave["sample"].nunique() == 1 and not alone.any()
        assert (wave["cells"].sum() <= 40 and len(wave) <= 5) or len(wave) == 1 or one_sample
        assert alone.all() or not alone.any()
        if alone.all():
            places = [
                (-1 if at is pd.NA else at, name)
                for at, name in zip(wave["ingested_at"], wave["adata_id"], strict=True)
            ]
            ranges.append((min(places), max(places)))
    for (_, last), (first, _) in itertools.pairwise(sorted(ranges)):
        assert last < first
    for _, sample in pending.dropna(subset="sample").groupby("sample"):
        assert sum(wave["adata_id"].isin(sample["adata_id"]).any() for wave in waves) == 1


def test_stream_embeds_new_rows_only(spark, run, tmp_path, words, rows, golden):
    words = [*words, "--trigger", "available-now", "--checkpoint-location", str(tmp_path / "checkpoint")]
    assert run(*words)[1]["rows_ok"] == 12
    more = [row | {"adata_id": f"new-{i}"} for i, row in enumerate(small_rows(2, golden, seed=5))]
    write_rows(spark, more, rows)
    told = run(*words)[1]
    assert (told["rows_in"], told["rows_ok"], told["cells"]) == (2, 2, 6)
    assert_each_cell_once(spark, tmp_path, cells=42, rows=14)


def test_trigger_needs_a_checkpoint(run, words):
    code, _, err = run(*words, "--trigger", "available-now")
    assert code == WRONG_USAGE and "checkpoint_location" in err


def test_tasks_are_even_and_have_own_partitions(spark):
    sizes = [4000, *[300] * 20]
    pending = spark.createDataFrame(
        [(f"r{i}", n, None, None, None) for i, n in enumerate(sizes)],
        "adata_id string, n_obs int, content_hash string, sample_id string, ingested_at timestamp",
    )
    nothing = spark.createDataFrame([], tables.LEDGER)
    (wave,) = pending_rows(pending, nothing, counts=F.lit(True), samples=False, name="t").waves(1_000_000)
    n = n_tasks(wave)
    tasks = with_tasks(spark, wave).join(pending, "adata_id").repartition(n, "task")
    cells = tasks.groupBy(F.spark_partition_id().alias("p")).agg(F.sum("n_obs").alias("n")).orderBy(F.desc("n"))
    found = [row["n"] for row in cells.collect()]
    assert len(found) == n and found[0] == 4000 and max(found[1:]) - min(found[1:]) <= 300


def test_rows_of_a_sample_share_decisions_and_means(spark, run, tmp_path, model, golden, pbmc3k):
    embedder = load_embedder(golden / "checkpoint_flash")
    known = [name for name in pbmc3k.var_names if name in embedder.vocabulary]
    cells = pbmc3k[:90, known].copy()
    parts = [
        to_row(cells[part]) | {"adata_id": f"part-{i}", "sample_id": "donor"}
        for i, part in enumerate(np.array_split(np.arange(90), 3))
    ]
    alone = to_row(pbmc3k[90:120, known].copy()) | {"adata_id": "alone", "sample_id": None}
    table, out = f"delta.`{tmp_path}/samples`", f"delta.`{tmp_path}/out`"
    write_rows(spark, [*parts, alone], table)
    choice = {"mode": "contextual", "data_is_raw": True, "hvg_flavor": "seurat_v3", "subset_hvg": 30}
    words = ["embed", "--model-uri", model, "--input-table", table, "--output-table", out]
    words += ["--mode", "contextual", "--data-is-raw", "true", "--hvg-flavor", "seurat_v3", "--subset-hvg", "30"]
    code, told, err = run(*words)
    assert (code, told["rows_ok"], told["rows_failed"]) == (OK, 4, 0), err
    joined = to_row(ad.AnnData(cells.X, obs=cells.obs, var=cells.var))
    for key, row in {"donor": joined, "alone": alone}.items():
        wanted = embedder.embed(row, Parameters(**choice))
        lines = spark.table(out).where(F.col("adata_id") == key).toPandas().set_index("gene")
        assert sorted(lines.index) == sorted(wanted.genes)
        assert_close(np.stack(lines.loc[wanted.genes, "embedding"]), wanted.gene_embeddings, atol=1e-5)
        assert lines.loc[wanted.genes, "n_cells"].tolist() == wanted.n_cells.tolist()
    assert spark.table(out).select("adata_id").distinct().count() == 2
    assert run(*words)[1]["rows_skipped"] == 4

    write_rows(spark, [to_row(pbmc3k[120:130, known].copy()) | {"adata_id": "part-3", "sample_id": "donor"}], table)
    assert (told := run(*words)[1])["rows_ok"] == 4 and told["rows_skipped"] == 1
    lines = spark.table(out).where("adata_id = 'donor'")
    assert lines.count() == lines.select("gene").distinct().count()


def deadly(function, folder, bad):
    """A worker's function that dies with a row unless it isolates rows, and notes the rows that it does isolate.

    It dies when two other tasks have begun: on two cores, one of them has ended.
    """

    def make(*args):
        run = function(*args)

        def die(batches):
            (folder / f"task-{TaskContext.get().partitionId()}").touch()
            for batch in batches:
                ids = batch.column(bad[0]).to_pylist()
                if isolates():
                    for name in ids:
                        (folder / name).touch()
                elif bad[1] in ids:
                    while len(list(folder.glob("task-*"))) < 3:
                        time.sleep(0.05)
                    os._exit(1)
                yield from run([batch])

        return die

    return make


def test_only_the_task_of_a_deadly_row_is_isolated(spark, run, tmp_path, words, monkeypatch):
    monkeypatch.setattr(embed, "embed_rows", deadly(embed.embed_rows, tmp_path, ("adata_id", "good-005")))
    code, told, err = run(*words, "--wave-cells", 36)
    assert (code, told["rows_ok"]) == (OK, 12), err
    isolated = {path.name for path in tmp_path.glob("good-*")}
    assert "good-005" in isolated and len(isolated) < 12
    assert spark.table(f"delta.`{tmp_path}/out`").count() == 36


def test_workers_without_the_package_fail_the_run(spark, run, tmp_path, words, monkeypatch, caplog):
    """A real worker whose Python sees the libraries, but not this package."""
    python = tmp_path / "python"
    libraries = Path(np.__file__).parents[1]  # on PYTHONPATH its .pth files, which name this package, do not count
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{libraries}" exec "{sys.executable}" -S -P "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(spark.sparkContext, "pythonExec", str(python))
    code, _, err = run(*words)
    last = err.strip().splitlines()[-1]
    assert code == WRONG_USAGE and "No module named 'scgpt_batch'" in last and "PYSPARK_PYTHON" in last
    (told,) = spark.table(f"delta.`{tmp_path}/out_runs`").collect()
    assert told["status"] == "failed" and "a Python worker was lost" not in caplog.text
    cells = DATA / "pbmc3k.h5ad"
    code, _, err = run("ingest", "--input", cells, "--table", f"delta.`{tmp_path}/cells`")
    last = err.strip().splitlines()[-1]
    assert code == WRONG_USAGE and "No module named 'scgpt_batch'" in last and "PYSPARK_PYTHON" in last


def test_warnings_are_counted_by_kind(spark, run, words, rows, caplog):
    """Values that are no counts, in three rows of twelve."""
    spark.sql(f"UPDATE {rows} SET x_data = transform(x_data, x -> x / 2) WHERE adata_id < 'good-003'")
    told = run(*words)[1]
    assert list(told["warnings"].values()) == [3]
    assert f"3 rows have a warning: {next(iter(told['warnings']))}" in caplog.messages


@pytest.mark.parametrize(
    ("warning", "kind"),
    [
        ("12 of 1,000 cells carry no gene: what they give is that of <cls>", "N of N cells carry no gene"),
        ("genes asked for are missing: CD3D, B2M", "genes asked for are missing"),
        ("'obs.x' has 3.5 nulls", "… has N nulls"),
        ("CD3D and HLA-A2 are left out (2 columns)", "CD3D and HLA-A2 are left out"),
    ],
)
def test_warning_kind_omits_names_and_numbers(warning, kind):
    assert warning_kind(warning) == kind


def test_an_id_cannot_forge_a_log_line():
    assert printable("row\n2026 ERROR forged\x1b[0m\u2028ü") == "row\\n2026 ERROR forged\\x1b[0m\\u2028ü"
