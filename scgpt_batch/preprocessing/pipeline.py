"""Filter genes and cells, normalise, take logarithms and cut to variable genes.

The steps and their order are those of scGPT 0.2.4 (`scgpt.preprocess.Preprocessor`), built on scanpy.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp

from scgpt_batch.errors import PayloadError, PreprocessError, suggestion
from scgpt_batch.io.rows import layer_names, string_labels
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.hvg import by_curve, by_dispersion, mean_var
from scgpt_batch.preprocessing.sample_selection import Decisions

# where genes cannot be chosen: scanpy's, and ours
HVG_ERRORS = (ValueError, IndexError, KeyError, ZeroDivisionError, np.linalg.LinAlgError, PreprocessError)
_ONE_AT_A_TIME = threading.Lock()


def preprocess(
    adata: ad.AnnData,
    parameters: Parameters,
    *,
    genes_only: bool = False,
    decisions: Decisions | None = None,
    whole_numbers: bool = False,
) -> ad.AnnData:
    """Filter genes and cells, normalise, take logs, cut to variable genes: upstream's order.

    Parameters
    ----------
    adata
        Cells × genes, X in CSR. It is changed.
    genes_only
        Leave out normalising and logs where they do not decide which genes survive (they do when they change X,
        which the choice of variable genes looks at; see `changes_x`). The result may be a view then, and its var has
        `n_cells`, the number of cells that express each gene: reading the view's X would copy it.
    decisions
        Of the sample that the row belongs to: they take the place of the row's own choice of genes. Its cells may all
        be dropped then.
    whole_numbers
        X was of an integer type (or bool) before it became float32: upstream takes its logarithms elsewhere.

    Returns
    -------
    The surviving cells × genes, with upstream's layers and scanpy's statistics in `var`.

    Raises
    ------
    PreprocessError
        No gene or cell survives, a layer or column is missing, or scanpy cannot choose variable genes.
    """
    p = parameters
    layer = _existing_layer(adata, p.use_key)
    with quiet_libraries():  # scanpy's advice (raw or not, low bins): ours is `value_warning`
        if decisions is not None:
            adata = on_sample_genes(adata, decisions)
        elif p.filter_gene_by_counts:
            adata = _cut_to_genes_with_counts(adata, p)
        if wanted := min_counts(p):
            sc.pp.filter_cells(adata, min_counts=wanted)
            if decisions is None:
                _refuse_empty(adata, f"no cell reaches {wanted:g} counts")
        genes_known = decisions is not None and decisions.final
        if adata.n_obs and not (genes_only and (genes_known or not changes_x(p, whole_numbers=whole_numbers))):
            _normalize(adata, layer, p, whole_numbers=whole_numbers)
        variable = _variable_genes(adata, p) if decisions is None else decisions.variable
    if genes_only:
        adata.var["n_cells"] = adata.X.getnnz(axis=0)
        return adata if variable is None else adata[:, variable]
    return adata if variable is None else adata[:, variable].copy()


def min_counts(parameters: Parameters) -> float:
    """Return the least sum of values that a cell needs; 0: none."""
    return parameters.min_cell_counts or float(parameters.filter_cell_by_counts)


def on_sample_genes(adata: ad.AnnData, decisions: Decisions) -> ad.AnnData:
    """Lay a row on its sample's genes: others are left out, those that the row lacks are zero.

    Raises
    ------
    PreprocessError
        The sample has no answer.
    """
    if decisions.error:
        raise PreprocessError(f"the sample has no answer: {decisions.error}")
    genes = pd.Index(decisions.genes)
    var = adata.var.reindex(genes)
    if genes.equals(adata.var_names):
        adata.var = var
        return adata
    at = genes.get_indexer(adata.var_names)  # where each of the row's genes goes

    def laid(matrix: sp.csr_matrix) -> sp.csr_matrix:
        x = sp.csr_matrix(matrix[:, np.flatnonzero(at >= 0)])
        placed = sp.csr_matrix((x.data, at[at >= 0][x.indices], x.indptr), (x.shape[0], len(genes)))
        placed.sort_indices()
        return placed

    layers = {name: laid(adata.layers[name]) for name in layer_names(adata)}
    return ad.AnnData(laid(adata.X), obs=adata.obs, var=var, layers=layers)


def batch_labels(adata: ad.AnnData, parameters: Parameters) -> np.ndarray:
    """Return each cell's batch as a string ("" without `batch_key`, "(missing)" for null), (cells,).

    Raises
    ------
    PreprocessError
        obs lacks the column.
    """
    p = parameters
    if not (p.subset_hvg and p.batch_key):
        return np.full(adata.n_obs, "", object)
    if p.batch_key not in adata.obs:
        raise PreprocessError(f"batch_key {p.batch_key!r} is not a column of obs{_columns(adata.obs, p.batch_key)}")
    return string_labels(adata.obs[p.batch_key])


def check_columns(adata: ad.AnnData, parameters: Parameters) -> None:
    """Refuse a row that lacks a column of obs or a layer which the parameters name (RowError)."""
    if parameters.need_preprocess:
        _existing_layer(adata, parameters.use_key)
        batch_labels(adata, parameters)
    if parameters.group_by:
        group_labels(adata, parameters.group_by)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Ignore warnings, for one thread at a time.

    Warning filters belong to the process, and scanpy changes them too: two threads that restore them in turns could
    leave all warnings off. Nor may two threads be in numba's parallel kernels at once.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def binned_layer(adata: ad.AnnData, parameters: Parameters) -> sp.csr_matrix:
    """Return the matrix that upstream bins: the last layer that `preprocess` made (or X)."""
    p = parameters
    layer = None if p.use_key == "X" else p.use_key  # a result key "X" is a layer of that name, as upstream
    if p.normalize_total:
        layer = p.result_normed_key or layer
    if p.log1p:
        layer = p.result_log1p_key or layer
    if not adata.n_obs:  # no cell reached the cell filter: nothing was normalised
        layer = None
    return sp.csr_matrix(adata.X if layer is None else adata.layers[layer])


def value_warning(adata: ad.AnnData, *, data_is_raw: bool) -> str | None:
    """Say when the values contradict `data_is_raw`.

    A maximum above 30, or whole numbers alone, means counts. (Upstream's `check_logged` takes "no positive value below
    1" for the second, which some log-transformed cells meet too.)
    """
    data = adata.X.data
    if not len(data):
        return None
    raw = data.max() > 30 or bool((data == np.floor(data)).all())
    if raw == data_is_raw:
        return None
    seen = f"values from {data.min():g} to {data.max():g}"
    if raw:
        return f"data_is_raw is false, but X looks like counts ({seen})"
    return f"data_is_raw is true, but X looks log-transformed ({seen})"


def _existing_layer(adata: ad.AnnData, use_key: str) -> str | None:
    if use_key == "X":
        return None
    if use_key not in adata.layers:
        end = suggestion(use_key, layer_names(adata), label="its layers")
        raise PreprocessError(f"use_key {use_key!r} is not a layer of the row{end}")
    return use_key


def changes_x(parameters: Parameters, *, whole_numbers: bool) -> bool:
    """Tell whether normalising or logs change X itself, which the choice of variable genes looks at.

    An empty result key replaces what was there before. And upstream's log layer is not a copy: with nothing between X
    and the logs, scanpy takes them in place, in X too, unless X is of an integer type, which it copies first.
    """
    p = parameters
    if p.use_key != "X":
        return False
    if p.normalize_total and p.result_normed_key:
        return False  # a layer of its own
    logs_in_place = not p.result_log1p_key or bool(p.normalize_total) or not whole_numbers
    return bool(p.normalize_total) or (p.log1p and logs_in_place)


def _normalize(adata: ad.AnnData, layer: str | None, p: Parameters, *, whole_numbers: bool) -> None:
    """Normalise and take logs into upstream's layers; an empty result key replaces the layer before."""
    if p.normalize_total:
        normed = sc.pp.normalize_total(adata, target_sum=p.normalize_total, layer=layer, inplace=False)["X"]
        layer = p.result_normed_key or layer
        _set_layer(adata, layer, normed)
    if p.log1p:
        logs_x = layer is None and changes_x(p, whole_numbers=whole_numbers)
        logged = (adata.X if layer is None else adata.layers[layer]).copy()
        layer = p.result_log1p_key or layer
        _set_layer(adata, layer, logged)
        sc.pp.log1p(adata, layer=layer)
        if logs_x and layer is not None:
            adata.X = adata.layers[layer].copy()


def _set_layer(adata: ad.AnnData, layer: str | None, matrix: sp.csr_matrix) -> None:
    if layer is None:
        adata.X = matrix
    else:
        adata.layers[layer] = matrix


def _cut_to_genes_with_counts(adata: ad.AnnData, p: Parameters) -> ad.AnnData:
    enough, adata.var["n_counts"] = sc.pp.filter_genes(adata, min_counts=p.filter_gene_by_counts, inplace=False)
    if not enough.any():
        raise PreprocessError(f"no gene reaches filter_gene_by_counts {p.filter_gene_by_counts}")
    return adata if enough.all() else adata[:, enough].copy()


def _variable_genes(adata: ad.AnnData, p: Parameters) -> np.ndarray | None:
    """Choose variable genes, with scanpy's statistics in var: a mask, (genes,); None where all are kept."""
    if not p.subset_hvg:
        return None
    labels = batch_labels(adata, p)
    if p.batch_key:
        adata.obs[p.batch_key] = pd.Categorical(labels)
    keeps_all = p.subset_hvg >= adata.n_vars  # then no choice is needed, and none that fails may fail the row
    try:
        found = _scanpys_choice(adata, labels, p)
    except HVG_ERRORS as exc:
        if keeps_all:
            return None
        raise cannot_choose(p, adata.n_obs, adata.n_vars, exc) from exc
    if keeps_all and not found.any():
        return None
    if not found.any():
        raise PreprocessError("no variable gene is left")
    return with_requested_genes(found, adata.var_names, p)


def _scanpys_choice(adata: ad.AnnData, labels: np.ndarray, p: Parameters) -> np.ndarray:
    if p.hvg_flavor.startswith("seurat_v3"):
        batches = [sp.csr_matrix(adata.X[np.flatnonzero(labels == batch)]) for batch in np.unique(labels)]
        _describe_genes(adata, by_curve(adata.X, batches, p.subset_hvg, p.hvg_flavor))
    elif p.hvg_flavor == "cell_ranger" and not p.batch_key:
        _describe_genes(adata, by_dispersion(*mean_var(adata.X), p.subset_hvg, p.hvg_flavor))
    else:
        sc.pp.highly_variable_genes(adata, n_top_genes=p.subset_hvg, batch_key=p.batch_key or None, flavor=p.hvg_flavor)
    return adata.var["highly_variable"].to_numpy(bool)


def with_requested_genes(variable: np.ndarray, genes: pd.Index, parameters: Parameters) -> np.ndarray:
    """Add the genes that the request asks for to the variable ones: a mask, (genes,)."""
    if parameters.mode == "cell" or not parameters.genes:
        return variable
    return variable | genes.isin(parameters.genes)


def _describe_genes(adata: ad.AnnData, columns: dict[str, np.ndarray]) -> None:
    for name, values in columns.items():
        adata.var[name] = values


def cannot_choose(p: Parameters, n_obs: int, n_vars: int, exc: Exception) -> PreprocessError:
    """Say what an error in the choice of variable genes means."""
    return PreprocessError(
        f"cannot choose {p.subset_hvg} variable genes ({p.hvg_flavor}) from {n_obs} cells × {n_vars} genes: "
        f"{str(exc).splitlines()[0]}. Use seurat_v3 for counts and cell_ranger or seurat for log values, rows of more "
        "cells, or subset_hvg 0"
    )


def _refuse_empty(adata: ad.AnnData, why: str) -> None:
    if not (adata.n_obs and adata.n_vars):
        raise PreprocessError(why)


def _columns(obs: pd.DataFrame, name: str) -> str:
    return suggestion(name, map(str, obs.columns), label="its columns")


def group_labels(adata: ad.AnnData, group_by: str) -> np.ndarray:
    """Return each cell's group as a string, "(missing)" for null, (cells,); a PayloadError where obs lacks it."""
    if group_by not in adata.obs:
        raise PayloadError(f"group_by {group_by!r} is not a column of adata_obs{_columns(adata.obs, group_by)}")
    return string_labels(adata.obs[group_by])
