"""Conversion of single-cell count files into rows: `plan` divides files into tasks, `read` returns the rows of a task.

A file is read in slices of cells, so it may be larger than memory. The exception are 10x text matrices (.mtx), which
one task reads completely.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from scgpt_batch.errors import ConfigError, FileError, listed, plain_line
from scgpt_batch.io.layers import AUTO
from scgpt_batch.io.locations import ID_FROM, find_sources, name_sources, stem
from scgpt_batch.io.open_file import CountsFile, named_errors, open_counts
from scgpt_batch.io.rows import MISSING_LABEL, string_labels, to_row
from scgpt_batch.io.tenx import TenXFolder

PARTITION_CELLS = 5_000  # cells per task: a few seconds of reading, about 100 MB
CSC_PARTITION_VALUES = 50_000_000  # values per task if X is stored gene by gene; about 1 GB of memory
CSC_BLOCK_VALUES = 10_000_000  # values in memory at a time while such an X is read
NAMES_BLOCK = 100_000  # cell names in memory at a time during the search for repeated names

ONE_A_FILE, NO_SAMPLE = "file", "none"

_LIKE_AN_ADATA_ID = re.compile(r".*:\d+-\d+", re.DOTALL)


class ReadOptions(BaseModel):
    """How files are divided into rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cells_per_row: int = Field(1000, ge=1)
    split_by: str = ""  # obs column; cells with different values never share a row
    gene_symbols: str = ""  # var column with the gene symbols; empty: var_names
    layer: str = AUTO  # X, raw, the name of a layer, or auto
    sample_id: str = ONE_A_FILE  # "file", "none", or an obs column with the sample of each cell
    id_from: str = Field("name", pattern="|".join(ID_FROM))

    @property
    def obs_columns(self) -> list[str]:
        """The obs columns by which cells are separated into rows."""
        sample = [] if self.sample_id in (ONE_A_FILE, NO_SAMPLE) else [self.sample_id]
        return list(dict.fromkeys([self.split_by] * bool(self.split_by) + sample))


@dataclass(frozen=True)
class Slice:
    """The cells of one row: a range of cells within a group of a file.

    Attributes
    ----------
    path
        The file.
    group
        Label of the group; None if the file is not divided into groups.
    start, stop
        The range within the group.
    name
        Readable name of the file; empty: its stem.
    sample_id
        Sample of the cells; None: the row is its own sample.
    layer
        Matrix to read.
    file_cells
        Number of cells in the file, to detect that it has changed since planning.
    renamed
        New names for cells whose name is repeated in the file: pairs of index in the row and new name.
    notes
        Remarks about the file for the user, such as which matrix is read.
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
    """Divide files into tasks, each a list of slices of one file.

    Of each file this reads the cell names, a sample of the matrix, and the columns that `options` names.

    Parameters
    ----------
    patterns
        Paths, globs and URIs.
    options
        How files are divided into rows.
    names
        Readable name of each file. Default: the shortest names that are unique among these files.

    Raises
    ------
    ConfigError
        A file is missing, has an unsupported format, or lacks a column or layer that `options` names.
    FileError
        A file cannot be read.
    """
    sources = find_sources(patterns)
    names = names or name_sources(sources, options.id_from)
    return [task for source in sources for task in plan_file(source, names[source], options)]


def plan_file(source: str, name: str, options: ReadOptions) -> list[list[Slice]]:
    """Divide one file into tasks, each a list of slices.

    Raises
    ------
    ConfigError, FileError
        See `plan`.
    """
    with open_counts(source, options.layer) as file:
        _check_columns(file, options)
        if not file.n_obs:
            raise FileError("contains no cells")
        renamed = repeated_names(file)
        notes = [f"{file.layer} is read: {file.reason}"]
        if renamed:
            notes.append(f"{len(renamed)} repeated cell names get a suffix (-1, -2, ...)")
        return list(_tasks(source, name, file, options, renamed, tuple(notes)))


def read(slices: Sequence[Slice], options: ReadOptions) -> Iterator[dict[str, Any]]:
    """Yield the rows of one task, all from the same file.

    A row has the payload columns of `io.rows.to_row`, and `adata_id`, `sample_id`, `source`, `layer` and `notes`.

    Raises
    ------
    ConfigError, FileError
        The file cannot be read, or a matrix contains values that cannot be embedded, such as negative ones. The message
        names the file.
    """
    source = slices[0].path
    with named_errors(source), open_counts(source, slices[0].layer) as file:
        if file.n_obs != slices[0].file_cells:
            before, now = slices[0].file_cells, file.n_obs
            raise FileError(f"changed while it was read: it had {before} cells and now has {now}; run ingest again")
        groups = {group.label: group.positions for group in _groups(slices[0].name, file, options)}
        rows = [_positions(piece, groups) for piece in slices]
        positions_read = np.concatenate(rows)
        obs, var = file.obs(positions_read), _genes(file, options.gene_symbols)
        _check_identity(obs, file.names(positions_read))
        first = 0
        for piece, positions, x in zip(slices, rows, file.matrices(rows, CSC_BLOCK_VALUES), strict=True):
            if x.shape != (len(positions), len(var)):
                wanted = (len(positions), len(var))
                raise FileError(
                    f"row {piece.adata_id!r}: {piece.layer} was read with the shape {x.shape}, not {wanted}"
                )
            cells = _renamed(obs.iloc[first : first + len(positions)], piece)
            first += len(positions)
            notes: list[str] = list(piece.notes)
            row = to_row(ad.AnnData(x, obs=cells, var=var, uns=file.uns), warnings=notes)
            key = {"adata_id": piece.adata_id, "sample_id": piece.sample_id, "source": piece.path}
            yield row | key | {"layer": piece.layer, "notes": [plain_line(note) for note in notes]}


def repeated_names(file: CountsFile) -> dict[int, str]:
    """Return new unique names for the cells whose name repeats that of an earlier cell, by position in the file.

    The names equal those of `AnnData.obs_names_make_unique`. Only hashes of the names are kept in memory.
    """
    blocks = [np.arange(first, min(first + NAMES_BLOCK, file.n_obs)) for first in range(0, file.n_obs, NAMES_BLOCK)]
    hashes = np.concatenate([pd.util.hash_array(file.names(block), categorize=False) for block in blocks])
    repeated = np.flatnonzero(pd.Series(hashes).duplicated(keep=False))
    if not len(repeated):
        return {}
    sorted_hashes = np.sort(hashes)
    suffixes: dict[str, int] = {}
    renamed: dict[int, str] = {}
    new_names: set[str] = set()
    for position, name in zip(repeated.tolist(), file.names(repeated), strict=True):
        if name not in suffixes:
            suffixes[name] = 0
            continue
        while True:
            suffixes[name] += 1
            unique = f"{name}-{suffixes[name]}"
            if unique not in new_names and not _contains(sorted_hashes, unique):
                break
        new_names.add(unique)
        renamed[position] = unique
    return renamed


def _contains(hashes: np.ndarray, name: str) -> bool:
    (wanted,) = pd.util.hash_array(np.array([name], dtype=object), categorize=False)
    at = np.searchsorted(hashes, wanted)
    return bool(at < len(hashes) and hashes[at] == wanted)


def _check_columns(file: CountsFile, options: ReadOptions) -> None:
    wanted = [("obs", column) for column in options.obs_columns]
    for table, column in [*wanted, *([("var", options.gene_symbols)] if options.gene_symbols else [])]:
        if column not in (columns := file.columns(table)):
            raise ConfigError(f"{table} has no column {column!r}; its columns: {listed(columns, column)}")


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
    """Return the maximum number of cells of a task."""
    if isinstance(file, TenXFolder):
        return file.n_obs
    if not file.is_csc:
        return PARTITION_CELLS
    return max(1, file.n_obs * CSC_PARTITION_VALUES // max(1, file.stored_values))


def _groups(name: str, file: CountsFile, options: ReadOptions) -> list[Group]:
    """Group the cells of a file by `options.obs_columns`; each group has one sample."""
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
        raise ConfigError(
            f"two combinations of values of the obs columns {' and '.join(columns)} have the same label, because a "
            "value contains ':'; replace it in the file"
        )
    return groups


def _sample(name: str, label: str | None, options: ReadOptions, values: Sequence[str]) -> str | None:
    """Return the sample of a group.

    Row ids end in a range of cells, such as ":0-1000". A sample whose name has that form gets a ":" at its end, so that
    the two cannot be equal.
    """
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
        raise FileError(f"changed while it was read: row {piece.adata_id!r} has {len(found)} cells; run ingest again")
    return found


def _check_identity(obs: pd.DataFrame, names: np.ndarray) -> None:
    """Check that obs has exactly the selected cells, so that no embedding is written under another cell's name."""
    if len(obs) != len(names) or (obs.index.to_numpy(object) != names).any():
        raise FileError(f"obs was read for {len(names)} cells, but {len(obs)} rows or other cells were returned")


def _renamed(obs: pd.DataFrame, piece: Slice) -> pd.DataFrame:
    if not piece.renamed:
        return obs
    names = obs.index.to_numpy(object).copy()
    for i, name in piece.renamed:
        names[i] = name
    return obs.set_index(pd.Index(names, dtype=object))


def _genes(file: CountsFile, gene_symbols: str) -> pd.DataFrame:
    """Return var, indexed by `gene_symbols` if given. A missing symbol becomes an empty string; repeated ones stay."""
    var = file.var()
    if not gene_symbols:
        return var
    symbols = var[gene_symbols].astype(object)
    return var.set_index(pd.Index(symbols.where(symbols.notna(), "").astype(str), dtype=object))
