"""The SQL on the batch job's tables, as real runs of `embed` wrote them: equal to pandas, and judged by `monitor`."""

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
import torch
from pyspark.sql import functions as F

from scgpt_batch.cli.main import ALERTS, OK, main
from scgpt_batch.io.rows import to_row
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.monitoring import queries
from scgpt_batch.registry.register import register
from tests.helpers import assert_close, random_adata, write_rows
from tests.paths import GOLDEN

# all over the vocabulary: in `trained_on` the later a gene, the farther it moved
GENES = Vocabulary.from_file(GOLDEN / "checkpoint_flash" / "vocab.json").tokens[::50][:40]
SINCE = datetime.now(UTC) - timedelta(days=1)


@pytest.fixture(scope="module")
def runs(spark, home):
    """Three runs: gene vectors of two versions in one table, and cell vectors; nine rows, eight of three samples.

    One row is torn, one has genes that nobody knows, half of the genes of another are unknown.
    """
    embed_thrice(spark, home)
    return home


def embed_thrice(spark, folder):
    register(str(trained_on(folder / "checkpoint")), "scgpt")
    rows = [to_row(random_adata(4, 40, seed=i, genes=GENES)) | {"adata_id": f"row-{i}"} for i in range(6)]
    half = [*GENES[:20], *(f"x{i}" for i in range(20))]
    rows.append(to_row(random_adata(4, 40, seed=6, genes=half)) | {"adata_id": "half"})
    rows.append(to_row(random_adata(4, 40, genes=[f"x{i}" for i in range(40)])) | {"adata_id": "strange"})
    rows.append(rows[0] | {"adata_id": "torn", "adata_var": "{oops", "content_hash": None})
    for i, row in enumerate(rows):
        row["sample_id"] = None if i == 5 else f"sample-{i % 3}"
    write_rows(spark, rows, "batch_rows")
    for mode, output, version in (("static", "genes", 1), ("static", "genes", 2), ("cell", "cells", 1)):
        argv = ["--model-uri", f"models:/scgpt/{version}", "--input-table", "batch_rows", "--mode", mode,
                "--output-table", f"batch_{output}", "--need-preprocess", "false"]  # fmt: skip
        assert main(["embed", *argv, "--max-failed-fraction", "1"]) == OK


def trained_on(folder):
    """The golden checkpoint with gene vectors that moved a little, each its own way."""
    folder.mkdir()
    for name in ("args.json", "vocab.json"):
        (folder / name).write_bytes((GOLDEN / "checkpoint_flash" / name).read_bytes())
    state = torch.load(GOLDEN / "checkpoint_flash" / "best_model.pt", weights_only=True)
    vectors = state["encoder.embedding.weight"]
    step = torch.linspace(0, 1, len(vectors))[:, None] * vectors.std()
    state["encoder.embedding.weight"] = vectors + step * torch.randn(
        vectors.shape, generator=torch.Generator().manual_seed(0)
    )
    torch.save(state, folder / "best_model.pt")
    return folder


def query(spark, name, **parameters):
    return queries.run(spark, name, **parameters).toPandas()


def table(spark, name):
    return spark.table(name).toPandas()


def unit(vectors):
    stacked = np.stack(vectors).astype(float)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


def test_last_runs_and_cells_a_second(spark, runs):
    wanted = table(spark, "batch_genes_runs").sort_values("started_at")
    found = query(spark, "last_runs", runs="batch_genes_runs", limit=1)
    assert found["run_id"].tolist() == [wanted["run_id"].iloc[-1]]
    assert found[["status", "rows_in", "rows_ok", "rows_failed"]].to_numpy().tolist() == [["finished", 9, 7, 2]]
    speed = query(spark, "cells_per_second", runs="batch_genes_runs", since=SINCE)
    assert speed["run_id"].tolist() == wanted["run_id"].tolist()
    assert_close(speed["cells_per_second"], wanted["cells"] / wanted["seconds"], rtol=1e-12)


def test_failed_rows_by_class_and_only_while_they_fail(spark, runs):
    lines = table(spark, "batch_genes_ledger")
    failed = lines[lines["status"] == "failed"]
    found = query(spark, "failed_rows", ledger="batch_genes_ledger", since=SINCE)
    assert len(found) == 4  # two classes, two versions
    for line in found.to_dict("records"):
        mine = failed[(failed["error_class"] == line["error_class"])
                      & (failed["model_version"] == line["model_version"])]  # fmt: skip
        assert line["failed_rows"] == len(mine) == 1
        assert line["sample_adata_id"] in set(mine["adata_id"])
        assert line["sample_message"] in set(mine["error_message"])
    later = spark.table("batch_genes_ledger").where("adata_id = 'torn'")
    repaired = later.withColumns({"status": F.lit("ok"), "at": F.col("at") + F.expr("interval 1 minute")})
    spark.table("batch_genes_ledger").union(repaired.select(*later.columns)).createOrReplaceTempView("repaired_ledger")
    found = query(spark, "failed_rows", ledger="repaired_ledger", since=SINCE)
    assert set(found["sample_adata_id"]) == {"strange"}


def test_coverage_by_sample(spark, runs):
    lines, rows = table(spark, "batch_genes_ledger"), table(spark, "batch_rows")[["adata_id", "sample_id"]]
    joined = lines.drop(columns="sample_id").merge(rows, on="adata_id")
    joined["sample_id"] = joined["sample_id"].fillna(joined["adata_id"])
    wanted = joined.groupby(["sample_id", "model_version"]).agg(
        rows=("adata_id", "nunique"),
        mean_coverage=("coverage", "mean"),
        least_coverage=("coverage", "min"),
        least_genes_matched=("genes_matched", "min"),
    )
    found = query(spark, "coverage", ledger="batch_genes_ledger", rows="batch_rows", since=SINCE)
    assert found["mean_coverage"].is_monotonic_increasing and len(found) == len(wanted) == 8
    found = found.set_index(["sample_id", "model_version"]).loc[wanted.index]
    for column in wanted:
        assert_close(found[column].astype(float), wanted[column].astype(float), rtol=1e-12)
    assert 0.3 < wanted["least_coverage"].loc["sample-0"].iloc[0] < 0.7  # the row half known


def test_gene_drift_between_two_versions(spark, runs):
    lines = table(spark, "batch_genes")
    old, new = (lines[lines["model_version"] == version] for version in "12")
    pairs = old.merge(new, on=["adata_id", "gene"])
    pairs["cosine"] = (unit(pairs["embedding_x"]) * unit(pairs["embedding_y"])).sum(axis=1)
    wanted = pairs.groupby("gene")["cosine"].agg(["mean", "min", "size"])
    assert wanted["mean"].std() > 1e-4  # the versions differ, gene by gene
    found = query(spark, "gene_drift", embeddings="batch_genes", old_version="1", new_version="2", limit=1000)
    assert found["mean_cosine"].is_monotonic_increasing and len(found) == len(wanted) == 40
    wanted = wanted.loc[found["gene"]]
    assert found["pairs"].tolist() == wanted["size"].tolist()
    assert_close(found[["mean_cosine", "least_cosine"]], wanted[["mean", "min"]], atol=1e-9)
    same = query(spark, "gene_drift", embeddings="batch_genes", old_version="1", new_version="1", limit=1000)
    assert_close(same["mean_cosine"], np.ones(40), atol=1e-12)


def pairwise(vectors):
    cosines = unit(vectors) @ unit(vectors).T
    return cosines[~np.eye(len(cosines), dtype=bool)].mean()


@pytest.mark.parametrize("kind", ["cells", "genes"])
def test_collapse_compares_vectors_within_each_run(spark, runs, kind):
    lines = table(spark, f"batch_{kind}")
    found = query(spark, f"collapse_{kind}", embeddings=f"batch_{kind}", since=SINCE, sample=1000).set_index("run_id")
    for run_id, of_run in lines.groupby("run_id"):
        if kind == "genes":
            of_run = of_run.drop_duplicates("gene")
        line = found.loc[run_id]
        assert line["vectors"] == line["sampled"] == line["distinct_vectors"] == len(of_run)
        assert_close(line["mean_cosine"], pairwise(of_run["embedding"]), atol=1e-9)
        assert line["mean_cosine"] < 0.999
    few = query(spark, f"collapse_{kind}", embeddings=f"batch_{kind}", since=SINCE, sample=10)
    assert few["sampled"].between(2, 16).all()


def call(capfd, *argv):
    capfd.readouterr()
    code = main(["monitor", "--max-failed-fraction", "0.3", *argv])  # two of the nine rows are meant to fail
    return code, json.loads(capfd.readouterr().out.strip().splitlines()[-1])


def test_monitor_reports_healthy_runs(runs, capfd, tmp_path):
    page = tmp_path / "page.html"
    code, summary = call(capfd, "--output-table", "batch_genes", "--report", str(page))
    assert (code, summary["status"], summary["alerts"], summary["last_run_status"]) == (OK, "ok", [], "finished")
    text = page.read_text()
    for section in ("last_runs", "cells_per_second", "failed_rows", "coverage", "collapse_genes"):
        assert f'<h2 id="{section}">' in text
    assert "LowCoverage" in text and "row-5" in text
    assert call(capfd, "--runs-table", "batch_cells_runs")[1]["alerts"] == []
    code, summary = call(capfd, "--runs-table", "batch_cells_runs", "--max-failed-fraction", "0.2")
    assert (code, [alert["rule"] for alert in summary["alerts"]]) == (ALERTS, ["rows_failed"])


@pytest.mark.parametrize("noise", [0.0, 1e-3], ids=["equal", "all but equal"])
def test_collapsed_cells_raise_an_alert(spark, runs, capfd, noise):
    one = spark.table("batch_cells").first()["embedding"]
    alike = F.transform(F.array(*map(F.lit, one)), lambda x: (x + noise * (F.rand(1) - 0.5)).cast("float"))
    collapsed = spark.table("batch_cells").withColumns({"embedding": alike, "run_id": F.lit("collapsed")})
    both = spark.table("batch_cells").union(collapsed)
    both.write.format("delta").mode("overwrite").saveAsTable("collapsed_cells")
    code, summary = call(capfd, "--output-table", "collapsed_cells", "--runs-table", "batch_cells_runs",
                      "--ledger-table", "batch_cells_ledger")  # fmt: skip
    assert code == ALERTS and [alert["rule"] for alert in summary["alerts"]] == ["collapse"]
    assert "collapsed" in summary["alerts"][0]["message"]


def test_failed_and_late_runs_raise_alerts(spark, runs, capfd):
    last = spark.table("batch_cells_runs")
    last.withColumn("status", F.lit("failed")).createOrReplaceTempView("failed_runs")
    code, summary = call(capfd, "--runs-table", "failed_runs")
    assert code == ALERTS and {alert["rule"] for alert in summary["alerts"]} == {"run_failed", "run_late"}
    last.withColumn("finished_at", F.expr("finished_at - interval 3 days")).createOrReplaceTempView("late_runs")
    code, summary = call(capfd, "--runs-table", "late_runs")
    assert (code, [alert["rule"] for alert in summary["alerts"]]) == (OK, ["run_late"])
    assert pd.Series(summary["alerts"][0]["value"]).between(72, 74).all()
