"""Files of single-cell counts -> rows: planned without reading a matrix, read slice by slice of cells.

`.h5ad` and `.zarr` are never held whole, so a file may be larger than memory; 10x files hold one sample and are read
whole, by one task. Nothing here knows Spark.
"""

import glob
import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.io import sparse_dataset
from pydantic import BaseModel, ConfigDict, Field

from scgpt_batch.anndata_rows import to_row
from scgpt_batch.errors import ConfigError, FileError
from scgpt_batch.io.annotations import open_annotations
from scgpt_batch.io.hdf5_safety import open_hdf5

PARTITION_CELLS = 5_000  # of a task: some seconds of reading, some 100 MB
CSC_PARTITION_VALUES = 50_000_000  # the same where X lies gene by gene and each task reads all of it; 1 GB of memory
CSC_BLOCK_VALUES = 10_000_000  # of X in memory at a time while such a file is read


class ReadOptions(BaseModel):
    """How a file becomes rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cells_per_row: int = Field(1000, ge=1)
    split_by: str = ""  # obs column: cells of different values never share a row
    gene_symbols: str = ""  # var column that holds the gene symbols


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


class Backed:
    """An open .h5ad or .zarr: only what is asked for is read."""

    def __init__(self, group: Any) -> None:
        self.group = group
        x = group["X"]
        # a dense X is an array, a sparse one a group
        self.x: Any = x if isinstance(x, (h5py.Dataset, zarr.Array)) else sparse_dataset(x)
        uns = group.get("uns")
        self.obs_table, self.var_table = open_annotations(group, "obs", uns), open_annotations(group, "var", uns)
        self.n_obs = int(self.x.shape[0])
        if tuple(self.x.shape) != (self.obs_table.n, self.var_table.n):
            raise FileError(
                f"X is {' × '.join(map(str, self.x.shape))}, but obs has {self.obs_table.n} cells and var "
                f"{self.var_table.n} genes"
            )
        self.by_gene = getattr(self.x, "format", None) == "csc"

    @property
    def partition_cells(self) -> int:
        """How many cells a task takes."""
        if not self.by_gene:
            return PARTITION_CELLS
        return max(1, self.n_obs * CSC_PARTITION_VALUES // max(1, self.group["X/data"].shape[0]))

    def columns(self, table: str) -> list[str]:
        """Name the columns of obs or var."""
        return {"obs": self.obs_table, "var": self.var_table}[table].columns

    def labels(self, column: str) -> pd.Series:
        """Read one column of obs, and no other."""
        return self.obs_table.column(column)

    def var(self) -> pd.DataFrame:
        """Read the table of genes."""
        return self.var_table.read()

    def names(self, positions: np.ndarray) -> np.ndarray:
        """Read the names of these cells."""
        return self.obs_table.names(positions)

    def obs(self, positions: np.ndarray) -> pd.DataFrame:
        """Read the table of these cells."""
        return self.obs_table.read(positions)

    def matrices(self, rows: Sequence[np.ndarray]) -> Iterator[Any]:
        """Read X of each row's cells."""
        if not self.by_gene:
            yield from (self.x[_range(positions)] for positions in rows)
            return
        every = self._pass_by_gene(np.concatenate(rows))
        ends = np.cumsum([len(positions) for positions in rows])
        yield from (every[start:stop] for start, stop in pairwise([0, *ends]))

    def _pass_by_gene(self, positions: np.ndarray) -> sp.csr_matrix:
        """Pick cells from an X that lies gene by gene: one pass over it, in blocks of genes."""
        ends = np.asarray(self.group["X/indptr"])
        starts = np.searchsorted(ends, np.arange(0, ends[-1], CSC_BLOCK_VALUES), side="right") - 1
        edges = np.unique([0, *starts, self.x.shape[1]])
        return sp.hstack([self.x[:, first:last][positions] for first, last in pairwise(edges)], format="csr")


class TenX:
    """A 10x .h5 or mtx folder: planned by its list of cells, read whole."""

    by_gene = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_obs = _count_barcodes(path)
        self.partition_cells = self.n_obs
        self._adata: ad.AnnData | None = None

    @property
    def adata(self) -> ad.AnnData:
        """The file's content."""
        if self._adata is None:
            import scanpy as sc  # seconds to import, for each Python process of Spark, and only 10x files need it

            folder = self.path.is_dir()
            self._adata = sc.read_10x_mtx(self.path, make_unique=False) if folder else sc.read_10x_h5(self.path)
            self._adata.X = sp.csr_matrix(self._adata.X)
        return self._adata

    def columns(self, table: str) -> list[str]:
        """Name the columns of obs (there are none) or var."""
        return list(self.adata.var) if table == "var" else []

    def labels(self, column: str) -> pd.Series:
        """Read one column of obs."""
        return self.adata.obs[column]

    def var(self) -> pd.DataFrame:
        """The table of genes."""
        return self.adata.var

    def names(self, positions: np.ndarray) -> np.ndarray:
        """The names of these cells."""
        return self.adata.obs_names[positions].to_numpy(object)

    def obs(self, positions: np.ndarray) -> pd.DataFrame:
        """The table of these cells."""
        return self.adata.obs.iloc[positions]

    def matrices(self, rows: Sequence[np.ndarray]) -> Iterator[Any]:
        """X of each row's cells."""
        yield from (self.adata.X[positions] for positions in rows)


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Resolve paths and globs to files, each with a name of its own.

    Raises
    ------
    ConfigError
        There is no such file, or two have the same name.
    """
    paths: list[Path] = []
    for pattern in patterns:  # absolute ones too, which Path.glob does not take
        plain = pattern.removeprefix("file://").removeprefix("file:")
        found = [plain] if Path(plain).exists() else sorted(glob.glob(plain))  # noqa: PTH207
        if not found:
            raise ConfigError(f"no file {plain}")
        paths += [Path(name).absolute() for name in found]
    stems = [path.stem for path in paths]
    for path, stem in zip(paths, stems, strict=True):
        if stems.count(stem) > 1:
            raise ConfigError(f"two input files are called {stem!r}: rows are keyed by it, so rename {path}")
    return paths


def plan(patterns: Sequence[str], options: ReadOptions) -> list[list[Slice]]:
    """Cut files into rows and rows into tasks; reads a count of cells, and one column where `split_by` asks for it.

    Raises
    ------
    ConfigError
        A file is missing, unreadable or lacks a column that was asked for.
    """
    return [task for path in find_files(patterns) for task in _tasks(path, options)]


def read(slices: Sequence[Slice], options: ReadOptions) -> Iterator[dict[str, Any]]:
    """Read the rows of one task, all of one file: payload columns with adata_id and source.

    Raises
    ------
    FileError
        The file cannot be read; the message names it.
    """
    path = Path(slices[0].path)
    try:
        yield from _read(path, slices, options)
    except (ConfigError, FileError) as exc:
        raise type(exc)(str(exc) if str(path) in str(exc) else f"{path}: {exc}") from exc


def _read(path: Path, slices: Sequence[Slice], options: ReadOptions) -> Iterator[dict[str, Any]]:
    file = open_counts(path, options)
    groups = _groups(file, options.split_by)
    rows = [groups[piece.group][piece.start : piece.stop] for piece in slices]
    for piece, positions in zip(slices, rows, strict=True):
        if len(positions) != piece.stop - piece.start:
            raise FileError(f"{path} changed while it was read: row {piece.adata_id} has {len(positions)} cells")
    var, obs = _genes(file, options.gene_symbols), file.obs(np.concatenate(rows))
    _check_identity(path, obs, file.names(np.concatenate(rows)))
    first = 0
    for piece, positions, x in zip(slices, rows, file.matrices(rows), strict=True):
        if x.shape != (len(positions), len(var)):
            raise FileError(f"{path}: X of row {piece.adata_id} is {x.shape}, not {(len(positions), len(var))}")
        cells = obs.iloc[first : first + len(positions)]
        first += len(positions)
        adata = ad.AnnData(sp.csr_matrix(x).astype(np.float32), obs=cells, var=var)
        yield to_row(adata) | {"adata_id": piece.adata_id, "source": piece.path}


def _check_identity(path: Path, obs: pd.DataFrame, names: np.ndarray) -> None:
    """Refuse a table of cells whose rows are not the cells that were asked for."""
    if len(obs) != len(names) or (obs.index.to_numpy(object) != names).any():
        raise FileError(f"{path}: obs was read for {len(names)} cells, but returned {len(obs)} rows or other cells")


def open_counts(path: Path, options: ReadOptions) -> Backed | TenX:
    """Open a file of counts that has the columns which the options name.

    Raises
    ------
    ConfigError
        It cannot be read as .h5ad, .zarr, 10x .h5 or 10x mtx folder, or lacks such a column.
    """
    kind = _kind(path)
    try:
        file = _open(path, kind)
        for table, column in (("obs", options.split_by), ("var", options.gene_symbols)):
            if column and column not in (there := file.columns(table)):
                raise ConfigError(
                    f"{path}: {table} has no column {column!r}; it has {', '.join(map(repr, there)) or 'none'}"
                )
    except ConfigError:
        raise
    except Exception as exc:  # h5py, zarr, scanpy and anndata raise many types for one fact: it is no such file
        raise ConfigError(f"{path} cannot be read as {kind}: {exc}") from exc
    return file


def _open(path: Path, kind: str) -> Backed | TenX:
    if kind.startswith("10x"):
        if path.is_file():
            open_hdf5(path).close()
        return TenX(path)
    return Backed(open_hdf5(path, sliced=("X",)) if kind == ".h5ad" else zarr.open_group(path, mode="r"))


def _kind(path: Path) -> str:
    if path.is_dir():
        is_zarr = path.suffix == ".zarr" or any((path / name).exists() for name in (".zgroup", "zarr.json"))
        return ".zarr" if is_zarr else "10x mtx folder"
    kinds = {".h5ad": ".h5ad", ".h5": "10x .h5"}
    if path.suffix not in kinds:
        raise ConfigError(f"{path} is no .h5ad, .zarr, 10x .h5 or 10x mtx folder")
    return kinds[path.suffix]


def _count_barcodes(path: Path) -> int:
    """Count the cells of a 10x file without its matrix."""
    if path.is_dir():
        names = [path / name for name in ("barcodes.tsv.gz", "barcodes.tsv") if (path / name).exists()]
        if not names:
            raise ConfigError(f"{path} is no 10x mtx folder: it holds no barcodes.tsv.gz")
        with gzip.open(names[0]) if names[0].suffix == ".gz" else names[0].open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    with h5py.File(path, "r") as file:
        return int(next(iter(file.values()))["barcodes"].shape[0])


def _tasks(path: Path, options: ReadOptions) -> Iterator[list[Slice]]:
    file = open_counts(path, options)
    task: list[Slice] = []
    cells = 0
    for piece in _slices(path, _groups(file, options.split_by), options.cells_per_row):
        if task and cells + piece.stop - piece.start > file.partition_cells:
            yield task
            task, cells = [], 0
        task.append(piece)
        cells += piece.stop - piece.start
    if task:
        yield task


def _slices(path: Path, groups: dict[str | None, np.ndarray], cells_per_row: int) -> Iterator[Slice]:
    for group, positions in groups.items():
        for start in range(0, len(positions), cells_per_row):
            yield Slice(str(path), group, start, min(start + cells_per_row, len(positions)))


def _groups(file: Backed | TenX, split_by: str) -> dict[str | None, np.ndarray]:
    """Positions of the cells of each value of the column `split_by`; of all cells without one."""
    if not split_by:
        return {None: np.arange(file.n_obs)}
    column = file.labels(split_by)
    labels = column.astype(object).where(column.notna(), "").astype(str).to_numpy()
    return {value: np.flatnonzero(labels == value) for value in sorted(set(labels))}


def _genes(file: Backed | TenX, gene_symbols: str) -> pd.DataFrame:
    """Read var, named by symbols where asked for; of equal names the later ones get -1, -2, as scanpy does."""
    var = file.var()
    names = pd.Index((var[gene_symbols] if gene_symbols else var.index.to_series()).astype(str))
    return var.set_index(ad.utils.make_index_unique(names))


def _range(positions: np.ndarray) -> Any:
    """Say neighbouring positions as a slice, which files read faster."""
    first, last = int(positions[0]), int(positions[-1]) + 1
    return slice(first, last) if last - first == len(positions) else positions
