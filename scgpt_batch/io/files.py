"""Files of single-cell counts -> rows: planned without reading a matrix, read slice by slice of cells.

Files are never held whole, so one may be larger than memory; only text matrices (10x mtx) are read whole, by one task.
Nothing here knows Spark.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from scgpt_batch.errors import ConfigError, FileError, plain_line
from scgpt_batch.io.layers import AUTO
from scgpt_batch.io.locations import ID_FROM, find_sources, name_sources, stem
from scgpt_batch.io.open_file import CountsFile, named_errors, open_counts
from scgpt_batch.io.rows import MISSING_LABEL, string_labels, to_row
from scgpt_batch.io.tenx import TenXFolder

PARTITION_CELLS = 5_000  # of a task: some seconds of reading, some 100 MB
CSC_PARTITION_VALUES = 50_000_000  # the same where X is stored by gene and each task reads all of it; 1 GB of memory
CSC_BLOCK_VALUES = 10_000_000  # of X in memory at a time while such a file is read
NAMES_BLOCK = 100_000  # names of cells in memory at a time while repeated ones are looked for

ONE_A_FILE, NO_SAMPLE = "file", "none"

_LIKE_AN_ADATA_ID = re.compile(r".*:\d+-\d+", re.DOTALL)


class ReadOptions(BaseModel):
    """How a file becomes rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cells_per_row: int = Field(1000, ge=1)
    split_by: str = ""  # obs column: cells of different values never share a row
    gene_symbols: str = ""  # var column that holds the gene symbols
    layer: str = AUTO  # X, raw, the name of a layer, or auto
    sample_id: str = ONE_A_FILE  # file, none, or the obs column that says which sample a cell belongs to
    id_from: str = Field("name", pattern="|".join(ID_FROM))

    @property
    def obs_columns(self) -> list[str]:
        """The obs columns whose values separate rows."""
        sample = [] if self.sample_id in (ONE_A_FILE, NO_SAMPLE) else [self.sample_id]
        return list(dict.fromkeys([self.split_by] * bool(self.split_by) + sample))


@dataclass(frozen=True)
class Slice:
    """The cells of one row: a file, the group they belong to, and which of the group's cells they are.

    Attributes
    ----------
    path
        The file.
    group
        Label of the group; None where all cells are in one.
    start, stop
        The range among the group's cells.
    name
        The file's readable name; empty: its stem.
    sample_id
        The sample that the cells belong to.
    layer
        The matrix to read.
    file_cells
        Cells of the whole file.
    renamed
        Cells whose name another cell of the file has: index in the row, and the unique name.
    notes
        What a person should know about the file.
    """

    path: str
    group: str | None
    start: int
    stop: int
    name: str = ""
    sample_id: str | None = None
    layer: str = "X"
    file_cells: int = 0
    renamed: tuple[tuple[int, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def adata_id(self) -> str:
        """The row's key: file, group and range of cells."""
        group = "" if self.group is None else f":{self.group}"
        return f"{self.name or stem(self.path)}{group}:{self.start}-{self.stop}"


@dataclass(frozen=True)
class Group:
    """Cells of a file that may share a row."""

    label: str | None
    sample_id: str | None
    positions: np.ndarray


def plan(patterns: Sequence[str], options: ReadOptions, names: Mapping[str, str] | None = None) -> list[list[Slice]]:
    """Cut files into rows and rows into tasks; reads names of cells, a sample of X, and the columns asked for.

    Parameters
    ----------
    patterns
        Paths, globs and URIs.
    options
        How files become rows.
    names
        The readable name of each file; default: names that tell these files apart.

    Raises
    ------
    ConfigError
        A file is missing, is of an unsupported format, or lacks a column or layer that was asked for.
    FileError
        A file cannot be read.
    """
    sources = find_sources(patterns)
    names = names or name_sources(sources, options.id_from)
    return [task for source in sources for task in plan_file(source, names[source], options)]


def plan_file(source: str, name: str, options: ReadOptions) -> list[list[Slice]]:
    """Cut one file into rows and rows into tasks.

    Raises
    ------
    ConfigError, FileError
        As `plan`.
    """
    with open_counts(source, options.layer) as file:
        _check_columns(file, options)
        if not file.n_obs:
            raise FileError("contains no cells")
        renamed = repeated_names(file)
        notes = [f"{file.layer} is read: {file.reason}"]
        if renamed:
            notes.append(f"{len(renamed)} cells have the name of another; the later ones get -1, -2, ...")
        return list(_tasks(source, name, file, options, renamed, tuple(notes)))


def read(slices: Sequence[Slice], options: ReadOptions) -> Iterator[dict[str, Any]]:
    """Read the rows of one task, all of one file: payload columns with adata_id, sample_id and source.

    Raises
    ------
    ConfigError, FileError
        The file cannot be read; the message names it.
    """
    source = slices[0].path
    with named_errors(source), open_counts(source, slices[0].layer) as file:
        if file.n_obs != slices[0].file_cells:
            raise FileError(f"changed while it was read: {slices[0].file_cells} cells are now {file.n_obs}")
        groups = {group.label: group.positions for group in _groups(slices[0].name, file, options)}
        rows = [_positions(piece, groups) for piece in slices]
        every = np.concatenate(rows)
        obs, var = file.obs(every), _genes(file, options.gene_symbols)
        _check_identity(obs, file.names(every))
        first = 0
        for piece, positions, x in zip(slices, rows, file.matrices(rows, CSC_BLOCK_VALUES), strict=True):
            if x.shape != (len(positions), len(var)):
                raise FileError(f"{piece.layer} of row {piece.adata_id} is {x.shape}, not {(len(positions), len(var))}")
            cells = _renamed(obs.iloc[first : first + len(positions)], piece)
            first += len(positions)
            notes: list[str] = list(piece.notes)
            row = to_row(ad.AnnData(x, obs=cells, var=var, uns=file.uns), warnings=notes)
            key = {"adata_id": piece.adata_id, "sample_id": piece.sample_id, "source": piece.path}
            yield row | key | {"layer": piece.layer, "notes": [plain_line(note) for note in notes]}


def repeated_names(file: CountsFile) -> dict[int, str]:
    """Find the cells whose name an earlier cell has; give each a name of its own, as `obs_names_make_unique` does."""
    blocks = [np.arange(first, min(first + NAMES_BLOCK, file.n_obs)) for first in range(0, file.n_obs, NAMES_BLOCK)]
    hashes = np.concatenate([pd.util.hash_array(file.names(block), categorize=False) for block in blocks])
    repeated = np.flatnonzero(pd.Series(hashes).duplicated(keep=False))
    if not len(repeated):
        return {}
    every = np.sort(hashes)
    times: dict[str, int] = {}
    renamed: dict[int, str] = {}
    given: set[str] = set()
    for position, name in zip(repeated.tolist(), file.names(repeated), strict=True):
        if name not in times:
            times[name] = 0
            continue
        while True:
            times[name] += 1
            unique = f"{name}-{times[name]}"
            if unique not in given and not _contains(every, unique):
                break
        given.add(unique)
        renamed[position] = unique
    return renamed


def _contains(hashes: np.ndarray, name: str) -> bool:
    (wanted,) = pd.util.hash_array(np.array([name], dtype=object), categorize=False)
    at = np.searchsorted(hashes, wanted)
    return bool(at < len(hashes) and hashes[at] == wanted)


def _check_columns(file: CountsFile, options: ReadOptions) -> None:
    wanted = [("obs", column) for column in options.obs_columns]
    for table, column in [*wanted, *([("var", options.gene_symbols)] if options.gene_symbols else [])]:
        if column not in (there := file.columns(table)):
            raise ConfigError(f"{table} has no column {column!r}; it has {', '.join(map(repr, there)) or 'none'}")


def _tasks(
    source: str, name: str, file: CountsFile, options: ReadOptions, renamed: Mapping[int, str], notes: tuple[str, ...]
) -> Iterator[list[Slice]]:
    task: list[Slice] = []
    cells, most = 0, _partition_cells(file)
    for group in _groups(name, file, options):
        for start in range(0, len(group.positions), options.cells_per_row):
            stop = min(start + options.cells_per_row, len(group.positions))
            if task and cells + stop - start > most:
                yield task
                task, cells = [], 0
            new = _new_names(group.positions[start:stop], renamed)
            task.append(
                Slice(source, group.label, start, stop, name, group.sample_id, file.layer, file.n_obs, new, notes)
            )
            cells += stop - start
    if task:
        yield task


def _new_names(positions: np.ndarray, renamed: Mapping[int, str]) -> tuple[tuple[int, str], ...]:
    if not renamed:
        return ()
    return tuple((i, renamed[position]) for i, position in enumerate(positions.tolist()) if position in renamed)


def _partition_cells(file: CountsFile) -> int:
    """How many cells a task takes."""
    if isinstance(file, TenXFolder):
        return file.n_obs
    if not file.is_csc:
        return PARTITION_CELLS
    return max(1, file.n_obs * CSC_PARTITION_VALUES // max(1, file.stored_values))


def _groups(name: str, file: CountsFile, options: ReadOptions) -> list[Group]:
    """Group a file's cells by the columns that separate rows, and say which sample each group belongs to."""
    columns = options.obs_columns
    if not columns:
        return [Group(None, _sample(name, None, options, ()), np.arange(file.n_obs))]
    labels = pd.DataFrame({column: string_labels(file.labels(column)) for column in columns})
    groups = []
    for values, positions in labels.groupby(columns, sort=True).indices.items():
        parts = values if isinstance(values, tuple) else (values,)
        label = ":".join(parts)
        groups.append(Group(label, _sample(name, label, options, parts), np.sort(positions)))
    if len({group.label for group in groups}) != len(groups):
        raise ConfigError(f"values of {' and '.join(columns)} give two groups one label; a value contains ':'")
    return groups


def _sample(name: str, label: str | None, options: ReadOptions, values: Sequence[str]) -> str | None:
    """Name the sample of a group; never like a row's id, which ends in a range of cells."""
    if options.sample_id == NO_SAMPLE:
        return None
    if options.sample_id == ONE_A_FILE:
        sample = name if label is None else f"{name}:{label}"
    else:
        value = values[options.obs_columns.index(options.sample_id)]
        sample = f"{name}:{MISSING_LABEL}" if value == MISSING_LABEL else value
    return f"{sample}:" if _LIKE_AN_ADATA_ID.fullmatch(sample) else sample


def _positions(piece: Slice, groups: Mapping[str | None, np.ndarray]) -> np.ndarray:
    found = groups.get(piece.group, np.empty(0, np.int64))[piece.start : piece.stop]
    if len(found) != piece.stop - piece.start:
        raise FileError(f"changed while it was read: row {piece.adata_id} has {len(found)} cells")
    return found


def _check_identity(obs: pd.DataFrame, names: np.ndarray) -> None:
    """Refuse a table of cells whose rows are not the cells that were asked for."""
    if len(obs) != len(names) or (obs.index.to_numpy(object) != names).any():
        raise FileError(f"obs was read for {len(names)} cells, but returned {len(obs)} rows or other cells")


def _renamed(obs: pd.DataFrame, piece: Slice) -> pd.DataFrame:
    if not piece.renamed:
        return obs
    names = obs.index.to_numpy(object).copy()
    for i, name in piece.renamed:
        names[i] = name
    return obs.set_index(pd.Index(names, dtype=object))


def _genes(file: CountsFile, gene_symbols: str) -> pd.DataFrame:
    """Read var, named by symbols where asked for; a missing name is empty, and repeated names stay."""
    var = file.var()
    if not gene_symbols:
        return var
    symbols = var[gene_symbols].astype(object)
    return var.set_index(pd.Index(symbols.where(symbols.notna(), "").astype(str), dtype=object))
