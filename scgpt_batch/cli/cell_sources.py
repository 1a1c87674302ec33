"""Cells with labels or counts, from a file or a table, and their match with the cells of an embedding table."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from scgpt_batch.cli.analysis_tables import AnalysisTables, check_column
from scgpt_batch.command_result import plural
from scgpt_batch.errors import ConfigError, PayloadError, listed
from scgpt_batch.io.delta import table_path
from scgpt_batch.io.layers import AUTO
from scgpt_batch.io.locations import canonical, find_sources
from scgpt_batch.io.open_file import named_errors, open_counts, read_obs
from scgpt_batch.io.rows import PAYLOAD_COLUMNS, arrow_rows, from_row, string_labels, table_from_json, unique_cell_names

logger = logging.getLogger(__name__)

TEXT_FILES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
COUNTS_FILES = (".h5ad", ".h5mu", ".h5", ".hdf5", ".zarr", ".zip")
BLOCK_VALUES = 10_000_000  # values in memory at a time of a matrix that is stored gene by gene
EXAMPLES = 3  # names that a message lists


@dataclass(frozen=True)
class Cells:
    """Cells of a file or table.

    Attributes
    ----------
    source
        The file or table as it was named.
    obs
        Their columns, indexed by cell name.
    adata_ids
        The row of each cell in the table of rows; None if the source does not say.
    """

    source: str
    obs: pd.DataFrame
    adata_ids: np.ndarray | None
    _counts: Callable[[np.ndarray], ad.AnnData] | None

    @property
    def have_counts(self) -> bool:
        """Whether the source holds matrices."""
        return self._counts is not None

    def counts(self, positions: np.ndarray | None = None) -> ad.AnnData:
        """Read the counts, cells × genes.

        Parameters
        ----------
        positions
            Of the cells in `obs`; by default all of them.

        Raises
        ------
        ConfigError
            The source has no counts.
        """
        if self._counts is None:
            raise ConfigError(f"{self.source} has no counts: give the .h5ad file or the table that ingest wrote")
        chosen = np.arange(len(self.obs)) if positions is None else positions
        ascending = np.unique(chosen)
        return self._counts(ascending)[np.searchsorted(ascending, chosen)].copy()

    def labels(self, column: str, places: np.ndarray | None = None) -> np.ndarray:
        """Return a column as text; None where it is null or empty.

        Parameters
        ----------
        places
            Of the wanted cells, as `places` returns them; -1 gives None. By default all cells.

        Raises
        ------
        ConfigError
            There is no such column, or all its values are null.
        """
        check_column(column, [str(name) for name in self.obs.columns], self.source)
        values = self.obs[column]
        labels = string_labels(values)
        labels[(values.isna() | (values.astype(str).str.strip() == "")).to_numpy()] = None
        if not len(labels) or all(label is None for label in labels):
            raise ConfigError(f"{self.source}: column {column!r} has no value for any of {len(labels):,} cells")
        return labels if places is None else np.array([*labels, None], dtype=object)[places]

    def places(self, lines: pd.DataFrame, table: str) -> np.ndarray:
        """Return where each line of an embedding table is among these cells: int64, (lines,), -1 where it is not.

        Cells are matched by name, and by the row (`adata_id`) too if the source has it. Counts and examples of cells
        without a match are logged.

        Parameters
        ----------
        lines
            The columns adata_id and cell_id.
        table
            The embedding table, for messages.

        Raises
        ------
        ConfigError
            Nothing matches, or a name is ambiguous.
        """
        names = pd.Index(lines["cell_id"])
        if self.adata_ids is not None:
            known = pd.MultiIndex.from_arrays([self.adata_ids, self.obs.index])
            self._require_unique(known)
            found = known.get_indexer(pd.MultiIndex.from_frame(lines[["adata_id", "cell_id"]]))
        else:
            self._require_unique(self.obs.index)
            found = self.obs.index.get_indexer(names)
            self._require_one_line(lines[found >= 0], table)
        missing = found < 0
        if missing.all():
            raise ConfigError(
                f"none of the {len(names):,} cells of {table} (first: {names[0]!r}) is among the {len(self.obs):,} "
                f"cells of {self.source} (first: {_first(self.obs.index)}): are these the cells that were embedded?"
            )
        if missing.any():
            examples = ", ".join(map(repr, names[missing][:EXAMPLES]))
            logger.warning(
                "%s of %s cells of %s are not in %s and are left out (first: %s)",
                f"{int(missing.sum()):,}", f"{len(names):,}", table, self.source, examples,
            )  # fmt: skip
        return found

    def _require_unique(self, known: pd.Index) -> None:
        if not known.is_unique:
            repeated = known[known.duplicated()]
            raise ConfigError(
                f"{self.source} repeats {len(repeated.unique()):,} cells (first: {repeated[0]!r}): give each cell "
                "once, or add a column adata_id with the row of each cell"
            )

    def _require_one_line(self, matched: pd.DataFrame, table: str) -> None:
        repeated = matched["cell_id"].duplicated(keep=False)
        if repeated.any():
            first = matched.loc[repeated, "cell_id"].iloc[0]
            rows = sorted(matched.loc[matched["cell_id"] == first, "adata_id"])[:EXAMPLES]
            raise ConfigError(
                f"{table} has several cells named {first!r} (rows {', '.join(rows)}), and {self.source} does not say "
                "which is meant: add a column adata_id to it, or give the table that ingest wrote"
            )


def log_left_out(cells: np.ndarray, what: str) -> None:
    """Log how many cells are left out, if any, and what they have."""
    n = int(cells.sum())
    if n:
        have, are = ("has", "is") if n == 1 else ("have", "are")
        logger.warning("%s %s %s and %s left out", plural(n, "cell"), have, what, are)


def are_counts(adata: ad.AnnData) -> bool:
    """Return whether all values are whole numbers."""
    values = sp.csr_matrix(adata.X).data
    return bool((values == np.floor(values)).all())


def read_cells(source: str, tables: AnalysisTables) -> Cells:
    """Read the cells of a file or table, without their counts.

    Parameters
    ----------
    source
        A file with counts (.h5ad, .zarr, …), a text file or Parquet with a line for each cell, the table that ingest
        wrote, or a table with the column `cell_id` and possibly `adata_id`.

    Raises
    ------
    ConfigError
        There is no such file or table, or it has no column with the cells' names.
    """
    if table_path(source) is None:
        source = canonical(source)
    lower = source.lower().rstrip("/")
    if lower.endswith(TEXT_FILES):
        return _from_text(source, lower)
    if lower.endswith(COUNTS_FILES):
        return _from_file(source)
    columns = tables.columns(source)
    if "adata_obs" in columns:
        return _from_rows(source, tables, columns)
    if "cell_id" not in columns:
        raise ConfigError(
            f"{source} has no column cell_id with the names of cells, and is not a table that ingest wrote; its "
            f"columns: {listed(columns)}"
        )
    return _from_frame(source, tables.read(source, columns).to_pandas())


def _from_text(source: str, lower: str) -> Cells:
    (path,) = _one_file(source)
    try:
        if lower.endswith(".parquet"):
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, sep="\t" if ".tsv" in lower else ",", dtype=str)
    except (OSError, ValueError, pa.ArrowException) as exc:
        raise ConfigError(f"cannot read {source}: {str(exc).splitlines()[0]}") from exc
    if "cell_id" not in frame:
        frame = _with_names_of_index(frame, source)
    return _from_frame(source, frame)


def _with_names_of_index(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """Name the column that pandas writes an index to: the first one of a text file, the index of a Parquet file."""
    if not isinstance(frame.index, pd.RangeIndex):
        return frame.rename_axis("cell_id").reset_index()
    first = str(frame.columns[0]) if len(frame.columns) else ""
    if first.startswith("Unnamed: ") or first.lower() in ("index", "barcode", "cell", "cell_name"):
        return frame.rename(columns={first: "cell_id"})
    raise ConfigError(
        f"{source} has no column cell_id with the names of cells; its columns: {listed(map(str, frame.columns))}"
    )


def _from_frame(source: str, frame: pd.DataFrame) -> Cells:
    obs = frame.set_index(pd.Index(frame["cell_id"].astype(str), dtype=object, name=None))
    adata_ids = obs["adata_id"].astype(str).to_numpy(dtype=object) if "adata_id" in obs else None
    return Cells(source, obs, adata_ids, None)


def _from_file(source: str) -> Cells:
    (path,) = _one_file(source)
    obs = read_obs(path)
    obs.index = unique_cell_names(pd.Index(obs.index, dtype=object))[0]  # as ingest names repeated cells
    return Cells(source, obs, None, lambda positions: _counts_of_file(path, obs, positions))


def _one_file(source: str) -> list[str]:
    found = find_sources([source])
    if len(found) > 1:
        raise ConfigError(f"{source} matches {len(found)} files: give one file, or the table that ingest wrote")
    return found


def _counts_of_file(path: str, obs: pd.DataFrame, positions: np.ndarray) -> ad.AnnData:
    with named_errors(path), open_counts(path, AUTO) as file:
        logger.info("%s: %s is read: %s", path, file.layer, file.reason)
        (x,) = file.matrices([positions], BLOCK_VALUES)
        adata = ad.AnnData(sp.csr_matrix(x, dtype=np.float32), obs=obs.iloc[positions].copy(), var=file.var()[[]])
    adata.var_names_make_unique()
    return adata


def _from_rows(source: str, tables: AnalysisTables, columns: Sequence[str]) -> Cells:
    frames: dict[str, pd.DataFrame] = {}
    for row in tables.read(source, ["adata_id", "adata_obs"]).to_pylist():
        if row["adata_id"] in frames:
            raise ConfigError(f"{source} has several rows {row['adata_id']!r}: give each adata_id once")
        try:
            frame = table_from_json(row["adata_obs"], "adata_obs")
        except PayloadError as exc:
            logger.warning("row %r of %s is left out: %s", row["adata_id"], source, exc)
            continue
        frame.index = unique_cell_names(pd.Index(frame.index, dtype=object))[0]  # as `embed` names repeated cells
        frames[row["adata_id"]] = frame
    if not frames:
        raise ConfigError(f"{source} has no row with a readable adata_obs")
    sizes = [len(frame) for frame in frames.values()]
    adata_ids = np.repeat(np.array(list(frames), dtype=object), sizes)
    firsts = dict(zip(frames, np.cumsum([0, *sizes[:-1]]), strict=True))
    payload = [name for name in ("adata_id", *PAYLOAD_COLUMNS, "x_dtype") if name in columns]
    return Cells(
        source,
        pd.concat(list(frames.values())),
        adata_ids,
        lambda positions: _counts_of_rows(source, tables, payload, firsts, positions),
    )


def _counts_of_rows(
    source: str, tables: AnalysisTables, columns: Sequence[str], firsts: Mapping[str, int], positions: np.ndarray
) -> ad.AnnData:
    """Read the cells at ascending positions, and only their rows; genes are those of these rows together."""
    names, starts = np.array(list(firsts), dtype=object), np.array(list(firsts.values()))
    rows, begins = np.unique(np.searchsorted(starts, positions, side="right") - 1, return_index=True)
    cells = dict(zip(names[rows], np.split(positions, begins[1:]), strict=True))
    parts = {}
    for batch in tables.batches(source, columns, list(cells)):
        for row in arrow_rows(batch):
            part, first = from_row(row), firsts[row["adata_id"]]
            part.var_names_make_unique()
            parts[first] = part[cells[row["adata_id"]] - first].copy()
    return ad.concat([parts[first] for first in sorted(parts)], join="outer", fill_value=0)


def _first(names: pd.Index) -> str:
    return repr(names[0]) if len(names) else "none"
