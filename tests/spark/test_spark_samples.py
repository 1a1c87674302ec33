"""Samples of several rows on Spark: what the rows' tasks and the driver do gives what one AnnData would."""

import os

import numpy as np
import pytest
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from scgpt_batch.inference.engine import load_embedder
from scgpt_batch.io.rows import arrow_rows, to_row
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.sample_statistics import Statistics
from scgpt_batch.spark.sample_decisions import contributions, decisions, means, statistics_of_row
from scgpt_batch.spark.worker import (
    ANSWERS,
    ROW_KEY,
    ModelRef,
    WorkerTask,
    answer_batches,
    with_its_decisions,
)
from tests.helpers import assert_close
from tests.paths import GOLDEN

CHECKPOINT = GOLDEN / "checkpoint_flash"
ROWS = "sample_id STRING, adata_id STRING, content_hash STRING, x_data ARRAY<FLOAT>, x_indices ARRAY<INT>, \
x_indptr ARRAY<BIGINT>, adata_obs STRING, adata_var STRING"


@pytest.fixture(scope="module")
def embedder():
    return load_embedder(CHECKPOINT)


@pytest.fixture(scope="module")
def ref(embedder):
    return ModelRef(str(CHECKPOINT), embedder.digest, "", "", "")


@pytest.fixture(scope="module")
def samples(pbmc3k, embedder):
    """Ten samples of different cells, the vocabulary's genes; more than a task holds back at once."""
    known = [name for name in pbmc3k.var_names if name in embedder.vocabulary]
    cells = pbmc3k[:400, known].copy()
    sizes = [120, *[30] * 9]
    ends = np.cumsum(sizes)
    return {f"s{i}": cells[end - size : end].copy() for i, (size, end) in enumerate(zip(sizes, ends, strict=True))}


@pytest.fixture(scope="module")
def rows(spark, samples):
    """Each sample in three rows, spread over four partitions."""
    found = []
    for sample, cells in samples.items():
        for i, part in enumerate(np.array_split(np.arange(cells.n_obs), 3)):
            row = to_row(cells[part])
            plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()}
            found.append(plain | {"sample_id": sample, "adata_id": f"{sample}-{i}", "content_hash": ""})
    names = [f.split()[0] for f in ROWS.split(", ")]
    table = [tuple(row[name] for name in names) for row in found]
    return spark.createDataFrame(table, ROWS).repartition(4, "adata_id").cache()


def embed_sums(ref, parameters):
    """Answer rows by sums, as a worker does. (A closure: workers cannot import tests.)"""

    def run(batches):
        embedder = ref.load()
        for batch in batches:
            for row in arrow_rows(batch):
                (answer,) = embedder.embed_sample_rows([with_its_decisions(row)], parameters, sums=True)
                yield from answer_batches({name: row[name] for name in ROW_KEY}, answer)

    return run


def test_sample_means_match_the_joined_cells(spark, rows, samples, embedder, ref):
    parameters = Parameters(
        mode="contextual", hvg_flavor="seurat", result_normed_key="", log1p=True, result_log1p_key="", subset_hvg=30
    )
    decided = decisions(rows, WorkerTask(ref, parameters, row_timeout=600))
    assert sorted(row["sample_id"] for row in decided.collect()) == sorted(samples)
    keys = rows.select("adata_id", "sample_id")
    sums = (
        rows.join(F.broadcast(decided), "sample_id")
        .mapInArrow(embed_sums(ref, parameters), from_arrow_schema(ANSWERS))
        .where("report IS NULL")
        .join(keys, "adata_id")
    )
    found = means(sums).toPandas().set_index(["sample_id", "gene"])
    assert not found.index.has_duplicates
    n = 0
    for sample, cells in samples.items():
        wanted = embedder.embed(to_row(cells), parameters)
        assert wanted.error is None, wanted.error
        lines = found.loc[sample].loc[wanted.genes]
        assert lines["n_cells"].tolist() == wanted.n_cells.tolist()
        assert_close(np.stack(lines["embedding"]), wanted.gene_embeddings, atol=1e-5)
        n += len(lines)
    assert len(found) == n


def dies_with_part_0(work):
    """The work of a process of its own, which the first row of a sample kills."""
    compute = statistics_of_row(work)
    return lambda row: os._exit(1) if row["adata_id"].endswith("-0") else compute(row)


def test_crashing_row_is_left_out_of_decisions(ref, rows, monkeypatch):
    monkeypatch.setattr("scgpt_batch.spark.sample_decisions.statistics_of_row", dies_with_part_0)
    work = WorkerTask(ref, Parameters(mode="cell"), row_timeout=60, isolated=True)
    given = rows.where("sample_id = 's1'").withColumn("decisions", F.lit(None).cast("binary")).toArrow()
    (part,) = contributions(work)(given.to_batches())
    found = Statistics.from_bytes(part["statistics"][0].as_py())
    assert found.left_out == 1 and found.cells == {"": 20}
