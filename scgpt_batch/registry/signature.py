"""The schema of the MLflow model: input columns, output columns and parameters. Importing it registers no model."""

from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

from scgpt_batch.errors import ConfigError, shortened
from scgpt_batch.inference.engine import RowResult
from scgpt_batch.io.rows import PAYLOAD_COLUMNS
from scgpt_batch.near_misses import did_you_mean
from scgpt_batch.parameters import Parameters

PARAMETER_NAMES = tuple(Parameters.model_fields)
INPUT_NAMES = (*PAYLOAD_COLUMNS, *PARAMETER_NAMES)
TABLE_COLUMNS = ("adata_id", "sample_id", "n_obs", "n_vars", "x_dtype", "source", "content_hash", "ingested_at")
MISSPELT = 0.9  # likeness from which a column's name is taken for a misspelt one


def check_columns(columns: Iterable[Any]) -> None:
    """Reject rows without any column that the model knows, and names that look like misspelt ones.

    Raises
    ------
    ConfigError
        It names the column, or the ones that the model expects.
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
            f"no column is an input of the model (given: {given}); a row needs x_data, x_indices, x_indptr (or "
            "adata_sparsematrix), adata_obs and adata_var"
        )


def answer_columns(answer: RowResult, parameters: Parameters, dim: int) -> dict[str, Any]:
    """Spell one answer in the output columns; arrays that the mode or encoding does not fill are empty.

    (Empty and not null, because `spark_udf` cannot carry a null array of arrays.)
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
    """Make the output DataFrame; missing stays None, also where pandas would write NaN."""
    return pd.DataFrame({name: pd.Series([answer[name] for answer in answers], dtype=object) for name in OUTPUT_NAMES})


def signature() -> ModelSignature:
    """Return the explicit signature: optional input columns, fixed output columns, every parameter with its default.

    `ai_query` cannot send parameters to a custom model, so each is an optional column too. Arrays of whole numbers
    are long and of numbers double: MLflow takes narrower ones from Spark and plain lists from JSON.
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
    knobs = {name: Array(kind) if is_list else kind for name, (kind, is_list) in _PARAMETER_TYPES.items()}
    return ModelSignature(
        inputs=Schema([ColSpec(kind, name, required=False) for name, kind in (payload | knobs).items()]),
        outputs=Schema([ColSpec(kind, name, required=False) for name, kind in _OUTPUT.items()]),
        params=ParamSchema([_param_spec(name) for name in PARAMETER_NAMES]),
    )


def _param_spec(name: str) -> ParamSpec:
    kind, is_list = _PARAMETER_TYPES[name]
    default = Parameters.model_fields[name].default
    return ParamSpec(name, kind, list(default) if is_list else default, shape=(-1,) if is_list else None)


def _parameter_type(annotation: Any) -> tuple[DataType, bool]:
    """MLflow's type for a parameter's Python type, and whether it is a list of it."""
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
