"""Samples of several rows through `embed`: three runs over one table, whose rows are added and deleted in between."""

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scgpt_batch.inference.engine import load_embedder
from scgpt_batch.io.rows import to_row
from scgpt_batch.parameters import Parameters
from tests.helpers import assert_close, summary_of, write_rows

CHOICE = {"mode": "contextual", "data_is_raw": True, "hvg_flavor": "seurat_v3", "subset_hvg": 30}
FLAGS = [word for name, value in CHOICE.items() for word in (f"--{name.replace('_', '-')}", str(value).lower())]


@dataclass(frozen=True)
class After:
    """What a run returned, and what the tables hold after it."""

    summary: dict
    lines: pd.DataFrame
    ledger: list[str]


@pytest.fixture(scope="module")
def embedder(golden):
    return load_embedder(golden / "checkpoint_flash")


@pytest.fixture(scope="module")
def cells(pbmc3k, embedder):
    """The cells of each row, by the row's id: `donor`, `pair` and `gone` are samples, `alone` is a row without one."""
    known = [name for name in pbmc3k.var_names if name in embedder.vocabulary]
    ids = ["donor-0", "donor-1", "donor-2", "donor-3", "pair-0", "pair-1", "gone-0", "alone"]
    return {name: pbmc3k[30 * i : 30 * i + 30, known].copy() for i, name in enumerate(ids)}


@pytest.fixture(scope="module")
def runs(spark, home, model, cells):
    """The first run, a stream after one row was added, and a run after three were deleted; a plan after the first."""
    table, out = f"delta.`{home}/rows`", f"delta.`{home}/out`"
    rows = {name: to_row(of_row) | {"adata_id": name} for name, of_row in cells.items()}
    for name, row in rows.items():
        row["sample_id"] = None if name == "alone" else name.partition("-")[0]
    words = ["embed", "--model-uri", model, "--input-table", table, "--output-table", out, *FLAGS]

    def run(*flags):
        summary = summary_of(*words, *flags)
        ledger = spark.table(f"delta.`{home}/out_ledger`").orderBy("adata_id").toPandas()
        return After(summary, spark.table(out).toPandas(), ledger["adata_id"].tolist())

    late = rows.pop("donor-3")
    write_rows(spark, rows.values(), table)
    first, plan = run(), summary_of(*words, "--plan")
    write_rows(spark, [late], table)
    stream = run("--trigger", "available-now", "--checkpoint-location", str(home / "checkpoint"))
    spark.sql(f"DELETE FROM {table} WHERE adata_id IN ('donor-1', 'pair-1', 'gone-0')")
    return {"first": first, "plan": plan, "stream": stream, "deletion": run()}


def assert_lines_of(after, cells, embedder, **samples):
    """Compare the lines of each sample with the embedding of its rows' cells as one AnnData; there are no others."""
    assert set(after.lines["adata_id"]) == set(samples)
    for sample, names in samples.items():
        joined = ad.concat([cells[name] for name in names])
        wanted = embedder.embed(to_row(ad.AnnData(joined.X, obs=joined.obs, var=joined.var)), Parameters(**CHOICE))
        lines = after.lines[after.lines["adata_id"] == sample].set_index("gene")
        assert sorted(lines.index) == sorted(wanted.genes)
        assert_close(np.stack(lines.loc[wanted.genes, "embedding"]), wanted.gene_embeddings, atol=1e-6, rtol=1e-6)
        assert lines.loc[wanted.genes, "n_cells"].tolist() == wanted.n_cells.tolist()


def test_rows_of_a_sample_share_decisions_and_means(runs, cells, embedder):
    first = runs["first"]
    assert (first.summary["rows_ok"], first.summary["rows_failed"]) == (7, 0)
    assert_lines_of(
        first, cells, embedder,
        donor=["donor-0", "donor-1", "donor-2"], pair=["pair-0", "pair-1"], gone=["gone-0"], alone=["alone"],
    )  # fmt: skip


def test_complete_samples_are_skipped(runs):
    assert (runs["plan"]["rows"], runs["plan"]["rows_skipped"]) == (0, 7)


def test_stream_embeds_the_whole_sample_of_a_new_row(runs, cells, embedder):
    stream = runs["stream"]
    assert (stream.summary["rows_ok"], stream.summary["rows_skipped"]) == (4, 4)
    assert_lines_of(
        stream, cells, embedder,
        donor=["donor-0", "donor-1", "donor-2", "donor-3"], pair=["pair-0", "pair-1"], gone=["gone-0"], alone=["alone"],
    )  # fmt: skip


def test_means_follow_deleted_rows_of_a_sample(runs, cells, embedder):
    deletion = runs["deletion"]
    assert [deletion.summary[key] for key in ("rows_ok", "rows_skipped", "rows_removed")] == [4, 1, 3]
    assert deletion.ledger == ["alone", "donor-0", "donor-2", "donor-3", "pair-0"]
    donor = ["donor-0", "donor-2", "donor-3"]
    assert_lines_of(deletion, cells, embedder, donor=donor, pair=["pair-0"], alone=["alone"])
