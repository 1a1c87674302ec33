"""What an embeddings table holds, and the nearest genes of some, for a person to read."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from scgpt_batch.command_result import CommandResult
from scgpt_batch.embedding_tables import MODEL, nearest
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


def summarize(spark: Any, settings: SummarySettings) -> SummaryResult:
    """Count what an embeddings table holds and find the nearest genes of some."""
    from pyspark.sql import functions as F

    from scgpt_batch.spark import tables

    table = tables.table_name(settings.output_table)
    ledger_table = tables.beside(table, "_ledger")
    lines = tables.read(spark, table, tables.GENE_EMBEDDINGS)
    rows = embedded_rows(tables.read(spark, ledger_table, tables.LEDGER))
    counted = lines.groupBy(*MODEL).agg(F.countDistinct("gene").alias("genes"), F.count("*").alias("embeddings"))
    of_rows = rows.groupBy(*MODEL).agg(F.count("*").alias("rows"), F.sum("cells").alias("cells"))
    counted = counted.join(of_rows, [*MODEL], "left").orderBy(*MODEL)
    models = [line.asDict() for line in counted.fillna(0, ["rows", "cells"]).collect()]
    genes = lines.agg(F.countDistinct("gene")).collect()[0][0]
    # a row that was embedded in several modes, or by several models, counts once
    once = rows.groupBy("adata_id").agg(F.max_by("cells", "at").alias("cells"))
    n_rows, cells = once.agg(F.count("*"), F.coalesce(F.sum("cells"), F.lit(0))).collect()[0]
    names, vectors = _newest_static_vectors(lines)
    return SummaryResult(
        output_table=table,
        ledger_table=ledger_table,
        rows=n_rows,
        cells=cells,
        genes=genes,
        embeddings=sum(model["embeddings"] for model in models),
        models=models,
        nearest_genes=_nearest_genes(names, vectors, settings),
        similar_genes={
            gene: did_you_mean(gene, names, cutoff=GENE_CUTOFF) for gene in settings.genes if gene not in names
        },
    )


def _nearest_genes(
    names: list[str], vectors: np.ndarray, settings: SummarySettings
) -> dict[str, list[tuple[str, float]]]:
    """Return the nearest genes of each, nearest first; none for a gene that is not in the table."""
    present = [gene for gene in dict.fromkeys(settings.genes) if gene in names]
    found: dict[str, list[tuple[str, float]]] = {gene: [] for gene in settings.genes}
    for row in nearest(pd.Index(names), vectors, present, settings.neighbours).itertuples() if present else ():
        found[row.gene].append((row.neighbour, float(row.similarity)))
    return found


def embedded_rows(ledger: Any) -> Any:
    """Return the ledger's line of each row, mode, model and parameters, if the last of them is "ok".

    A row whose content changed has a line for each content: the last one counts.
    """
    from pyspark.sql import functions as F

    last = ledger.groupBy("adata_id", *MODEL).agg(
        F.max_by(F.struct("status", "cells"), "at").alias("last"), F.max("at").alias("at")
    )
    return last.where("last.status = 'ok'").select("adata_id", *MODEL, "last.cells", "at")


def _newest_static_vectors(lines: Any) -> tuple[list[str], np.ndarray]:
    """Return genes and their static vectors, of the model that wrote last."""
    from pyspark.sql import functions as F

    static = lines.where("mode = 'static'")
    last = static.groupBy(*MODEL).agg(F.max("embedded_at").alias("at")).orderBy(F.desc("at")).limit(1)
    # a static vector is the same in every row: one of each gene
    one = static.join(last, [*MODEL]).groupBy("gene").agg(F.first("embedding").alias("embedding")).toArrow()
    return one["gene"].to_pylist(), np.array(one["embedding"].to_pylist(), np.float32)
