"""One run of the embedding job: what it reads, with which model and parameters, and where its results go."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

import scgpt_batch
from scgpt_batch.parameters import Parameters
from scgpt_batch.registry.resolve import ResolvedModel
from scgpt_batch.settings import EmbedSettings
from scgpt_batch.spark import tables


@dataclass
class Job:
    """One run: its input, model, parameters and output tables."""

    spark: SparkSession
    settings: EmbedSettings
    parameters: Parameters
    model: ResolvedModel
    input: str
    input_snapshot: tables.Snapshot | None  # which the whole run reads; None for a view
    output: str
    ledger: str
    runs: str
    started: datetime
    run_id: str = ""
    package_version: str = scgpt_batch.__version__
    created: set[str] = field(default_factory=set)  # tables that did not exist before
    ledger_commits: int = 0  # that this run has made
    warnings: Counter[str] = field(default_factory=Counter)  # rows by kind of warning
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("rows_in", "rows_ok", "rows_failed", "rows_skipped", "rows_removed", "cells", "embeddings"), 0
        )
    )

    @property
    def stamps(self) -> dict[str, str]:
        """Columns that identify the run's results in every table."""
        return {
            "mode": self.parameters.mode,
            "model_name": self.model.name,
            "model_version": self.model.version,
            "params_hash": self.parameters.params_hash(),
        }

    @property
    def stamped(self) -> str:
        """The stamps as an SQL condition."""
        return " AND ".join(f"{name} = {tables.literal(value)}" for name, value in self.stamps.items())

    @property
    def columns(self) -> str:
        """The columns of the output table (DDL)."""
        return tables.CELL_EMBEDDINGS if self.parameters.mode == "cell" else tables.GENE_EMBEDDINGS

    @property
    def key(self) -> tuple[str, ...]:
        """The columns that identify a line of the output table."""
        return tables.CELL_KEY if self.parameters.mode == "cell" else tables.GENE_KEY

    @property
    def samples(self) -> bool:
        """Whether the results of a sample's rows depend on each other: shared decisions, or shared means."""
        return self.parameters.need_preprocess or self.parameters.mode == "contextual"

    @property
    def input_version(self) -> int | None:
        """The input's version that the whole run reads; None for a view."""
        return None if self.input_snapshot is None else self.input_snapshot.version

    def output_snapshot(self) -> tables.Snapshot:
        """Return the output table's newest snapshot."""
        found = tables.snapshot(self.spark, self.output)
        assert found is not None  # the run has created it as a Delta table
        return found

    @property
    def rows(self) -> DataFrame:
        """The input's snapshot."""
        return tables.read(self.spark, self.input, tables.ADATA_ROWS, version=self.input_version)

    @property
    def stamp_columns(self) -> dict[str, Column]:
        """The stamps and the run's id, as columns to add."""
        return {name: F.lit(value) for name, value in {**self.stamps, "run_id": self.run_id}.items()}
