"""Which rows have a result, and what the tables hold of rows and samples that are gone."""

import pytest
from pyspark.sql import functions as F

from scgpt_batch.errors import ConfigError
from scgpt_batch.spark import tables
from scgpt_batch.spark.pending import pending_rows, sample_hash
from scgpt_batch.spark.vanished import earlier_runs, vanished
from tests.helpers import append

STAMPS = {"mode": "contextual", "model_name": "scgpt", "model_version": "1", "params_hash": "p"}


def rows(spark, *lines):
    """Rows of the input: adata_id, content_hash, sample_id."""
    lines_now = spark.createDataFrame(list(lines), "adata_id STRING, content_hash STRING, sample_id STRING")
    return lines_now.withColumns({"n_obs": F.lit(3), "ingested_at": F.lit(None).cast("timestamp")})


def ledger(spark, *lines):
    """Its lines: adata_id, content_hash, sample_id, the contents of its sample, status."""
    made = []
    for i, (adata_id, content, sample, contents, status) in enumerate(lines):
        hashed = sample_hash(sample, contents) if sample else None
        made.append((adata_id, content, sample, hashed, status, i))
    ddl = "adata_id STRING, content_hash STRING, sample_id STRING, sample_hash STRING, status STRING, at INT"
    return spark.createDataFrame(made, ddl)


def pending(spark, given, lines, *, samples=True):
    found = pending_rows(
        rows(spark, *given), ledger(spark, *lines), counts=F.col("status") == "ok", samples=samples, name="t"
    )
    return sorted(found.pending["adata_id"])


BOTH = [("a", "1", "s"), ("b", "2", "s"), ("c", "3", None)]
DONE = [("a", "1", "s", "12", "ok"), ("b", "2", "s", "12", "ok"), ("c", "3", None, "", "ok")]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (BOTH, []),
        ([("a", "1", "s"), ("c", "3", None)], ["a"]),
        ([*BOTH, ("d", "4", "s")], ["a", "b", "d"]),
        ([("a", "1", "t"), ("b", "2", "s"), ("c", "3", None)], ["a", "b"]),
        ([("a", "1", "t"), ("b", "2", "t"), ("c", "3", None)], ["a", "b"]),
        ([("a", "1", None), ("b", "2", None), ("c", "3", None)], ["a", "b"]),
        ([("a", "1", "s"), ("b", "2", "s"), ("c", "3", "s")], ["a", "b", "c"]),
        ([("a", "1", "s"), ("b", "0", "s"), ("c", "3", None)], ["a", "b"]),
    ],
    ids=["nothing", "member deleted", "member added", "member moved", "sample renamed", "sample dissolved",
         "row joins", "content"],
)  # fmt: skip
def test_sample_is_pending_when_its_contents_change(spark, given, wanted):
    assert pending(spark, given, DONE) == wanted


def test_sample_id_is_ignored_for_independent_rows(spark):
    done = [(adata_id, content, None, "", "ok") for adata_id, content, _ in BOTH]
    assert pending(spark, BOTH, done, samples=False) == []


def test_failed_row_makes_its_sample_pending(spark):
    assert pending(spark, BOTH, [*DONE[1:], ("a", "1", "s", "12", "failed")]) == ["a", "b"]


def test_newest_ledger_line_counts(spark):
    """A row that changed, and changed back, has the embeddings of what it was between."""
    assert pending(spark, [("c", "3", None)], [("c", "3", None, "", "ok"), ("c", "4", None, "", "ok")]) == ["c"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([("s", "1", None), ("p", "2", "s")], "'s' is the sample_id of some rows and the adata_id of a row outside"),
        ([("a", "1", "s"), ("a", "1", "t")], "several contents or samples, first 'a'"),
        ([("a", "1", "s"), ("a", "1", None)], "several contents or samples, first 'a'"),
    ],
)
def test_ambiguous_sample_ids_are_rejected(spark, given, wanted):
    with pytest.raises(ConfigError, match=wanted):
        pending(spark, given, [])


def test_sample_can_have_the_id_of_its_own_row(spark):
    assert pending(spark, [("s", "1", "s"), ("p", "2", "s")], []) == ["p", "s"]


@pytest.fixture(scope="module")
def written(spark, tmp_path_factory):
    """An output of three runs: one that finished, one over another input, and one that was killed."""
    folder = tmp_path_factory.mktemp("vanished")
    names = {name: f"delta.`{folder}/{name}`" for name in ("output", "ledger", "runs")}
    ddl = {"output": tables.GENE_EMBEDDINGS, "ledger": tables.LEDGER, "runs": tables.RUNS}
    for name, table in names.items():
        tables.create(spark, table, ddl[name])
    runs = [("done", "finished", "mine"), ("other", "finished", "theirs"), ("killed", "running", "mine")]
    frame = spark.createDataFrame(runs, "run_id STRING, status STRING, input_table STRING")
    append(frame.withColumns({"started_at": F.current_timestamp(), "output_table": F.lit(names["output"])}),
           names["runs"])  # fmt: skip
    lines = [("a", "s", "done"), ("b", "s", "done"), ("c", None, "done"), ("theirs", None, "other")]
    frame = spark.createDataFrame(lines, "adata_id STRING, sample_id STRING, run_id STRING")
    append(frame.withColumns({name: F.lit(value) for name, value in STAMPS.items()}), names["ledger"])
    lines = [("s", "done"), ("c", "done"), ("theirs", "other"), ("unreported", "killed")]
    frame = spark.createDataFrame(lines, "adata_id STRING, run_id STRING")
    append(frame.withColumns({name: F.lit(value) for name, value in STAMPS.items()}), names["output"])
    return names


def gone(rows, written):
    runs = earlier_runs(rows.sparkSession, written["runs"], "mine", written["output"])
    return vanished(rows, output=written["output"], ledger=written["ledger"], runs=runs)


@pytest.mark.parametrize(
    ("given", "embeddings", "rows"),
    [
        ([("a", "s"), ("b", "s"), ("c", None), ("unreported", None)], [], []),
        ([("a", "s"), ("c", None), ("unreported", None)], [], ["b"]),
        ([("c", None), ("unreported", None)], ["s"], ["a", "b"]),
        ([("a", "t"), ("b", "t"), ("c", None), ("unreported", None)], ["s"], []),
        ([("a", None), ("b", None), ("c", None), ("unreported", None)], ["s"], []),
        ([("a", "s"), ("b", "s"), ("c", "s"), ("unreported", None)], ["c"], []),
        ([("a", "s"), ("b", "s"), ("c", None)], ["unreported"], ["unreported"]),
    ],
    ids=["nothing", "member", "sample", "sample renamed", "sample dissolved", "row joins", "left by a killed run"],
)
def test_lines_of_vanished_rows_are_found(spark, written, given, embeddings, rows):
    now = spark.createDataFrame(given, "adata_id STRING, sample_id STRING")
    found = gone(now, written)
    assert sorted(found.embeddings["adata_id"]) == embeddings
    assert sorted(found.ledger["adata_id"]) == rows and found.rows == len(rows)


def test_removal_keeps_lines_of_other_inputs(spark, written, tmp_path):
    copies = {name: f"delta.`{tmp_path}/{name}`" for name in ("output", "ledger")}
    for name, table in copies.items():
        spark.table(written[name]).write.format("delta").saveAsTable(table)
    now = spark.createDataFrame([("a", "s"), ("b", "s")], "adata_id STRING, sample_id STRING")
    gone(now, written).remove(spark, **copies)
    remaining = {name: sorted(r[0] for r in spark.table(table).select("adata_id").collect())
            for name, table in copies.items()}  # fmt: skip
    assert remaining == {"output": ["s", "theirs"], "ledger": ["a", "b", "theirs"]}
