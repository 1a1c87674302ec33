"""The unattended run: killed, concurrent, with a deadly row, planned, and as a stream."""

import logging
import os
import re
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from pyspark import TaskContext
from pyspark.sql import functions as F

from scgpt_batch.cli.main import FAILED, OK, WRONG_USAGE, main
from scgpt_batch.spark import tables, wave, work_to_do
from scgpt_batch.spark.isolation import isolates
from scgpt_batch.spark.pending import key_range_filter, n_tasks, pending_rows, with_tasks
from tests.helpers import CELL, small_rows, summary_of, write_rows
from tests.paths import DATA

KEY = ("adata_id", "cell_id", "mode", "model_version", "params_hash")


WAVES = ["--wave-cells", "12"]  # waves of four rows
IDLE_JOBS, SEARCH_JOBS, FIRST_JOBS = 9, 40, 50  # most Spark jobs of a run: nothing new, nothing pending, all pending


@pytest.fixture(scope="module")
def rows(spark, home, golden):
    """Twelve rows of three cells, with the hash that ingest gives; the values of the first three are no counts."""
    table = f"delta.`{home}/rows`"
    made = [row | {"content_hash": row["adata_id"]} for row in small_rows(12, golden)]
    for row in made[:3]:
        row["x_data"] = row["x_data"] / 2
    write_rows(spark, made, table)
    return table


@dataclass(frozen=True)
class Embedded:
    """A run: the command's words, its JSON line and what it logged."""

    words: list[str]
    summary: dict
    logged: list[str]


@pytest.fixture(scope="module")
def embedded(home, model, rows):
    """A run over the twelve rows."""
    words = ["embed", "--model-uri", model, "--input-table", rows, "--output-table", f"delta.`{home}/out`", *CELL]
    logged = []
    handler, job_log = logging.Handler(), logging.getLogger("scgpt_batch.spark")
    handler.emit = lambda record: logged.append(record.getMessage())
    job_log.addHandler(handler)
    try:
        summary = summary_of(*words)
    finally:
        job_log.removeHandler(handler)
    return Embedded(words, summary, logged)


@pytest.fixture
def own_rows(spark, tmp_path, golden, words):
    """Twelve rows of three cells for a test that changes them, as the input of `words`."""
    table = f"delta.`{tmp_path}/rows`"
    write_rows(spark, small_rows(12, golden), table)
    words[words.index("--input-table") + 1] = table
    return table


@pytest.fixture
def words(tmp_path, model, rows):
    """The command's words: one wave, into tables of the test's own."""
    out = f"delta.`{tmp_path}/out`"
    return ["embed", "--model-uri", model, "--input-table", rows, "--output-table", out, *CELL]


def assert_each_cell_once(spark, folder, *, cells=36, rows=12):
    out = spark.table(f"delta.`{folder}/out`")
    assert out.count() == cells
    assert out.groupBy(*KEY).count().where("count > 1").count() == 0
    ledger = spark.table(f"delta.`{folder}/out_ledger`")
    assert ledger.count() == ledger.select("adata_id").distinct().count() == rows


def test_lost_worker_repeats_the_wave(spark, run, tmp_path, words, monkeypatch):
    static_vectors, fallen = wave.static_vectors, tmp_path / "fallen"

    def die_once(model):
        give = static_vectors(model)

        def run(batches):
            if not fallen.exists():
                fallen.touch()
                os._exit(1)
            yield from give(batches)

        return run

    monkeypatch.setattr(wave, "static_vectors", die_once)
    code, summary, err = run(*words, "--mode", "static")
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
    code, _, err = run(*words, *WAVES)
    assert code == FAILED and "no space left" in err.strip().splitlines()[-1] and "Traceback" not in err
    monkeypatch.undo()
    assert spark.table(f"delta.`{tmp_path}/out`").count() == 24  # two waves; the ledger knows of one

    code, summary, _ = run(*words, *WAVES)
    assert (code, summary["rows_ok"], summary["rows_skipped"]) == (OK, 8, 4)
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


def test_plan_counts_pending_rows_and_writes_nothing(run, tmp_path, words):
    code, plan, _ = run(*words, *WAVES, "--plan")
    assert (code, plan["rows"], plan["cells"], plan["waves"], plan["partitions"]) == (OK, 12, 36, 3, 12)
    assert plan["seconds_expected"] >= 0 and not (tmp_path / "out").exists()
    assert [each["compute"] for each in plan["capacity"]][:3] == ["2 CPU cores", "1 × T4", "8 × T4"]


def test_plan_after_a_run_expects_its_rate(spark, run, home, embedded):
    again = run(*embedded.words, "--plan", "--seed", "1")[1]
    assert again["rows"] == 12 and again["capacity"][0]["source"] == "measured"  # 36 cells do not tell the rate
    assert run(*embedded.words, "--plan")[1]["rows"] == 0
    spark.sql(f"UPDATE delta.`{home}/out_runs` SET cells = 5000, seconds = 10")
    first = run(*embedded.words, "--plan", "--seed", "1")[1]["capacity"][0]
    assert (first["cells_per_second"], first["compute"]) == (500, "as last run")


def status(spark):
    """Spark's store of its last 1,000 queries, after all that have ended were added."""
    spark.sparkContext._jsc.sc().listenerBus().waitUntilEmpty()
    return spark._jsparkSession.sharedState().statusStore()


def last_query(spark):
    """The number of the last query."""
    return status(spark).executionsList().last().executionId()


def queries(spark, since):
    """The queries after number `since`, in order."""
    executions, found = status(spark).executionsList(), []
    for i in reversed(range(executions.size())):
        query = executions.apply(i)
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


def test_run_without_pending_rows_reads_no_payload(spark, run, embedded):
    before = last_query(spark)
    again = run(*embedded.words, "--retry-failed")[1]  # which always searches
    assert (again["rows_in"], again["rows_ok"], again["rows_skipped"], again["embeddings"]) == (12, 0, 12, 0)
    columns = scanned(spark, before)
    assert {"adata_id"} < columns["rows"] <= {"adata_id", "content_hash", "n_obs", "sample_id", "ingested_at"}
    assert {"adata_id"} < columns["out_ledger"] and "embedding" not in columns["out"]


def jobs_so_far(spark):
    return spark.sparkContext._jsc.sc().dagScheduler().numTotalJobs()


def test_idle_run_starts_few_spark_jobs_and_searches_nothing(spark, run, words, monkeypatch):
    run(*words)
    monkeypatch.setattr(work_to_do, "pending_rows", None)  # fails if it is called
    monkeypatch.setattr(work_to_do, "vanished", None)
    for _ in range(2):
        before = jobs_so_far(spark)
        code, summary, err = run(*words)
        assert (code, summary["rows_in"], summary["rows_skipped"]) == (OK, 12, 12), err
        assert jobs_so_far(spark) - before <= IDLE_JOBS


def test_run_that_is_not_idle_starts_a_bounded_number_of_spark_jobs(spark, run, words):
    before = jobs_so_far(spark)
    assert run(*words)[1]["rows_ok"] == 12
    first = jobs_so_far(spark)
    assert run(*words, "--retry-failed")[1]["rows_skipped"] == 12
    assert (first - before <= FIRST_JOBS, jobs_so_far(spark) - first <= SEARCH_JOBS) == (True, True)


@pytest.mark.parametrize(
    ("change", "rows_ok"),
    [
        ("DELETE FROM delta.`{0}/out_ledger` WHERE adata_id = 'good-001'", 1),
        ("UPDATE delta.`{0}/rows` SET content_hash = 'x' WHERE adata_id = 'good-001'", 1),
        ("UPDATE delta.`{0}/out_runs` SET status = 'running'", 0),
    ],
)
def test_changed_tables_are_searched_again(spark, run, tmp_path, words, own_rows, change, rows_ok):
    spark.sql(f"UPDATE {own_rows} SET content_hash = md5(adata_id)")
    run(*words)
    spark.sql(change.format(tmp_path))
    before = jobs_so_far(spark)
    assert run(*words)[1]["rows_ok"] == rows_ok
    assert jobs_so_far(spark) - before > IDLE_JOBS


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
    """Three commits of four rows, which differ in time only and are a wave each; then one of two new rows."""
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
    assert run(*words, *WAVES)[1]["rows_ok"] == 12
    assert payload_files(spark, before) == [files // 3] * 3
    write_rows(spark, parts[3], table)
    before = last_query(spark)
    assert run(*words, *WAVES)[1]["rows_ok"] == 2
    assert payload_files(spark, before) == [len(spark.table(table).inputFiles()) - files]


def test_rows_without_time_are_read_by_key_range(spark, tmp_path, golden):
    table, made = f"delta.`{tmp_path}/table`", list(small_rows(12, golden))
    for part in (made[:4], made[4:8], made[8:]):
        write_rows(spark, part, table)
    rows = tables.read(spark, table, tables.ADATA_ROWS)
    files = len(spark.table(table).inputFiles())
    pending = pending_rows(rows, spark.createDataFrame([], tables.LEDGER), counts=F.lit(True), samples=True, name=table)
    for one, part in zip(pending.waves(12), (made[:4], made[4:8], made[8:]), strict=True):
        before = last_query(spark)
        near = rows.where(key_range_filter(one)).select("adata_id", F.size("x_data")).collect()
        assert sorted(row["adata_id"] for row in near) == [row["adata_id"] for row in part]
        assert payload_files(spark, before) == [files // 3]


def test_stream_embeds_new_rows_only(spark, run, tmp_path, words, own_rows, golden):
    words = [*words, "--trigger", "available-now", "--checkpoint-location", str(tmp_path / "checkpoint")]
    assert run(*words)[1]["rows_ok"] == 12
    more = [row | {"adata_id": f"new-{i}"} for i, row in enumerate(small_rows(2, golden, seed=5))]
    write_rows(spark, more, own_rows)
    summary = run(*words)[1]
    assert (summary["rows_in"], summary["rows_ok"], summary["cells"]) == (2, 2, 6)
    assert_each_cell_once(spark, tmp_path, cells=42, rows=14)


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
    monkeypatch.setattr(wave, "embed_rows", deadly(wave.embed_rows, tmp_path, ("adata_id", "good-005")))
    code, summary, err = run(*words)
    assert (code, summary["rows_ok"]) == (OK, 12), err
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
    (line,) = spark.table(f"delta.`{tmp_path}/out_runs`").collect()
    assert line["status"] == "failed" and "a Python worker was lost" not in caplog.text
    cells = DATA / "pbmc3k.h5ad"
    code, _, err = run("ingest", "--input", cells, "--table", f"delta.`{tmp_path}/cells`")
    last = err.strip().splitlines()[-1]
    assert code == WRONG_USAGE and "No module named 'scgpt_batch'" in last and "PYSPARK_PYTHON" in last


def test_warnings_are_counted_by_kind(embedded):
    """Values that are no counts, in three rows of twelve."""
    ((kind, count),) = embedded.summary["warnings"].items()
    assert count == 3 and f"3 rows have a warning: {kind}" in embedded.logged
