"""The schema of the MLflow model: input columns, output columns and parameters."""

from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

from scgpt_batch.errors import ConfigError, shortened
from scgpt_batch.inference.results import RowResult
from scgpt_batch.io.rows import PAYLOAD_COLUMNS
from scgpt_batch.near_misses import did_you_mean
from scgpt_batch.parameters import Parameters

PARAMETER_NAMES = tuple(Parameters.model_fields)
INPUT_NAMES = (*PAYLOAD_COLUMNS, *PARAMETER_NAMES)
TABLE_COLUMNS = ("adata_id", "sample_id", "n_obs", "n_vars", "x_dtype", "source", "content_hash", "ingested_at")
MISSPELT = 0.9  # similarity (difflib) from which an unknown column is taken for a misspelt input


def check_columns(columns: Iterable[Any]) -> None:
    """Check the column names of the input.

    Raises
    ------
    ConfigError
        No column is an input of the model, or a column looks like a misspelt input.
    """
    names = [str(name) for name in columns]
    unknown = [name for name in names if name not in INPUT_NAMES]
    for name in unknown:
        end = did_you_mean(name, INPUT_NAMES, cutoff=MISSPELT)
        if end and name not in TABLE_COLUMNS:
            raise ConfigError(f"unknown column {shortened(name)!r}{end}")
    if len(unknown) == len(names):
        given = shortened(", ".join(unknown)) or "none, or none that MLflow passed on"
        raise ConfigError(
            f"no column is an input of the model (columns: {given}); a row needs x_data, x_indices, x_indptr (or "
            "adata_sparsematrix), adata_obs and adata_var"
        )


def answer_columns(answer: RowResult, parameters: Parameters, dim: int) -> dict[str, Any]:
    """Return one result as output columns.

    Arrays that the mode or encoding does not use are empty instead of null, because `spark_udf` does not support a null
    array of arrays.

    Parameters
    ----------
    answer
        The result of a row.
    parameters
        The parameters of the row.
    dim
        Number of embedding dimensions.
    """
    columns: dict[str, Any] = {
        "genes": answer.genes or [],
        "groups": answer.groups or [],
        "gene_embeddings": [],
        "n_cells": [] if answer.n_cells is None else answer.n_cells.tolist(),
        "cell_ids": answer.cell_ids or [],
        "cell_embeddings": [],
        "embeddings_base64": None,
        "embedding_dim": dim,
        "coverage": answer.report.coverage,
        "warnings": list(answer.report.warnings),
        "error": None if answer.error is None else f"{type(answer.error).__name__}: {answer.error}",
    }
    if parameters.encoding != "list":
        columns["embeddings_base64"] = answer.base64(parameters.encoding)
    elif answer.gene_embeddings is not None:
        columns["gene_embeddings"] = list(answer.gene_embeddings)
    elif answer.cell_embeddings is not None:
        columns["cell_embeddings"] = list(answer.cell_embeddings)
    return columns


def answers_frame(answers: list[dict[str, Any]]) -> pd.DataFrame:
    """Return the output DataFrame; missing values are None, which pandas would otherwise convert to NaN."""
    return pd.DataFrame({name: pd.Series([answer[name] for answer in answers], dtype=object) for name in OUTPUT_NAMES})


def signature() -> ModelSignature:
    """Return the model's signature: optional input columns, output columns, and all parameters with their defaults.

    Each parameter is also an optional column, because `ai_query` cannot pass parameters to a custom model. Arrays are
    declared as long or double, because MLflow then also accepts narrower types from Spark and plain lists from JSON.
    """
    payload = {
        "adata_sparsematrix": Array(Array(DataType.double)),
        "x_data": Array(DataType.double),
        "x_indices": Array(DataType.long),
        "x_indptr": Array(DataType.long),
        "adata_obs": DataType.string,
        "adata_var": DataType.string,
    }
    assert tuple(payload) == PAYLOAD_COLUMNS
    settings = {name: Array(kind) if is_list else kind for name, (kind, is_list) in _PARAMETER_TYPES.items()}
    return ModelSignature(
        inputs=Schema([ColSpec(kind, name, required=False) for name, kind in (payload | settings).items()]),
        outputs=Schema([ColSpec(kind, name, required=False) for name, kind in _OUTPUT.items()]),
        params=ParamSchema([_param_spec(name) for name in PARAMETER_NAMES]),
    )


def _param_spec(name: str) -> ParamSpec:
    kind, is_list = _PARAMETER_TYPES[name]
    default = Parameters.model_fields[name].default
    return ParamSpec(name, kind, list(default) if is_list else default, shape=(-1,) if is_list else None)


def _parameter_type(annotation: Any) -> tuple[DataType, bool]:
    """Return the MLflow type of a parameter, and whether the parameter is a list."""
    if get_origin(annotation) is tuple:
        return _parameter_type(get_args(annotation)[0])[0], True
    if get_origin(annotation) is Literal:
        return DataType.string, False
    if annotation == int | None:
        return DataType.long, False
    plain = {bool: DataType.boolean, int: DataType.long, float: DataType.double, str: DataType.string}
    return plain[annotation], False


_PARAMETER_TYPES = {name: _parameter_type(field.annotation) for name, field in Parameters.model_fields.items()}
_OUTPUT: dict[str, Any] = {
    "genes": Array(DataType.string),
    "groups": Array(DataType.string),
    "gene_embeddings": Array(Array(DataType.float)),
    "n_cells": Array(DataType.integer),
    "cell_ids": Array(DataType.string),
    "cell_embeddings": Array(Array(DataType.float)),
    "embeddings_base64": DataType.string,
    "embedding_dim": DataType.integer,
    "coverage": DataType.double,
    "warnings": Array(DataType.string),
    "error": DataType.string,
}
OUTPUT_NAMES = tuple(_OUTPUT)
