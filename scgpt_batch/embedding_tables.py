"""Embedding tables in AnnData, pandas, polars or Arrow, without Spark: Delta is read by delta-rs.

Vectors of different models, versions or parameters are not comparable, so one reading never mixes them.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import and_
from pathlib import Path
from typing import Any, Literal, get_args

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from scgpt_batch.errors import ConfigError, EmbeddingWarning, in_one_line, listed
from scgpt_batch.io.delta import open_dataset, table_path
from scgpt_batch.io.locations import delta_path, is_table_name
from scgpt_batch.io.rows import unique_cell_names
from scgpt_batch.near_misses import GENE_CUTOFF, did_you_mean

MODEL = ("mode", "model_name", "model_version", "params_hash")  # columns that tell one model's vectors from another's

BLOCK_LINES = 16_384  # lines that are read at a time where not all vectors fit into memory: 34 MB of 512 numbers

Form = Literal["anndata", "pandas", "polars", "arrow"]


@dataclass(frozen=True)
class Embeddings:
    """Lines of an embedding table, of one model per mode.

    Attributes
    ----------
    table
        The table's columns; each key (adata_id and cell_id, or adata_id, group and gene) once per mode.
    source
        The table as it was named.
    other_models
        What else the table holds that was not read: model, version and parameters in words.
    """

    table: pa.Table
    source: str
    other_models: tuple[str, ...] = ()

    @property
    def are_cells(self) -> bool:
        """Whether the vectors are of cells, not of genes."""
        return "cell_id" in self.table.column_names

    @cached_property
    def vectors(self) -> np.ndarray:
        """The embeddings: float32, (lines, d)."""
        column = self.table["embedding"].combine_chunks()
        return _matrix(column)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the vectors in parts: float32, (at most `BLOCK_LINES`, d)."""
        vectors = self.vectors
        for first in range(0, len(vectors), BLOCK_LINES):
            yield vectors[first : first + BLOCK_LINES]

    def frame(self) -> pd.DataFrame:
        """Return the columns without the vectors."""
        return self.table.drop_columns(["embedding"]).to_pandas()

    def take(self, positions: np.ndarray) -> "Embeddings":
        """Return the lines at positions of `frame`."""
        return replace(self, table=self.table.take(pa.array(positions)))

    def in_order(self) -> "Embeddings":
        """Return the lines by their keys. A table has no order: Spark may read its files in another one each time."""
        keys = [*_keys(self.table.column_names), "mode"]
        return self.take(pc.sort_indices(self.table, sort_keys=[(key, "ascending") for key in keys]).to_numpy())

    @property
    def model(self) -> dict[str, str]:
        """The columns `MODEL` of the first line; those of all lines, if the vectors are of one mode."""
        return self.table.select(list(MODEL)).slice(0, 1).to_pylist()[0]

    def record(self) -> dict[str, Any]:
        """Say in `uns["scgpt"]` what the vectors are of."""
        first = self.model
        return {"model": first["model_name"], "version": first["model_version"], "mode": first["mode"],
                "params_hash": first["params_hash"], "table": self.source}  # fmt: skip


@dataclass(frozen=True)
class EmbeddingLines:
    """Lines of an embedding table at a path, of one model per mode, whose vectors are read block by block.

    Attributes
    ----------
    source, other_models
        As in `Embeddings`.
    """

    source: str
    other_models: tuple[str, ...]
    _keys: pd.DataFrame
    _dataset: Any
    _filter: Any
    _kept: np.ndarray  # positions of the lines in the dataset, ascending

    @property
    def model(self) -> dict[str, str]:
        """As in `Embeddings`."""
        return dict(self._keys[list(MODEL)].iloc[0])

    def frame(self) -> pd.DataFrame:
        """Return the columns that identify a line."""
        return self._keys

    def take(self, positions: np.ndarray) -> "EmbeddingLines":
        """Return the lines at ascending positions of `frame`."""
        keys = self._keys.iloc[positions].reset_index(drop=True)
        return replace(self, _keys=keys, _kept=self._kept[positions])

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the vectors in the order of `frame`: float32, (at most `BLOCK_LINES`, d)."""
        first = done = 0
        batches = self._dataset.to_batches(
            columns=["embedding"], filter=self._filter, batch_size=BLOCK_LINES, batch_readahead=1, fragment_readahead=1
        )
        for batch in batches:
            stop = int(np.searchsorted(self._kept, first + batch.num_rows))
            if stop > done:
                yield _matrix(batch.column(0).take(pa.array(self._kept[done:stop] - first)))
            first, done = first + batch.num_rows, stop


def read_embeddings(
    table: str | Path,
    *,
    adata: ad.AnnData | None = None,
    mode: str | None = None,
    model_version: str | None = None,
    run_id: str | None = None,
    to: Form = "anndata",
    key_added: str = "X_scGPT",
) -> Any:
    """Read an embedding table that `scgpt-batch embed` wrote. No Spark is needed for a table at a path.

    Parameters
    ----------
    table
        A path, ``delta.`path` `` or, inside a Spark session, a name `catalog.schema.table`.
    adata
        Put the vectors into this AnnData: those of cells by `obs_names`, those of genes by `var_names`.
    mode, model_version, run_id
        Keep the lines with this value. By default the model that wrote last is read, for each mode.
    to
        "anndata", "pandas", "polars" or "arrow". The last three return all columns of the table.
    key_added
        Key in `obsm` or `varm`.

    Returns
    -------
    AnnData, pandas.DataFrame, polars.DataFrame or pyarrow.Table
        With `to` "anndata": `adata` with `obsm[key_added]` (float32, cells × d) or `varm[key_added]` (float32, genes ×
        d), NaN where the table has no vector; without `adata` a new AnnData whose obs (var) are the table's cells
        (genes).

    Raises
    ------
    ConfigError
        There is no such table, or no line is left; for "anndata" also: several modes, several vectors of one gene
        (contextual vectors of several samples or groups), repeated cell names, or no name in common with `adata`.

    Examples
    --------
    >>> adata = sb.read_embeddings("data/cell_embeddings", adata=adata)
    >>> adata.obsm["X_scGPT"].shape[0] == adata.n_obs
    True
    >>> frame = sb.read_embeddings("data/cell_embeddings", to="pandas")
    >>> frame.columns[:3].tolist()
    ['adata_id', 'cell_id', 'embedding']
    """
    if to not in ("anndata", "pandas", "polars", "arrow"):
        raise ConfigError(f"to {to!r} must be one of {listed(get_args(Form), to)}")
    found = load_embeddings(table, mode=mode, model_version=model_version, run_id=run_id)
    if to == "arrow":
        return found.table
    if to == "pandas":
        frame = found.table.to_pandas()
        frame["embedding"] = list(found.vectors)
        return frame
    if to == "polars":
        return _polars().from_arrow(found.table)
    return to_anndata(found, adata, key_added)


def to_anndata(found: Embeddings, adata: ad.AnnData | None = None, key_added: str = "X_scGPT") -> ad.AnnData:
    """Put loaded vectors into an AnnData, or make a new one; see `read_embeddings`."""
    return _cells_to_anndata(found, adata, key_added) if found.are_cells else _genes_to_anndata(found, adata, key_added)


def similar_genes(model_or_table: Any, genes: str | Sequence[str], k: int = 10) -> pd.DataFrame:
    """Return the genes whose static vectors have the largest cosine similarity to those of `genes`.

    Parameters
    ----------
    model_or_table
        As for `load_model`, or a table of static gene embeddings as for `read_embeddings`. A text that is neither a
        model's URI nor an existing folder is a table's name.
    genes
        Names of genes.
    k
        Neighbours of each; the gene itself is not among them.

    Returns
    -------
    DataFrame
        One row per gene and neighbour, nearest first: gene, rank (from 1), neighbour, similarity (cosine, -1 to 1).

    Raises
    ------
    ConfigError
        A gene has no vector; the message names it.

    Examples
    --------
    >>> nearest = sb.similar_genes("scGPT_human", ["CD3D", "LYZ"], k=3)
    >>> nearest["gene"].tolist()
    ['CD3D', 'CD3D', 'CD3D', 'LYZ', 'LYZ', 'LYZ']
    """
    vectors = _static_vectors(model_or_table)
    return nearest(vectors.index, vectors.to_numpy(), [genes] if isinstance(genes, str) else list(genes), k)


def nearest(names: pd.Index, vectors: np.ndarray, genes: Sequence[str], k: int) -> pd.DataFrame:
    """Return the k nearest genes of each by cosine similarity; see `similar_genes`."""
    place = names.get_indexer(genes)
    if missing := [gene for gene, at in zip(genes, place, strict=True) if at < 0]:
        end = did_you_mean(missing[0], names, cutoff=GENE_CUTOFF)
        raise ConfigError(f"no static vector for {', '.join(missing[:20])}: not among the {len(names):,} genes{end}")
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit[place] @ unit.T  # (queried genes, genes)
    similarity[np.arange(len(place)), place] = -np.inf
    k = min(k, len(names) - 1)
    top = np.argpartition(-similarity, k - 1, axis=1)[:, :k] if k else np.zeros((len(place), 0), int)
    rows = np.arange(len(place))[:, None]
    top = top[rows, np.argsort(-similarity[rows, top], axis=1, kind="stable")]
    columns = {
        "gene": np.repeat(np.array(genes, dtype=object), k),
        "rank": np.tile(np.arange(1, k + 1), len(place)),
        "neighbour": names.to_numpy(dtype=object)[top].ravel(),
        "similarity": similarity[rows, top].ravel(),
    }
    return pd.DataFrame(columns)


def load_embeddings(
    table: str | Path,
    *,
    mode: str | None = None,
    model_version: str | None = None,
    run_id: str | None = None,
    version: int | None = None,
) -> Embeddings:
    """Read the lines of the model that wrote last, for each mode; see `read_embeddings`.

    Parameters
    ----------
    version
        Of the Delta table; by default its newest.

    Warns
    -----
    EmbeddingWarning
        Some cells or genes have vectors of an older model alone; they are left out.
    """
    given = _given(mode, model_version, run_id)
    return newest_embeddings(_scan(str(table), given, version), str(table), given)


def newest_embeddings(lines: pa.Table, source: str, given: Mapping[str, str]) -> Embeddings:
    """Return the lines of the model that wrote last, of lines that have been read; see `load_embeddings`.

    Parameters
    ----------
    lines
        Lines of an embedding table.
    source
        The table, for messages.
    given
        The values by which the lines were chosen, for messages.
    """
    stamps = lines.select([*MODEL, *_keys(lines.column_names), "embedded_at"]).to_pandas()
    kept, others = _newest(source, stamps, given)
    return Embeddings(lines.take(pa.array(kept)), source, others)


def open_lines(
    path: str,
    *,
    mode: str | None = None,
    model_version: str | None = None,
    run_id: str | None = None,
    version: int | None = None,
) -> EmbeddingLines:
    """Open the lines of the model that wrote last, as `load_embeddings`, without their vectors.

    Parameters
    ----------
    path
        A path or ``delta.`path` ``.
    version
        Of the Delta table; by default its newest.
    """
    given = _given(mode, model_version, run_id)
    dataset, condition = _dataset(table_path(path) or path, given, version)
    keys = _keys(dataset.schema.names)
    stamps = dataset.to_table(columns=[*MODEL, *keys, "embedded_at"], filter=condition).to_pandas()
    kept, others = _newest(path, stamps, given)
    lines = stamps.iloc[kept].drop(columns="embedded_at").reset_index(drop=True)
    return EmbeddingLines(path, others, lines, dataset, condition, kept)


def vectors_by_gene(lines: Embeddings | EmbeddingLines) -> pd.DataFrame:
    """Return one vector per gene, genes × d, sorted by gene. The vectors of a gene must be the same in all lines."""
    first = lines.take(_first_of_genes(lines.frame()))
    return sorted_by_gene(np.concatenate(list(first.blocks())), first.frame()["gene"])


def sorted_by_gene(vectors: np.ndarray, genes: Sequence[str]) -> pd.DataFrame:
    """Return genes × d, sorted by gene, so that a result does not depend on the order of lines in a table."""
    return pd.DataFrame(vectors, index=pd.Index(genes, dtype=object, name=None)).sort_index()


def _given(mode: str | None, model_version: str | None, run_id: str | None) -> dict[str, str]:
    chosen = {"mode": mode, "model_version": model_version, "run_id": run_id}
    return {name: value for name, value in chosen.items() if value is not None}


def _keys(columns: Sequence[str]) -> list[str]:
    return ["adata_id", "cell_id"] if "cell_id" in columns else ["adata_id", "group", "gene"]


def _newest(table: str, stamps: pd.DataFrame, given: Mapping[str, str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the positions of the lines of the model that wrote last, ascending, and the other models in words."""
    if not len(stamps):
        wanted = ", ".join(f"{name} {value!r}" for name, value in given.items())
        raise ConfigError(f"{table} has no embeddings" + (f" of {wanted}" if wanted else ""))
    keys = [name for name in stamps.columns if name not in (*MODEL, "embedded_at")]
    models = stamps.groupby([*MODEL], dropna=False)["embedded_at"].max().reset_index()
    models = models.sort_values("embedded_at")
    newest = models.drop_duplicates("mode", keep="last")
    is_newest = pd.MultiIndex.from_frame(stamps[[*MODEL]]).isin(pd.MultiIndex.from_frame(newest[[*MODEL]]))
    kept = stamps[is_newest].sort_values("embedded_at", kind="stable").drop_duplicates(["mode", *keys], keep="last")
    older = stamps[~is_newest].drop_duplicates(["mode", *keys])
    left_out = len(older) - older.merge(kept, on=["mode", *keys]).shape[0]
    if left_out:
        warnings.warn(
            f"{table}: {left_out:,} vectors exist only of an older model or of other parameters and are left out; "
            "embed them again, or name model_version or run_id",
            EmbeddingWarning,
            stacklevel=5,
        )
    others = models.drop(newest.index)
    return np.sort(kept.index.to_numpy()), tuple(map(described_model, others[[*MODEL]].to_dict("records")))


def described_model(model: Mapping[str, str]) -> str:
    """Return the columns `MODEL` in words."""
    return "{mode} vectors of {model_name} version {model_version}, parameters {params_hash}".format_map(model)


def _matrix(column: pa.Array) -> np.ndarray:
    """Return vectors as float32, (lines, d)."""
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32, copy=False).reshape(len(column), -1)


def _scan(table: str, given: Mapping[str, str], version: int | None) -> pa.Table:
    """Read the lines whose columns have the given values."""
    path = table_path(table)
    if path is None:
        return _scan_name(table, given, version)
    dataset, condition = _dataset(path, given, version)
    return dataset.to_table(filter=condition)


def _dataset(path: str, given: Mapping[str, str], version: int | None) -> tuple[Any, Any]:
    """Return an embedding table as a pyarrow dataset, and the filter for lines whose columns have the given values."""
    dataset = open_dataset(path, version)
    _check_columns(path, dataset.schema.names)
    conditions = [pc.field(name) == value for name, value in given.items()]
    return dataset, reduce(and_, conditions) if conditions else None


def _scan_name(table: str, given: Mapping[str, str], version: int | None) -> pa.Table:
    """Read a named table through the active Spark session: only its catalog knows the name."""
    session = _active_session()
    if session is None:
        raise ConfigError(f"{table!r} is a table's name, which only a Spark session knows: give its path")
    from pyspark.errors import AnalysisException

    try:
        lines = (
            session.table(table) if version is None else session.sql(f"SELECT * FROM {table} VERSION AS OF {version}")
        )
        columns = lines.columns
    except AnalysisException as exc:
        raise ConfigError(
            f"the Spark session has no table {table}: check its name, or give its path ({in_one_line(exc)})"
        ) from exc
    _check_columns(table, columns)
    for name, value in given.items():
        lines = lines.where(lines[name] == value)
    return lines.toArrow()


def _active_session() -> Any:
    """Return the process' Spark session; None without one, or without pyspark."""
    try:
        from pyspark.sql import SparkSession
    except ModuleNotFoundError:
        return None
    return SparkSession.getActiveSession()


def _check_columns(table: str, columns: Sequence[str]) -> None:
    missing = {"adata_id", "embedding", "embedded_at", *MODEL} - set(columns)
    if missing:
        raise ConfigError(f"{table} is not an embedding table: it lacks the columns {', '.join(sorted(missing))}")


def _cells_to_anndata(found: Embeddings, adata: ad.AnnData | None, key: str) -> ad.AnnData:
    _one_mode(found)
    frame, vectors = found.frame(), found.vectors
    if adata is None:
        obs = frame[["adata_id", "cell_id"]]
        names = obs["cell_id"] if obs["cell_id"].is_unique else obs["adata_id"] + ":" + obs["cell_id"]
        new = ad.AnnData(obs=obs.set_axis(pd.Index(names.to_numpy(dtype=object), name=None)))
        new.obsm[key], new.uns["scgpt"] = vectors, found.record()
        return new
    names, _ = unique_cell_names(adata.obs_names)  # as ingest names repeated cells
    here = frame["cell_id"].isin(names)
    repeated = frame[here & frame["cell_id"].duplicated(keep=False)]
    if len(repeated):
        first = repeated["cell_id"].iloc[0]
        rows = sorted(set(repeated.loc[repeated["cell_id"] == first, "adata_id"]))
        raise ConfigError(
            f"{found.source} has several cells named {first!r} (rows {', '.join(rows[:3])}): cell names must be unique "
            "to find an AnnData's cells; read without adata, and choose by adata_id"
        )
    place = pd.Index(frame["cell_id"]).get_indexer(names)
    adata.obsm[key] = _placed(vectors, place, found, "cells", "obs_names", adata.obs_names)
    adata.uns["scgpt"] = found.record()
    return adata


def _genes_to_anndata(found: Embeddings, adata: ad.AnnData | None, key: str) -> ad.AnnData:
    _one_mode(found)
    first = _one_line_a_gene(found)
    names, vectors = pd.Index(first.frame()["gene"].to_numpy(dtype=object)), first.vectors
    if adata is None:
        new = ad.AnnData(var=pd.DataFrame(index=names))
        new.varm[key], new.uns["scgpt"] = vectors, found.record()
        return new
    adata.varm[key] = _placed(vectors, names.get_indexer(adata.var_names), found, "genes", "var_names", adata.var_names)
    adata.uns["scgpt"] = found.record()
    return adata


def _placed(
    vectors: np.ndarray, place: np.ndarray, found: Embeddings, what: str, names: str, given: pd.Index
) -> np.ndarray:
    """Lay vectors in an AnnData's order; NaN where there is none."""
    missing = int((place < 0).sum())
    if missing == len(place):
        raise ConfigError(
            f"{found.source} has none of the AnnData's {len(place):,} {what} (first: {given[0]!r}): are its {names} "
            "those of the ingested file?"
        )
    if missing and what == "cells":  # most genes have no vector: they did not survive preprocessing
        message = f"{missing:,} of {len(place):,} cells have no vector in {found.source}: NaN"
        warnings.warn(message, EmbeddingWarning, stacklevel=4)
    laid = np.full((len(place), vectors.shape[1]), np.nan, np.float32)
    laid[place >= 0] = vectors[place[place >= 0]]
    return laid


def _one_mode(found: Embeddings) -> None:
    modes = pc.unique(found.table["mode"]).to_pylist()
    if len(modes) > 1:
        raise ConfigError(f"{found.source} has vectors of the modes {', '.join(map(repr, sorted(modes)))}: give mode")


def _first_of_genes(frame: pd.DataFrame) -> np.ndarray:
    """Return the position of each gene's first line."""
    return np.flatnonzero(~frame["gene"].duplicated().to_numpy())


def _one_line_a_gene(found: Embeddings) -> Embeddings:
    """Return a line of each gene; static vectors are the same in every row."""
    frame = found.frame()
    first = _first_of_genes(frame)
    if frame["mode"].iloc[0] != "static" and len(first) < len(frame):
        gene = frame["gene"][frame["gene"].duplicated()].iloc[0]
        lines = frame[frame["gene"] == gene]
        places = ", ".join(
            f"{row.adata_id}/{row.group}" if row.group else row.adata_id for row in lines[:3].itertuples()
        )
        raise ConfigError(
            f"{found.source} has {len(lines)} contextual vectors of {gene} ({places}): use to='pandas' and choose the "
            "sample and group"
        )
    return found.take(first)


def _static_vectors(model_or_table: Any) -> pd.DataFrame:
    """Return genes × d."""
    if isinstance(model_or_table, str | Path) and _is_table(str(model_or_table)):
        text = str(model_or_table)
        read = load_embeddings if table_path(text) is None else open_lines
        return vectors_by_gene(read(text, mode="static"))
    from scgpt_batch.api import gene_embeddings  # torch, which tables are read without

    return gene_embeddings(model_or_table)


def _is_table(text: str) -> bool:
    """Return whether a text is a table rather than a model: by its form, its folder, or the Spark session's catalog."""
    if delta_path(text.strip()):
        return True
    if is_table_name(text) and not Path(text).exists():
        session = _active_session()
        return "." in text or (session is not None and session.catalog.tableExists(text))
    path = table_path(text)
    return path is not None and (Path(path) / "_delta_log").is_dir()


def _polars() -> Any:
    try:
        import polars
    except ModuleNotFoundError as exc:
        raise ConfigError("to 'polars' needs polars: pip install polars") from exc
    return polars
