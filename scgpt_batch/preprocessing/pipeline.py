"""Preprocessing: gene and cell filters, normalisation, logarithm and selection of highly variable genes.

The steps and their order are those of scGPT 0.2.4 (`scgpt.preprocess.Preprocessor`), implemented with scanpy.
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

# raised by scanpy and by `hvg` if variable genes cannot be selected
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
    """Return the preprocessed cells × genes: filtered, normalised, log-transformed, and cut to variable genes.

    Parameters
    ----------
    adata
        Cells × genes, X in CSR. Modified.
    parameters
        The parameters.
    genes_only
        The caller needs only the genes, not their values. Normalisation and logarithm are then skipped, unless they
        change the X that variable genes are selected from (see `changes_x`). The result can be a view, whose X is
        expensive to read; its `var["n_cells"]` has the number of cells that express each gene.
    decisions
        Decisions of the sample that the row belongs to. They replace the selection of genes from the row alone, and
        the result may have no cells.
    whole_numbers
        Whether X had an integer type or bool before it was converted to float32. Upstream's logarithm depends on it.

    Returns
    -------
    The remaining cells × genes, with upstream's layers and scanpy's statistics in `var`.

    Raises
    ------
    PreprocessError
        No gene or cell remains, a layer or column is missing, or variable genes cannot be selected.
    """
    p = parameters
    layer = _existing_layer(adata, p.use_key)
    with quiet_libraries():  # scanpy's warnings about raw or normalised values are replaced by `value_warning`
        if decisions is not None:
            adata = on_sample_genes(adata, decisions)
        elif p.filter_gene_by_counts:
            adata = _cut_to_genes_with_counts(adata, p)
        if wanted := min_counts(p):
            sc.pp.filter_cells(adata, min_counts=wanted)
            if decisions is None:
                _check_not_empty(adata, f"no cell has {wanted:g} counts or more; lower min_cell_counts")
        genes_known = decisions is not None and decisions.final
        if adata.n_obs and not (genes_only and (genes_known or not changes_x(p, whole_numbers=whole_numbers))):
            _normalize(adata, layer, p, whole_numbers=whole_numbers)
        variable = _variable_genes(adata, p) if decisions is None else decisions.variable
    if genes_only:
        adata.var["n_cells"] = adata.X.getnnz(axis=0)
        return adata if variable is None else adata[:, variable]
    return adata if variable is None else adata[:, variable].copy()


def min_counts(parameters: Parameters) -> float:
    """Return the minimum sum of values of a cell; 0 keeps all cells."""
    return parameters.min_cell_counts or float(parameters.filter_cell_by_counts)


def on_sample_genes(adata: ad.AnnData, decisions: Decisions) -> ad.AnnData:
    """Return a row with the genes of its sample: other genes are dropped, and genes that the row lacks are zero.

    Raises
    ------
    PreprocessError
        The sample could not be preprocessed.
    """
    if decisions.error:
        raise PreprocessError(f"the sample could not be preprocessed: {decisions.error}")
    genes = pd.Index(decisions.genes)
    var = adata.var.reindex(genes)
    if genes.equals(adata.var_names):
        adata.var = var
        return adata
    at = genes.get_indexer(adata.var_names)  # position of each of the row's genes in the sample, or -1

    def aligned(matrix: sp.csr_matrix) -> sp.csr_matrix:
        x = sp.csr_matrix(matrix[:, np.flatnonzero(at >= 0)])
        result = sp.csr_matrix((x.data, at[at >= 0][x.indices], x.indptr), (x.shape[0], len(genes)))
        result.sort_indices()
        return result

    layers = {name: aligned(adata.layers[name]) for name in layer_names(adata)}
    return ad.AnnData(aligned(adata.X), obs=adata.obs, var=var, layers=layers)


def batch_labels(adata: ad.AnnData, parameters: Parameters) -> np.ndarray:
    """Return the batch of each cell as a string, (cells,): "" without `batch_key`, "(missing)" for null.

    Raises
    ------
    PreprocessError
        obs has no such column.
    """
    p = parameters
    if not (p.subset_hvg and p.batch_key):
        return np.full(adata.n_obs, "", object)
    if p.batch_key not in adata.obs:
        raise PreprocessError(
            f"batch_key {p.batch_key!r} is not a column of adata_obs{_columns(adata.obs, p.batch_key)}"
        )
    return string_labels(adata.obs[p.batch_key])


def check_columns(adata: ad.AnnData, parameters: Parameters) -> None:
    """Check that a row has the obs columns and the layer that the parameters name.

    Raises
    ------
    RowError
        A column or the layer is missing.
    """
    if parameters.need_preprocess:
        _existing_layer(adata, parameters.use_key)
        batch_labels(adata, parameters)
    if parameters.group_by:
        group_labels(adata, parameters.group_by)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress warnings of libraries; only one thread at a time can be inside.

    Warning filters are global, and scanpy changes them too: two threads that restore them alternately could leave all
    warnings disabled. In addition, numba's parallel kernels must not run in two threads at once.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def binned_layer(adata: ad.AnnData, parameters: Parameters) -> sp.csr_matrix:
    """Return the matrix that upstream bins: the last layer that `preprocess` wrote, or X."""
    p = parameters
    layer = None if p.use_key == "X" else p.use_key  # a result key "X" means a layer of that name, as in upstream
    if p.normalize_total:
        layer = p.result_normed_key or layer
    if p.log1p:
        layer = p.result_log1p_key or layer
    if not adata.n_obs:  # no cell passed the filter, so no layer was written
        layer = None
    return sp.csr_matrix(adata.X if layer is None else adata.layers[layer])


def value_warning(adata: ad.AnnData, *, data_is_raw: bool) -> str | None:
    """Return a warning if the values contradict `data_is_raw`.

    Values are taken for counts if the maximum is above 30 or all are whole numbers. Upstream's `check_logged` uses "no
    positive value below 1" instead of the latter, which also holds for some log-transformed cells.
    """
    data = adata.X.data
    if not len(data):
        return None
    raw = data.max() > 30 or bool((data == np.floor(data)).all())
    if raw == data_is_raw:
        return None
    found = f"values from {data.min():g} to {data.max():g}"
    if raw:
        return f"data_is_raw is false, but X looks like counts ({found})"
    return f"data_is_raw is true, but X looks log-transformed ({found})"


def _existing_layer(adata: ad.AnnData, use_key: str) -> str | None:
    if use_key == "X":
        return None
    if use_key not in adata.layers:
        end = suggestion(use_key, layer_names(adata), label="its layers")
        raise PreprocessError(f"use_key {use_key!r} is not a layer of the row{end}")
    return use_key


def changes_x(parameters: Parameters, *, whole_numbers: bool) -> bool:
    """Return whether normalisation or logarithm change X, from which variable genes are selected.

    They do if the result key is empty, because the result then replaces X. In addition, upstream's log layer is not a
    copy: if X is not normalised first, scanpy computes the logarithm in place and thereby changes X, except if X has an
    integer type, which scanpy copies.
    """
    p = parameters
    if p.use_key != "X":
        return False
    if p.normalize_total and p.result_normed_key:
        return False  # a layer of its own
    logs_in_place = not p.result_log1p_key or bool(p.normalize_total) or not whole_numbers
    return bool(p.normalize_total) or (p.log1p and logs_in_place)


def _normalize(adata: ad.AnnData, layer: str | None, p: Parameters, *, whole_numbers: bool) -> None:
    """Write upstream's layers with normalised values and logarithms; with an empty result key, replace the input."""
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
        raise PreprocessError(
            f"no gene has {p.filter_gene_by_counts} counts or more; lower filter_gene_by_counts, or use larger rows"
        )
    return adata if enough.all() else adata[:, enough].copy()


def _variable_genes(adata: ad.AnnData, p: Parameters) -> np.ndarray | None:
    """Return which genes are variable, bool, (genes,), or None to keep all; scanpy's statistics are added to var."""
    if not p.subset_hvg:
        return None
    labels = batch_labels(adata, p)
    if p.batch_key:
        adata.obs[p.batch_key] = pd.Categorical(labels)
    keeps_all = p.subset_hvg >= adata.n_vars  # then the row must not fail if the selection does
    try:
        found = _highly_variable(adata, labels, p)
    except HVG_ERRORS as exc:
        if keeps_all:
            return None
        raise selection_error(p, adata.n_obs, adata.n_vars, exc) from exc
    if keeps_all and not found.any():
        return None
    if not found.any():
        raise PreprocessError("no gene is variable; use rows with more cells, or set subset_hvg to 0 to keep all genes")
    return with_requested_genes(found, adata.var_names, p)


def _highly_variable(adata: ad.AnnData, labels: np.ndarray, p: Parameters) -> np.ndarray:
    if p.hvg_flavor.startswith("seurat_v3"):
        batches = [sp.csr_matrix(adata.X[np.flatnonzero(labels == batch)]) for batch in np.unique(labels)]
        _describe_genes(adata, by_curve(adata.X, batches, p.subset_hvg, p.hvg_flavor))
    elif p.hvg_flavor == "cell_ranger" and not p.batch_key:
        _describe_genes(adata, by_dispersion(*mean_var(adata.X), p.subset_hvg, p.hvg_flavor))
    else:
        sc.pp.highly_variable_genes(adata, n_top_genes=p.subset_hvg, batch_key=p.batch_key or None, flavor=p.hvg_flavor)
    return adata.var["highly_variable"].to_numpy(bool)


def with_requested_genes(variable: np.ndarray, genes: pd.Index, parameters: Parameters) -> np.ndarray:
    """Return which genes are variable or named by the parameter `genes`, bool, (genes,)."""
    if parameters.mode == "cell" or not parameters.genes:
        return variable
    return variable | genes.isin(parameters.genes)


def _describe_genes(adata: ad.AnnData, columns: dict[str, np.ndarray]) -> None:
    for name, values in columns.items():
        adata.var[name] = values


def selection_error(p: Parameters, n_obs: int, n_vars: int, exc: Exception) -> PreprocessError:
    """Return the error to raise if the selection of variable genes failed with `exc`."""
    return PreprocessError(
        f"cannot select {p.subset_hvg} variable genes ({p.hvg_flavor}) from {n_obs} cells × {n_vars} genes: "
        f"{str(exc).splitlines()[0]}. Use seurat_v3 for counts and cell_ranger or seurat for log values, rows with "
        "more cells, or subset_hvg 0"
    )


def _check_not_empty(adata: ad.AnnData, message: str) -> None:
    if not (adata.n_obs and adata.n_vars):
        raise PreprocessError(message)


def _columns(obs: pd.DataFrame, name: str) -> str:
    return suggestion(name, map(str, obs.columns), label="its columns")


def group_labels(adata: ad.AnnData, group_by: str) -> np.ndarray:
    """Return the group of each cell as a string, "(missing)" for null: (cells,).

    Raises
    ------
    PayloadError
        obs has no such column.
    """
    if group_by not in adata.obs:
        raise PayloadError(f"group_by {group_by!r} is not a column of adata_obs{_columns(adata.obs, group_by)}")
    return string_labels(adata.obs[group_by])
