"""What a later run embeds again, and what it removes: end to end, on real Spark, Delta and MLflow."""

import base64
import json
import shutil

import numpy as np
import pytest
from pyspark.sql import functions as F

from scgpt_batch import __version__
from scgpt_batch.cli.main import OK, WRONG_USAGE, main
from scgpt_batch.registry.resolve import resolve
from scgpt_batch.registry.sample_answers import sample_path
from tests.helpers import CELL, small_rows, write_rows


@pytest.fixture
def table(tmp_path):
    return f"delta.`{tmp_path}/rows`"


def ids(spark, table):
    return {row[0] for row in spark.table(table).select("adata_id").distinct().collect()}


def beside(table, name):
    return f"{table[:-1]}_{name}`"


# Failed rows that are tried again

# What the ledger says of a row that failed in a run with --row-timeout 60.
FAILURES = {
    "timeout": {"error_class": "Timeout"},
    "unknown timeout": {"error_class": "Timeout", "row_timeout": None},
    "payload": {"error_class": "PayloadError"},
    "payload, other libraries": {"error_class": "PayloadError", "environment": "torch 1"},
    "crash": {"error_class": "WorkerCrash"},
    "crash, other libraries": {"error_class": "WorkerCrash", "environment": "torch 1"},
    "coverage": {"error_class": "LowCoverage", "genes_matched": 4, "coverage": 0.15},
}


@pytest.fixture(scope="module")
def failed(spark, home, model, golden):
    """The words of a run over a row of each of `FAILURES`, which is the row's id; the ledger says that it failed."""
    table, out = f"delta.`{home}/failed_rows`", f"delta.`{home}/failed_out`"
    named = zip(small_rows(len(FAILURES), golden), FAILURES, strict=True)
    rows = [row | {"adata_id": name, "content_hash": name} for row, name in named]
    write_rows(spark, rows, table)
    words = ["embed", "--model-uri", model, "--input-table", table, "--output-table", out, *CELL]
    assert main([*words, "--row-timeout", "60"]) == OK
    ledger = spark.table(beside(out, "ledger"))
    lines = [line.asDict() | {"status": "failed"} | FAILURES[line["adata_id"]] for line in ledger.collect()]
    changed = spark.createDataFrame([tuple(line.values()) for line in lines], ledger.schema)
    changed.write.format("delta").mode("overwrite").saveAsTable(beside(out, "ledger"))
    return words


OUTDATED = {"crash, other libraries"}  # under any of the flags


@pytest.mark.parametrize(
    ("flags", "tried"),
    [
        (["--row-timeout", "60"], OUTDATED),
        (["--row-timeout", "30"], OUTDATED),
        (["--row-timeout", "61"], OUTDATED | {"timeout"}),
        (["--row-timeout", "60", "--min-coverage", "0.1"], OUTDATED | {"coverage"}),
    ],
)
def test_failed_row_is_pending_when_its_reason_is_gone(spark, run, failed, flags, tried):
    """Each row gets a power of two as its number of cells, so that the plan's sum tells which rows are pending."""
    cells = {name: 2**i for i, name in enumerate(FAILURES)}
    of_row = F.coalesce(*(F.when(F.col("adata_id") == name, n) for name, n in cells.items()))
    spark.table(failed[4]).withColumn("n_obs", of_row).createOrReplaceTempView("failed_rows")
    plan = run(*failed, "--input-table", "failed_rows", "--plan", *flags)[1]
    assert {name for name, n in cells.items() if plan["cells"] & n} == tried
    assert (plan["rows_in"], plan["rows"]) == (len(FAILURES), len(tried))


def test_pending_failed_rows_are_embedded_again(spark, run, failed):
    summary = run(*failed, "--row-timeout", "61")[1]
    assert (summary["rows_ok"], summary["rows_skipped"]) == (2, len(FAILURES) - 2)
    ledger = spark.table(beside(failed[6], "ledger")).where("status = 'ok'")
    assert sorted(line["adata_id"] for line in ledger.collect()) == ["crash, other libraries", "timeout"]


# Rows that are gone


def test_results_of_deleted_rows_are_removed(spark, embed, table, out, golden):
    write_rows(spark, small_rows(3, golden), table)
    assert embed(*CELL)[1]["rows_removed"] == 0
    spark.sql(f"DELETE FROM {table} WHERE adata_id = 'good-001'")
    summary = embed(*CELL)[1]
    assert [summary[key] for key in ("rows_in", "rows_ok", "rows_skipped", "rows_removed")] == [2, 0, 2, 1]
    assert ids(spark, out) == ids(spark, beside(out, "ledger")) == {"good-000", "good-002"}
    assert embed(*CELL, "--plan")[1]["rows_removed"] == 0
    runs = spark.table(beside(out, "runs")).orderBy("started_at").collect()
    assert [row["rows_removed"] for row in runs] == [0, 1]


# Other code than that of the registration


@pytest.fixture
def other_model(model, tmp_path):
    """The registered version as other code left it: its source differs, and one number of its stored answers."""
    folder = tmp_path / "model"
    shutil.copytree(resolve(model).folder, folder)
    (folder / "code" / "scgpt_batch" / "errors.py").write_text("# older")
    path = sample_path(resolve(str(folder)))
    sample = json.loads(path.read_text())
    answer = sample["cases"][0]["answers"][0]
    vectors = np.frombuffer(base64.b64decode(answer["embeddings_base64"]), "<f4") + np.float32(1e-3)
    answer["embeddings_base64"] = base64.b64encode(vectors.tobytes()).decode()
    path.write_text(json.dumps(sample))
    return str(folder)


def test_other_code_fails_before_writing(spark, embed, table, out, golden, other_model, tmp_path):
    write_rows(spark, small_rows(2, golden), table)
    code, _, err = embed(*CELL, model_uri=other_model)
    assert code == WRONG_USAGE and "--allow-other-code" in err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_allowed_other_code_is_stamped(spark, embed, table, out, golden, other_model):
    write_rows(spark, small_rows(2, golden), table)
    assert embed(*CELL, "--allow-other-code", "true", model_uri=other_model)[0] == OK
    for name in (out, beside(out, "runs")):
        stamps = {row[0] for row in spark.table(name).select("package_version").collect()}
        assert stamps == {f"{__version__}+other-code"}
