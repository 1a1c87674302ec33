"""scGPT embeddings in a notebook: AnnData in, `obsm` and `varm` out, without Spark.

The numbers are those of the batch job: cells are cut into blocks as `scgpt-batch ingest` cuts files into rows, and the
blocks share the gene choice of the whole AnnData.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import tqdm.auto

import scgpt_batch
from scgpt_batch.errors import ConfigError, EmbeddingWarning, PayloadError, RowError, suggestion
from scgpt_batch.inference.engine import Embedder, load_embedder
from scgpt_batch.inference.results import RowResult, warning_kind
from scgpt_batch.inference.sample_rows import decisions_of_sample
from scgpt_batch.io.locations import local_path
from scgpt_batch.io.rows import table_to_json
from scgpt_batch.models.scgpt.vocabulary import SPECIAL_TOKENS
from scgpt_batch.near_misses import GENE_CUTOFF, did_you_mean
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.gene_names import lookup_columns

BLOCK_CELLS = 1_000  # of one block: the default of `ingest --cells-per-row`, so that both give the same numbers
# Parameters that say where a row of the job comes from or how a result travels; `embed` has arguments for them.
NOT_HERE = ("input_data_path", "use_key", "encoding", "on_error")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to embed.

    Attributes
    ----------
    embedder
        Computes the embeddings.
    name, version
        Of the registered model; for a checkpoint folder, the folder's name and the first 12 digits of its digest.
    """

    embedder: Embedder
    name: str
    version: str

    @property
    def digest(self) -> str:
        """SHA-256 of the checkpoint's files."""
        return self.embedder.digest


def load_model(model: "str | Path | LoadedModel | Embedder") -> LoadedModel:
    """Return a model that is ready to embed; its weights are read once per process.

    Parameters
    ----------
    model
        A checkpoint folder (`best_model.pt`, `args.json`, `vocab.json`), an MLflow model folder, `models:/name/version`
        or `models:/name@alias`. A loaded model is returned as it is.

    Returns
    -------
    LoadedModel
        With its weights in memory, on a GPU if there is one.

    Raises
    ------
    ConfigError
        There is no such model, or it cannot be loaded.

    Examples
    --------
    >>> model = sb.load_model("scGPT_human")
    >>> model.name
    'scGPT_human'
    """
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, Embedder):
        return LoadedModel(model, "checkpoint", model.digest[:12])
    place = str(model)
    if not place.startswith("models:/"):
        place = str(local_path(place, "model"))
    if place.startswith("models:/") or (Path(place) / "MLmodel").is_file():
        from scgpt_batch.registry.resolve import resolve  # imports MLflow, which takes seconds

        found = resolve(place)
        return LoadedModel(load_embedder(found.checkpoint, digest=found.digest), found.name, found.version)
    if not Path(place).is_dir():
        raise ConfigError(
            f"no model at {place!r}: give a checkpoint folder (best_model.pt, args.json, vocab.json), an MLflow model "
            "folder, models:/name/version or models:/name@alias"
        )
    embedder = load_embedder(place)
    return LoadedModel(embedder, Path(place).resolve().name, embedder.digest[:12])


def embed(
    adata: ad.AnnData,
    model: "str | Path | LoadedModel | Embedder",
    mode: str = "cell",
    *,
    layer: str | None = None,
    key_added: str = "X_scGPT",
    copy: bool = False,
    batch_key: str | None = None,
    group_by: str | None = None,
    **parameters: Any,
) -> "ad.AnnData | pd.DataFrame | None":
    """Embed the cells or genes of an AnnData with scGPT.

    Parameters
    ----------
    adata
        Cells × genes, X dense or sparse, in memory or backed. Genes are named by symbol, or by Ensembl id with a column
        of symbols in `var`.
    model
        As for `load_model`.
    mode
        "cell": one vector per cell. "static": the model's own vector of each gene. "contextual": the transformer's
        output for a gene, averaged over the cells that express it.
    layer
        The layer to embed instead of X; "raw" is `adata.raw`.
    key_added
        Key of the result in `obsm` or `varm`.
    copy
        Return a copy with the result instead of changing `adata`.
    batch_key
        Column of obs: variable genes are chosen within each batch.
    group_by
        Column of obs: contextual vectors per value of it.
    **parameters
        As for the batch job (`sb.Parameters`), e.g. `data_is_raw=True, log1p=True, hvg_flavor="seurat_v3"` for raw
        counts, or `need_preprocess=False` for what scGPT's own `embed_data` gives.

    Returns
    -------
    AnnData, DataFrame or None
        None: `adata.obsm[key_added]` (cell mode, float32, cells × d, rows of norm 1; NaN for cells that a cell filter
        dropped) or `adata.varm[key_added]` (float32, genes × d; NaN for genes without a vector) is set, and
        `adata.var[key_added + "_known"]` is False for genes outside the model's vocabulary. With `copy`, the copy. With
        `group_by`, a DataFrame with one row per group and gene: group, gene, n_cells, embedding.
        `adata.uns["scgpt"]` records the model, the parameters, the coverage (share of the counts in known genes, 0 to
        1) and the warnings.

    Raises
    ------
    ConfigError
        An unknown parameter, layer or column of obs, or a model that cannot be loaded.
    RowError
        The values, genes or cells cannot be embedded: PayloadError, PreprocessError, LowCoverage or NonFiniteOutput.

    Warns
    -----
    EmbeddingWarning
        For example when X looks like counts but `data_is_raw` is False.

    Examples
    --------
    >>> sb.embed(adata, "scGPT_human", data_is_raw=True, need_preprocess=False)  # raw counts in X
    >>> adata.obsm["X_scGPT"].shape[0] == adata.n_obs
    True
    >>> sc.pp.neighbors(adata, use_rep="X_scGPT")

    Vectors of two genes in each cell type:

    >>> genes = ["CD3D", "LYZ"]
    >>> table = sb.embed(adata, "scGPT_human", "contextual", group_by="cell_type", genes=genes, data_is_raw=True,
    ...                  need_preprocess=False)
    >>> table.columns.tolist()
    ['group', 'gene', 'n_cells', 'embedding']
    """
    for name in NOT_HERE:
        if name in parameters:
            raise ConfigError(f"sb.embed takes no {name!r}: it reads the AnnData (see layer) and returns arrays")
    wanted = {"mode": mode, "batch_key": batch_key, "group_by": group_by}
    p = Parameters.create(parameters, wanted)
    for name, column in (("batch_key", p.batch_key), ("group_by", p.group_by)):
        if column and column not in adata.obs:
            end = suggestion(column, map(str, adata.obs.columns), label="its columns")
            raise ConfigError(f"{name} {column!r} is not a column of adata.obs{end}")
    if copy and adata.isbacked:
        raise ConfigError("copy=True cannot copy a backed AnnData: use copy=False, or adata.to_memory() first")
    loaded = load_model(model)
    blocks = _Blocks(adata, layer, p)
    collector = _CellVectors(blocks, loaded) if p.mode == "cell" else _GeneVectors(blocks, loaded, p)
    coverage, notes = _run(blocks, loaded.embedder, p, collector)
    target = adata.copy() if copy else adata
    given = {k: v for k, v in p.model_dump(exclude=set(NOT_HERE)).items() if v is not None}
    target.uns["scgpt"] = {
        "model": loaded.name, "version": loaded.version, "digest": loaded.digest, "mode": p.mode,
        "parameters": {k: np.array(v, dtype=str) if isinstance(v, tuple) else v for k, v in given.items()},
        "coverage": coverage, "warnings": np.array(notes, dtype=str), "package_version": scgpt_batch.__version__,
    }  # fmt: skip
    for note in notes:
        warnings.warn(note, EmbeddingWarning, stacklevel=2)
    if p.group_by:
        assert isinstance(collector, _GeneVectors)
        return collector.table()
    collector.store(target, key_added)
    return target if copy else None


def gene_embeddings(model: "str | Path | LoadedModel | Embedder", genes: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the model's static gene vectors.

    Parameters
    ----------
    model
        As for `load_model`.
    genes
        Names in the model's vocabulary, in the order wanted; None: all genes.

    Returns
    -------
    DataFrame
        float32, genes × d, indexed by gene.

    Raises
    ------
    ConfigError
        None of the names is in the vocabulary.

    Warns
    -----
    EmbeddingWarning
        Names that the vocabulary lacks; they are left out.

    Examples
    --------
    >>> vectors = sb.gene_embeddings("scGPT_human", ["CD3D", "MS4A1"])
    >>> vectors.index.tolist()
    ['CD3D', 'MS4A1']
    """
    embedder = load_model(model).embedder
    if genes is None:
        names = [token for token in embedder.vocabulary.tokens if token not in SPECIAL_TOKENS]
    else:
        names = [genes] if isinstance(genes, str) else list(genes)
    ids = embedder.vocabulary.ids(names)
    unknown = [name for name, token in zip(names, ids, strict=True) if token < 0]
    if names and len(unknown) == len(names):
        end = did_you_mean(names[0], embedder.vocabulary.tokens, cutoff=GENE_CUTOFF)
        raise ConfigError(f"none of the {len(names)} genes is in the model's vocabulary (first: {names[0]!r}{end})")
    if unknown:
        shown = ", ".join(unknown[:20]) + (", …" if len(unknown) > 20 else "")
        shown += did_you_mean(unknown[0], embedder.vocabulary.tokens, cutoff=GENE_CUTOFF)
        warnings.warn(
            f"{len(unknown)} genes are not in the model's vocabulary: {shown}", EmbeddingWarning, stacklevel=2
        )
    known = ids >= 0
    index = pd.Index(np.array(names, dtype=object)[known], name="gene")
    return pd.DataFrame(embedder.gene_table[ids[known]], index=index)


class _Blocks:
    """An AnnData as the job's rows: blocks of cells, read on demand.

    Cells are named by their position, so that repeated names in obs do no harm.
    """

    def __init__(self, adata: ad.AnnData, layer: str | None, p: Parameters) -> None:
        self.adata, self.n_obs = adata, adata.n_obs
        self.what, self._matrix, self.var = _matrix(adata, layer)
        if not (self.n_obs and len(self.var)):
            raise PayloadError(f"{self.what} is empty: {self.n_obs} cells × {len(self.var)} genes")
        self.var_json = table_to_json(self.var[lookup_columns(self.var.columns)])
        self._obs = adata.obs[[c for c in dict.fromkeys((p.batch_key, p.group_by)) if c]]
        self.totals: dict[int, float] = {}

    def __len__(self) -> int:
        return -(-self.n_obs // BLOCK_CELLS)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._block, range(len(self)))

    def _block(self, i: int) -> dict[str, Any]:
        cells = slice(i * BLOCK_CELLS, min((i + 1) * BLOCK_CELLS, self.n_obs))
        x = self._matrix[cells]
        x = sp.csr_matrix(x.toarray() if hasattr(x, "toarray") and not sp.issparse(x) else x)
        if x.shape != (cells.stop - cells.start, len(self.var)):
            raise PayloadError(f"{self.what}: cells {cells.start} to {cells.stop} have shape {x.shape}")
        if x.nnz and x.data.min() < 0:
            raise PayloadError(
                f"{self.what} contains negative values (cells {cells.start} to {cells.stop}): they look scaled. Embed "
                f"counts or their logarithms instead: {_other_matrices(self.adata)}"
            )
        self.totals[i] = float(x.sum(dtype=np.float64))
        obs = self._obs.iloc[cells].set_axis([str(n) for n in range(cells.start, cells.stop)])
        return {
            "adata_sparsematrix": x, "adata_obs": obs, "adata_var": self.var_json, "sample_id": "adata",
        }  # fmt: skip


def _matrix(adata: ad.AnnData, layer: str | None) -> tuple[str, Any, pd.DataFrame]:
    """Return what to call the matrix, the matrix and its genes."""
    if layer is None:
        return "adata.X", _existing(adata.X, "adata.X", adata), adata.var
    if layer in adata.layers:
        return f"adata.layers[{layer!r}]", adata.layers[layer], adata.var
    if layer == "raw" and adata.raw is not None:
        return "adata.raw.X", adata.raw.X, adata.raw.var
    end = did_you_mean(layer, [*filter(None, adata.layers), "raw"]) or f"; it has: {_other_matrices(adata)}"
    raise ConfigError(f"layer {layer!r} is not in the AnnData{end}")


def _existing(x: Any, what: str, adata: ad.AnnData) -> Any:
    if x is None:
        raise ConfigError(f"{what} is empty; the AnnData has: {_other_matrices(adata)}")
    return x


def _other_matrices(adata: ad.AnnData) -> str:
    names = [f"layer={name!r}" for name in adata.layers if name is not None]
    names += ["layer='raw'"] if adata.raw is not None else []
    return ", ".join(names) or "no layers and no raw"


def _run(
    blocks: _Blocks, embedder: Embedder, p: Parameters, collector: "_CellVectors | _GeneVectors"
) -> tuple[float, list[str]]:
    """Embed all blocks into the collector; return the coverage of all cells and the warnings, one of each kind."""
    several = len(blocks) > 1
    decisions = decisions_of_sample(embedder.reader, blocks, p) if several and p.need_preprocess else None
    pairs = ((block, decisions) for block in blocks)
    known, notes = 0.0, _Notes()
    with _progress(blocks.n_obs) as bar:
        for i, result in enumerate(embedder.embed_sample_rows(pairs, p, sums=collector.sums)):
            cells = min(BLOCK_CELLS, blocks.n_obs - i * BLOCK_CELLS)
            if result.error is not None:
                raise _placed(result.error, i, cells, blocks)
            collector.add(result)
            known += (result.report.coverage or 0.0) * blocks.totals[i]
            notes.add(result.report.warnings)
            bar.update(cells)
    total = sum(blocks.totals.values())
    return known / total if total else 0.0, notes.sentences(len(blocks))


def _placed(error: RowError, i: int, cells: int, blocks: _Blocks) -> RowError:
    first = i * BLOCK_CELLS
    where = f"{blocks.what}, cells {first} to {first + cells}" if len(blocks) > 1 else blocks.what
    return type(error)(f"{where}: {error}")


def _progress(n_obs: int) -> Any:
    """A bar in notebooks and terminals; silent in scripts and logs."""
    is_notebook = any("notebook" in parent.__module__ for parent in tqdm.auto.tqdm.__mro__)
    silent = n_obs <= BLOCK_CELLS or not (is_notebook or sys.stderr.isatty())
    return tqdm.auto.tqdm(total=n_obs, desc="scGPT", unit=" cells", disable=silent)


@dataclass
class _Notes:
    """Warnings of the blocks: the first of each kind, with the number of blocks that have one."""

    first: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)

    def add(self, notes: Sequence[str]) -> None:
        for note in notes:
            kind = warning_kind(note)
            self.first.setdefault(kind, note)
            self.blocks[kind] = self.blocks.get(kind, 0) + 1

    def sentences(self, n_blocks: int) -> list[str]:
        def sentence(kind: str) -> str:
            n = self.blocks[kind]
            return self.first[kind] if n == n_blocks else f"{self.first[kind]} (in {n} of {n_blocks} blocks of cells)"

        return [sentence(kind) for kind in self.first]


class _CellVectors:
    """Collects cell vectors at the positions of their cells."""

    sums = False

    def __init__(self, blocks: _Blocks, loaded: LoadedModel) -> None:
        self._vectors = np.full((blocks.n_obs, loaded.embedder.config.embsize), np.nan, np.float32)

    def add(self, result: RowResult) -> None:
        assert result.cell_ids is not None and result.cell_embeddings is not None
        if len(result.cell_ids):
            self._vectors[np.array(result.cell_ids, dtype=np.int64)] = result.cell_embeddings

    def store(self, adata: ad.AnnData, key: str) -> None:
        adata.obsm[key] = self._vectors


class _GeneVectors:
    """Collects gene vectors by group and gene; with `sums`, the sums over the cells of each block."""

    def __init__(self, blocks: _Blocks, loaded: LoadedModel, p: Parameters) -> None:
        self._blocks, self._vocabulary = blocks, loaded.embedder.vocabulary
        self._selection = loaded.embedder.reader.genes_of(blocks.var_json)
        self.sums = p.mode == "contextual" and len(blocks) > 1
        self._width = loaded.embedder.config.embsize
        self._place: dict[tuple[str, str], int] = {}  # of each group and gene in the arrays below
        self._vectors = np.zeros((0, self._width), np.float64 if self.sums else np.float32)
        self._n_cells = np.zeros(0, np.int64)
        self._last: tuple[list[tuple[str, str]], np.ndarray] = ([], np.zeros(0, np.int64))

    def add(self, result: RowResult) -> None:
        assert result.genes is not None and result.n_cells is not None and result.gene_embeddings is not None
        groups = result.groups if result.groups is not None else [""] * len(result.genes)
        keys = list(zip(groups, result.genes, strict=True))
        if keys != self._last[0]:  # most blocks have the genes of the block before
            places = np.array([self._place.setdefault(key, len(self._place)) for key in keys], np.int64)
            added = len(self._place) - len(self._n_cells)
            self._vectors = np.concatenate([self._vectors, np.zeros((added, self._width), self._vectors.dtype)])
            self._n_cells = np.concatenate([self._n_cells, np.zeros(added, np.int64)])
            self._last = keys, places
        places = self._last[1]
        self._n_cells[places] += result.n_cells
        if self.sums:
            self._vectors[places] += result.gene_embeddings
        else:
            self._vectors[places] = result.gene_embeddings

    def _means(self) -> np.ndarray:
        return (self._vectors / self._n_cells[:, None]).astype(np.float32) if self.sums else self._vectors

    def table(self) -> pd.DataFrame:
        """Return one row per group and gene: group, gene, n_cells, embedding."""
        keys = list(self._place)
        columns = {
            "group": [group for group, _ in keys],
            "gene": [gene for _, gene in keys],
            "n_cells": self._n_cells.astype(np.int32),
            "embedding": list(self._means()),
        }
        return pd.DataFrame(columns).sort_values(["group", "gene"], ignore_index=True)

    def store(self, adata: ad.AnnData, key: str) -> None:
        """Set varm and the mask of known genes; a gene's columns share its vector."""
        names = self._names_of_columns()
        index = self._blocks.var.index
        if not index.equals(adata.var_names):  # adata.raw has other genes
            if not index.is_unique:
                raise ConfigError(f"{self._blocks.what} repeats gene names: make them unique first")
            names = np.append(names, "")[index.get_indexer(adata.var_names)]
        vectors = np.full((adata.n_vars, self._width), np.nan, np.float32)
        place = np.array([self._place.get(("", name), -1) for name in names], dtype=np.int64)
        vectors[place >= 0] = self._means()[place[place >= 0]]
        adata.varm[key] = vectors
        adata.var[f"{key}_known"] = self._vocabulary.ids(names) >= 0

    def _names_of_columns(self) -> np.ndarray:
        """Return the name by which the model knows each column of the matrix; "" for columns that are left out."""
        names = self._selection.names.to_numpy(dtype=object)
        if self._selection.place is None:
            return names
        return np.append(names, "")[self._selection.place]
