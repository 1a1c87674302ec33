"""Files of single-cell counts -> `adata_rows`: each Spark task reads its own slices of cells from the file.

`.h5ad` and `.zarr` are read slice by slice, so a file larger than memory works; 10x files hold one sample and are
read whole. Every worker has to see the path.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import scanpy as sc
import scipy.sparse as sp
import zarr
from anndata.io import read_elem, sparse_dataset
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from scgpt_batch.anndata_rows import to_row
from scgpt_batch.errors import ConfigError
from scgpt_batch.settings import IngestSettings, Summary
from scgpt_batch.spark import tables

logger = logging.getLogger(__name__)

ROWS = pa.schema(
    [
        ("adata_id", pa.string()), ("x_data", pa.list_(pa.float32())), ("x_indices", pa.list_(pa.int32())),
        ("x_indptr", pa.list_(pa.int64())), ("n_obs", pa.int32()), ("n_vars", pa.int32()), ("adata_obs", pa.string()),
        ("adata_var", pa.string()), ("source", pa.string()), ("x_dtype", pa.string()),
    ]
)  # fmt: skip
ROWS_DDL = """
    adata_id STRING, x_data ARRAY<FLOAT>, x_indices ARRAY<INT>, x_indptr ARRAY<BIGINT>, n_obs INT, n_vars INT,
    adata_obs STRING, adata_var STRING, source STRING, x_dtype STRING
"""


@dataclass(frozen=True)
class CountsFile:
    """An open file of counts: obs and var in memory, cells read when asked for."""

    obs: pd.DataFrame
    var: pd.DataFrame
    x: Any  # anything that gives cells × genes for an array of positions

    def cells(self, positions: np.ndarray) -> ad.AnnData:
        """Read these cells (positions in the file, ascending), X as float32 in CSR."""
        x = sp.csr_matrix(self.x[positions])
        return ad.AnnData(x.astype(np.float32), obs=self.obs.iloc[positions], var=self.var)


@dataclass(frozen=True)
class Slice:
    """The cells of one row: a file, the group they belong to, and which of the group's cells they are."""

    path: str
    group: str | None
    start: int
    stop: int

    @property
    def adata_id(self) -> str:
        """The row's key: file, group and range of cells."""
        group = "" if self.group is None else f":{self.group}"
        return f"{Path(self.path).stem}{group}:{self.start}-{self.stop}"


def ingest(spark: SparkSession, settings: IngestSettings) -> Summary:
    """Turn files into rows; rows that the table holds already, with the same content, are skipped.

    Raises
    ------
    ConfigError
        A file is missing, unreadable or lacks a column that was asked for; nothing was written.
    """
    table = tables.table_name(settings.table)
    slices = [piece for path in _distinct_files(settings) for piece in _slices(path, settings)]
    tables.create(spark, table, tables.ADATA_ROWS)
    plan = spark.createDataFrame(
        [(s.path, s.group, s.start, s.stop) for s in slices], "p STRING, g STRING, a INT, b INT"
    )
    rows = (
        plan.repartition(min(len(slices), 64))
        .mapInArrow(_read_slices(settings.split_by, settings.gene_symbols), ROWS_DDL)
        .withColumns({"adata_sparsematrix": F.lit(None).cast("array<array<double>>")})
        .withColumns({"content_hash": tables.content_hash(), "ingested_at": F.current_timestamp()})
    )
    rows = rows.persist(StorageLevel.DISK_ONLY)  # the files are read once
    try:
        _refuse_other_source(spark, table, rows)
        changed = tables.upsert_rows(spark, table, rows)
    finally:
        rows.unpersist()
    return {
        "table": table,
        "rows": changed,
        "cells": sum(piece.stop - piece.start for piece in slices),
        "rows_skipped": len(slices) - changed,
    }


def open_counts(path: Path, gene_symbols: str = "") -> CountsFile:
    """Open a file of counts, var indexed by symbols where `gene_symbols` names their column.

    Raises
    ------
    ConfigError
        It cannot be read as .h5ad, .zarr, 10x .h5 or 10x mtx folder, or has no such column.
    """
    try:
        file = _open(path)
    except ConfigError:
        raise
    except Exception as exc:  # h5py, zarr, scanpy and anndata raise many types for one fact: it is no such file
        raise ConfigError(f"{path} cannot be read as {_kind(path)}: {exc}") from exc
    if not gene_symbols:
        return file
    if gene_symbols not in file.var:
        raise ConfigError(
            f"{path}: var has no column {gene_symbols!r}; it has {', '.join(map(repr, file.var)) or 'none'}"
        )
    var = file.var.set_index(ad.utils.make_index_unique(pd.Index(file.var[gene_symbols].astype(str))))
    return CountsFile(file.obs, var, file.x)


def _open(path: Path) -> CountsFile:
    kind = _kind(path)
    if kind == "10x .h5":
        return _in_memory(sc.read_10x_h5(path))
    if kind == "10x mtx folder":
        return _in_memory(sc.read_10x_mtx(path, make_unique=False))
    group = h5py.File(path, "r") if kind == ".h5ad" else zarr.open_group(path, mode="r")
    x = group["X"]
    # a dense X is an array, a sparse one a group
    matrix = x if isinstance(x, (h5py.Dataset, zarr.Array)) else sparse_dataset(x)
    return CountsFile(read_elem(group["obs"]), read_elem(group["var"]), matrix)


def _in_memory(adata: ad.AnnData) -> CountsFile:
    adata.var_names_make_unique()
    return CountsFile(adata.obs, adata.var, sp.csr_matrix(adata.X))


def _kind(path: Path) -> str:
    if path.is_dir():
        return ".zarr" if path.suffix == ".zarr" or (path / ".zgroup").exists() else "10x mtx folder"
    kinds = {".h5ad": ".h5ad", ".h5": "10x .h5"}
    if path.suffix not in kinds:
        raise ConfigError(f"{path} is no .h5ad, .zarr, 10x .h5 or 10x mtx folder")
    return kinds[path.suffix]


def _distinct_files(settings: IngestSettings) -> list[Path]:
    paths = [Path(name).absolute() for name in settings.input]
    for path in paths:
        if not path.exists():
            raise ConfigError(f"no file {path}")
    stems = [path.stem for path in paths]
    for path, stem in zip(paths, stems, strict=True):
        if stems.count(stem) > 1:
            raise ConfigError(f"two input files are called {stem!r}: rows are keyed by it, so rename {path}")
    return paths


def _slices(path: Path, settings: IngestSettings) -> list[Slice]:
    file = open_counts(path, settings.gene_symbols)
    slices = []
    for group, positions in _groups(file, path, settings.split_by).items():
        for start in range(0, len(positions), settings.cells_per_row):
            stop = min(start + settings.cells_per_row, len(positions))
            slices.append(Slice(str(path), group, start, stop))
    return slices


def _groups(file: CountsFile, path: Path, split_by: str) -> dict[str | None, np.ndarray]:
    """Positions of the cells of each value of the column `split_by`; of all cells without one."""
    if not split_by:
        return {None: np.arange(len(file.obs))}
    if split_by not in file.obs:
        raise ConfigError(f"{path}: obs has no column {split_by!r}; it has {', '.join(map(repr, file.obs)) or 'none'}")
    labels = file.obs[split_by].astype(object).where(file.obs[split_by].notna(), "").astype(str).to_numpy()
    return {value: np.flatnonzero(labels == value) for value in sorted(set(labels))}


def _read_slices(split_by: str, gene_symbols: str) -> Any:
    """Return a function for `mapInArrow`: slices in, rows out, one at a time."""

    def open_with_groups(path: str) -> tuple[CountsFile, dict[str | None, np.ndarray]]:
        file = open_counts(Path(path), gene_symbols)
        return file, _groups(file, Path(path), split_by)

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        opened = lru_cache(maxsize=1)(open_with_groups)
        for batch in batches:
            for given in batch.to_pylist():
                piece = Slice(given["p"], given["g"], given["a"], given["b"])
                file, groups = opened(piece.path)
                row = to_row(file.cells(groups[piece.group][piece.start : piece.stop]))
                row |= {"adata_id": piece.adata_id, "source": piece.path}
                yield pa.RecordBatch.from_arrays([pa.array([row[f.name]], f.type) for f in ROWS], schema=ROWS)

    return run


def _refuse_other_source(spark: SparkSession, table: str, rows: DataFrame) -> None:
    """Refuse to replace rows that came from another file of the same name."""
    there = tables.read(spark, table, tables.ADATA_ROWS).select(
        "adata_id", F.col("source").alias("held"), F.col("content_hash").alias("held_hash")
    )
    new = rows.select("adata_id", "source", "content_hash")
    other = new.join(there, "adata_id").where("source <> held AND content_hash <> held_hash").first()
    if other:
        raise ConfigError(
            f"{table} holds row {other['adata_id']!r} from {other['held']}, which {other['source']} would replace: "
            "rename the file or take another table"
        )
