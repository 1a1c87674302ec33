"""Writers of .h5ad files as older anndata versions and R packages wrote them, by hand with h5py."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

TEXT = h5py.string_dtype()


def anndata_0_6(adata: ad.AnnData, path: Path) -> None:
    """Tables are arrays of records; categories are in uns."""
    with h5py.File(path, "w") as file:
        x = file.create_group("X")
        x.attrs.update({"h5sparse_format": "csr", "h5sparse_shape": adata.shape})
        _write_csr(x, adata.X)
        uns = file.create_group("uns")
        for key, table in (("obs", adata.obs), ("var", adata.var)):
            fields = {"index": table.index.to_numpy("S")}
            for name, column in table.items():
                if isinstance(column.dtype, pd.CategoricalDtype):
                    fields[name] = column.cat.codes.to_numpy()
                    uns[f"{name}_categories"] = column.cat.categories.to_numpy("S")
                else:
                    fields[name] = (
                        column.to_numpy("S") if pd.api.types.is_string_dtype(column.dtype) else column.to_numpy()
                    )
            records = np.empty(len(table), dtype=[(name, values.dtype) for name, values in fields.items()])
            for name, values in fields.items():
                records[name] = values
            file[key] = records


def anndata_0_7(adata: ad.AnnData, path: Path) -> None:
    """Tables are groups of encoding 0.1.0: codes refer to their categories, which are in __categories."""
    _by_columns(adata, path, text=_any_length, attributes=("obs", "var"))


def seurat_disk(adata: ad.AnnData, path: Path) -> None:
    """As anndata 0.7, without the attributes that name the index and the columns."""
    _by_columns(adata, path, text=_any_length, attributes=())


def rhdf5(adata: ad.AnnData, path: Path) -> None:
    """Strings of fixed length, as rhdf5 writes them (zellkonverter, MuDataSeurat)."""
    _by_columns(adata, path, text=_fixed_length, attributes=("obs", "var"))


def anndata_0_8(adata: ad.AnnData, path: Path) -> None:
    """Tables of encoding 0.2.0, each column with its own encoding (anndata 0.8 and newer, anndataR)."""
    with h5py.File(path, "w") as file:
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": adata.shape})
        _write_csr(x, adata.X)
        for key, table in (("obs", adata.obs), ("var", adata.var)):
            group = file.create_group(key)
            group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
            group.attrs["column-order"] = _order(list(table))
            _encoded(group, "_index", table.index.to_numpy(object))
            for name, column in table.items():
                if isinstance(column.dtype, pd.CategoricalDtype):
                    category = group.create_group(name)
                    category.attrs.update(
                        {"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False}
                    )
                    _encoded(category, "codes", column.cat.codes.to_numpy())
                    _encoded(category, "categories", column.cat.categories.to_numpy(object))
                else:
                    _encoded(group, name, column.to_numpy())


def anndata_now(adata: ad.AnnData, path: Path) -> None:
    """As the installed anndata writes it."""
    adata.write_h5ad(path)


LAYOUTS: dict[str, Callable[[ad.AnnData, Path], None]] = {
    write.__name__: write for write in (anndata_0_6, anndata_0_7, anndata_0_8, anndata_now, seurat_disk, rhdf5)
}


def _write_csr(group: h5py.Group, x: sp.csr_matrix) -> None:
    for name in ("data", "indices", "indptr"):
        group[name] = getattr(x, name)


def _by_columns(
    adata: ad.AnnData, path: Path, text: Callable[[Any], dict[str, Any]], attributes: Sequence[str]
) -> None:
    with h5py.File(path, "w") as file:
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": adata.shape})
        _write_csr(x, adata.X)
        for key, table in (("obs", adata.obs), ("var", adata.var)):
            group = file.create_group(key)
            group.create_dataset("_index", **text(table.index))
            for name, column in table.items():
                if isinstance(column.dtype, pd.CategoricalDtype):
                    categories = group.require_group("__categories").create_dataset(name, **text(column.cat.categories))
                    categories.attrs["ordered"] = False
                    codes = group.create_dataset(name, data=column.cat.codes.to_numpy())
                    codes.attrs["categories"] = categories.ref
                elif pd.api.types.is_string_dtype(column.dtype):
                    group.create_dataset(name, **text(column))
                else:
                    group[name] = column.to_numpy()
            if key in attributes:
                group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.1.0", "_index": "_index"})
                group.attrs["column-order"] = _order(list(table))


def _any_length(values: Any) -> dict[str, Any]:
    return {"data": np.array(list(values), dtype=object), "dtype": TEXT}


def _fixed_length(values: Any) -> dict[str, Any]:
    return {"data": np.array([str(value).encode() for value in values])}


def _order(names: list[str]) -> np.ndarray:
    return np.array(names, dtype=TEXT) if names else np.array([], dtype="f8")


def _encoded(group: h5py.Group, name: str, values: np.ndarray) -> None:
    text = values.dtype == object
    made = group.create_dataset(name, data=values, dtype=TEXT if text else None)
    made.attrs.update({"encoding-type": "string-array" if text else "array", "encoding-version": "0.2.0"})
