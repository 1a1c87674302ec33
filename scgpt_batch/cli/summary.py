"""What an embeddings table holds, and the nearest genes of some, for a person to read."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from scgpt_batch.command_result import CommandResult
from scgpt_batch.embedding_tables import MODEL, nearest
from scgpt_batch.io.delta import SparkNeeded, open_dataset, table_path
from scgpt_batch.io.locations import beside, is_remote, table_name
from scgpt_batch.near_misses import GENE_CUTOFF, did_you_mean
from scgpt_batch.settings import SummarySettings


@dataclass(frozen=True, kw_only=True)
class SummaryResult(CommandResult):
    """What an embeddings table holds."""

    output_table: str
    ledger_table: str
    rows: int
    cells: int
    genes: int
    embeddings: int
    models: list[dict[str, Any]]  # mode, model and parameters, with their counts
    nearest_genes: dict[str, list[tuple[str, float]]]  # gene -> genes and cosine similarities; empty: not in the table
    similar_genes: dict[str, str]  # gene that is not in the table -> which one was probably meant

    def to_dict(self) -> dict[str, Any]:
        """Return the values of the JSON line: the nearest genes by name only."""
        values = super().to_dict()
        del values["ledger_table"], values["similar_genes"]
        names = {gene: [name for name, _ in near] for gene, near in self.nearest_genes.items()}
        return values | {"nearest_genes": names}

    def lines(self) -> list[str]:
        """Say how much the table holds of each model, and the nearest genes."""
        lines = [f"{self.rows} rows with {self.cells} cells; {self.genes} genes, {self.embeddings} embeddings"]
        lines += [
            "  {mode}, {model_name} version {model_version}, parameters {params_hash}: {rows} rows with {cells} cells; "
            "{genes} genes, {embeddings} embeddings".format_map(model)
            for model in self.models
        ]
        lines += [f"embeddings in {self.output_table}", f"what happened to each row in {self.ledger_table}", ""]
        lines += ["nearest genes by cosine similarity of their static embeddings"]
        for gene, near in self.nearest_genes.items():
            found = (
                ", ".join(f"{name} {cosine:.2f}" for name, cosine in near)
                or f"not among the genes of this table{self.similar_genes.get(gene, '')}"
            )
            lines.append(f"  {gene:<8} {found}")
        return lines


class _Table(Protocol):
    """The figures of an embeddings table and its ledger, small enough for this process."""

    def genes(self) -> pd.DataFrame:
        """Return the genes of each model: its columns, gene, lines, and when it last wrote one (at)."""

    def rows(self) -> pd.DataFrame:
        """Return the last line of the ledger for each row and model: its columns, adata_id, status, cells and at."""

    def static_vectors(self, model: Mapping[str, Any]) -> pa.Table:
        """Return each gene of a model in static mode, with its vector."""


def summarize(settings: SummarySettings) -> SummaryResult:
    """Count what an embeddings table holds and find the nearest genes of some; a table at a local path needs no Spark.

    Raises
    ------
    ConfigError
        There is no such table.
    """
    table = table_name(settings.output_table)
    ledger_table = beside(table, "_ledger")
    found = _open(settings, table, ledger_table)
    genes, rows = found.genes(), found.rows()
    rows = rows[rows["status"] == "ok"]
    names, vectors = _newest_static_vectors(found, genes)
    # a row that was embedded in several modes, or by several models, counts once
    once = rows.sort_values("at").drop_duplicates("adata_id", keep="last")
    return SummaryResult(
        output_table=table,
        ledger_table=ledger_table,
        rows=len(once),
        cells=int(once["cells"].sum()),
        genes=genes["gene"].nunique(),
        embeddings=int(genes["lines"].sum()),
        models=_models(genes, rows),
        nearest_genes=_nearest_genes(names, vectors, settings),
        similar_genes={
            gene: did_you_mean(gene, names, cutoff=GENE_CUTOFF) for gene in settings.genes if gene not in names
        },
    )


def _models(genes: pd.DataFrame, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return each mode, model and parameters, with the numbers of genes, embeddings, rows and cells."""
    counted = genes.groupby([*MODEL], as_index=False).agg(genes=("gene", "nunique"), embeddings=("lines", "sum"))
    of_rows = rows.groupby([*MODEL], as_index=False).agg(rows=("adata_id", "size"), cells=("cells", "sum"))
    both = counted.merge(of_rows, on=[*MODEL], how="left").sort_values([*MODEL])
    counts = ["genes", "embeddings", "rows", "cells"]
    both[counts] = both[counts].fillna(0).astype(int)
    return both.to_dict("records")


def _newest_static_vectors(found: _Table, genes: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """Return genes and their static vectors, of the model that wrote last."""
    static = genes[genes["mode"] == "static"]
    if static.empty:
        return [], np.empty((0, 0), np.float32)
    vectors = found.static_vectors(static.loc[static["at"].idxmax(), [*MODEL]].to_dict())
    return vectors["gene"].to_pylist(), np.array(vectors["embedding"].to_pylist(), np.float32)


def _nearest_genes(
    names: list[str], vectors: np.ndarray, settings: SummarySettings
) -> dict[str, list[tuple[str, float]]]:
    """Return the nearest genes of each, nearest first; none for a gene that is not in the table."""
    present = [gene for gene in dict.fromkeys(settings.genes) if gene in names]
    found: dict[str, list[tuple[str, float]]] = {gene: [] for gene in settings.genes}
    for row in nearest(pd.Index(names), vectors, present, settings.neighbours).itertuples() if present else ():
        found[row.gene].append((row.neighbour, float(row.similarity)))
    return found


# Reading the tables


def _open(settings: SummarySettings, table: str, ledger_table: str) -> _Table:
    path, ledger_path = table_path(table), table_path(ledger_table)
    if path is None or ledger_path is None or is_remote(path):
        return _WithSpark(settings, table, ledger_table)
    try:
        return _WithoutSpark(open_dataset(path), open_dataset(ledger_path))
    except SparkNeeded:  # such as a table with deletion vectors
        return _WithSpark(settings, table, ledger_table)


class _WithoutSpark:
    """Tables at paths, read by delta-rs."""

    def __init__(self, lines: Any, ledger: Any) -> None:
        self._lines, self._ledger = lines, ledger

    def genes(self) -> pd.DataFrame:
        keys = [*MODEL, "gene"]
        counted = [  # batch by batch: the table may have hundreds of millions of lines
            pa.Table.from_batches([batch]).group_by(keys).aggregate([([], "count_all"), ("embedded_at", "max")])
            for batch in self._lines.to_batches(columns=[*keys, "embedded_at"])
        ]
        if not counted:
            return pd.DataFrame(columns=[*keys, "lines", "at"])
        total = pa.concat_tables(counted).group_by(keys).aggregate([("count_all", "sum"), ("embedded_at_max", "max")])
        return total.to_pandas().rename(columns={"count_all_sum": "lines", "embedded_at_max_max": "at"})

    def rows(self) -> pd.DataFrame:
        lines = self._ledger.to_table(columns=["adata_id", *MODEL, "status", "cells", "at"]).to_pandas()
        return lines.sort_values("at").drop_duplicates(["adata_id", *MODEL], keep="last")

    def static_vectors(self, model: Mapping[str, Any]) -> pa.Table:
        mine = reduce(and_, (pc.field(name) == value for name, value in model.items()))
        genes, vectors = [], []
        seen: set[str] = set()
        for batch in self._lines.to_batches(columns=["gene", "embedding"], filter=mine):
            names = pd.Index(batch["gene"].to_pandas())
            new = np.flatnonzero(~names.duplicated() & ~names.isin(seen))  # a static vector is the same in every row
            genes.append(batch["gene"].take(pa.array(new)))
            vectors.append(batch["embedding"].take(pa.array(new)))
            seen.update(names[new])
        return pa.table({"gene": pa.chunked_array(genes), "embedding": pa.chunked_array(vectors)})


class _WithSpark:
    """Tables that only Spark's catalog or file systems know."""

    def __init__(self, settings: SummarySettings, table: str, ledger_table: str) -> None:
        from scgpt_batch.spark import tables
        from scgpt_batch.spark.session import get_spark

        spark = get_spark(settings.spark_conf)
        self._lines = tables.read(spark, table, tables.GENE_EMBEDDINGS)
        self._ledger = tables.read(spark, ledger_table, tables.LEDGER)

    def genes(self) -> pd.DataFrame:
        from pyspark.sql import functions as F

        counted = self._lines.groupBy(*MODEL, "gene")
        return counted.agg(F.count("*").alias("lines"), F.max("embedded_at").alias("at")).toPandas()

    def rows(self) -> pd.DataFrame:
        from pyspark.sql import functions as F

        last = F.max_by(F.struct("status", "cells"), "at").alias("last")
        lines = self._ledger.groupBy("adata_id", *MODEL).agg(last, F.max("at").alias("at"))
        return lines.select("adata_id", *MODEL, "last.*", "at").toPandas()

    def static_vectors(self, model: Mapping[str, Any]) -> pa.Table:
        from pyspark.sql import functions as F

        mine = reduce(and_, (F.col(name) == value for name, value in model.items()))
        return self._lines.where(mine).groupBy("gene").agg(F.first("embedding").alias("embedding")).toArrow()
