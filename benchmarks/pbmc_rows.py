"""Real cells as rows of an `adata_rows` table, in the dense and in the CSR format.

A row is `n_cells` random cells of PBMC3k x its most widely detected genes. Row i holds the same cells
in every table and format: it is drawn with the seed (seed, i). Which rows hold a cell differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

Format = Literal["dense", "csr"]

SCHEMA = pa.schema(
    [
        pa.field("adata_id", pa.string(), nullable=False),
        ("adata_sparsematrix", pa.list_(pa.list_(pa.float64()))),
        ("x_data", pa.list_(pa.float32())),
        ("x_indices", pa.list_(pa.int32())),
        ("x_indptr", pa.list_(pa.int64())),
        ("n_obs", pa.int32()),
        ("n_vars", pa.int32()),
        ("sample_id", pa.string()),
        ("adata_obs", pa.string()),
        ("adata_var", pa.string()),
        ("source", pa.string()),
        ("content_hash", pa.string()),
        ("ingested_at", pa.timestamp("us", tz="UTC")),
    ]
)


@dataclass(frozen=True)
class CellRow:
    """One row before it is put in a format: cells x genes, with pandas JSON for both axes."""

    adata_id: str
    matrix: sp.csr_matrix
    obs: str
    var: str


def gene_names(h5ad: Path) -> list[str]:
    """All gene names of the file, in its order."""
    return anndata.read_h5ad(h5ad, backed="r").var_names.tolist()


def read_cells(h5ad: Path, *, n_genes: int, log1p: bool = True) -> anndata.AnnData:
    """Keep the `n_genes` genes that most cells carry, in the file's order.

    With `log1p`, counts become log1p(counts per 10,000): what the default parameters
    (`data_is_raw` false, `log1p` false) take a row to be.
    """
    cells = anndata.read_h5ad(h5ad)
    if log1p:
        totals = np.asarray(cells.X.sum(axis=1)).ravel()
        cells.X = sp.csr_matrix(sp.diags(1e4 / totals) @ cells.X, dtype=np.float32).log1p()
    detected = np.asarray((cells.X > 0).sum(axis=0)).ravel()
    most = np.sort(np.argsort(-detected, kind="stable")[:n_genes])
    return cells[:, most].copy()


def cell_rows(cells: anndata.AnnData, *, n_rows: int, n_cells: int, seed: int = 0) -> Iterator[CellRow]:
    """Draw rows of `n_cells` different cells; a row is one batch, which the blog's wrapper wants to know."""
    var = cells.var.to_json(orient="split")
    for i in range(n_rows):
        chosen = np.random.default_rng((seed, i)).choice(cells.n_obs, n_cells, replace=False)
        adata_id = f"row-{i:04d}"
        yield CellRow(adata_id, cells.X[chosen], _obs_json(cells.obs.iloc[chosen], adata_id), var)


def _obs_json(obs: pd.DataFrame, batch: str) -> str:
    return obs.assign(batch=batch, final_annotation=obs["cell_type"].astype(str)).to_json(orient="split")


def to_arrow(rows: list[CellRow], fmt: Format) -> pa.Table:
    """Put rows into the columns of `adata_rows`; the other format's columns are null."""
    filled = [_record(row) | (_dense if fmt == "dense" else _csr)(row.matrix) for row in rows]
    columns = {field.name: [record.get(field.name) for record in filled] for field in SCHEMA}
    return pa.Table.from_arrays(
        [_column(values, SCHEMA.field(name).type) for name, values in columns.items()], schema=SCHEMA
    )


def _record(row: CellRow) -> dict[str, object]:
    n_obs, n_vars = row.matrix.shape
    described = {"adata_obs": row.obs, "adata_var": row.var, "source": "pbmc3k.h5ad"}
    return {"adata_id": row.adata_id, "n_obs": n_obs, "n_vars": n_vars, **described}


def _csr(matrix: sp.csr_matrix) -> dict[str, object]:
    return {
        "x_data": pa.array(matrix.data, pa.float32()),
        "x_indices": pa.array(matrix.indices, pa.int32()),
        "x_indptr": pa.array(matrix.indptr.astype(np.int64)),
    }


def _dense(matrix: sp.csr_matrix) -> dict[str, object]:
    n_obs, n_vars = matrix.shape
    ends = pa.array(np.arange(0, n_obs * n_vars + 1, n_vars, dtype=np.int32))
    values = pa.array(matrix.toarray().astype(np.float64).ravel())
    return {"adata_sparsematrix": pa.ListArray.from_arrays(ends, values)}


def _column(values: list[object], kind: pa.DataType) -> pa.Array:
    """One list a row without turning millions of numbers into Python objects; plain columns as they are."""
    if not isinstance(values[0], pa.Array):
        return pa.array(values, kind)
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.concat_arrays(values)).cast(kind)
