"""The parameters of one embedding request: names, types, defaults, and what cannot work.

One class serves the MLflow signature, the command line's flags and the tables' `params_hash`. Names, defaults and
meaning of the preprocessing follow scGPT's `Preprocessor`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scgpt_batch.errors import ConfigError, RowError

# These affect the output format or which rows fail, not the numbers; or they repeat what the checkpoint says.
_NOT_IN_HASH = {"on_error", "min_coverage", "encoding", "embsize", "nhead", "d_hid", "nlayers", "n_layers_cls"}


class Parameters(BaseModel):
    """What to compute for a row and how. Frozen; unknown names and impossible values are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    need_preprocess: bool = Field(True, description="filter, normalise and cut to variable genes first")
    input_data_path: str = Field(
        "", description=".h5ad to read when the row carries no matrix; below the registered roots"
    )
    data_is_raw: bool = Field(False, description="X holds counts; a row whose values contradict it carries a warning")
    use_key: str = Field("X", description="'X' or the layer that is normalised")
    filter_gene_by_counts: int = Field(3, ge=0, description="keep genes with at least this sum over cells; 0: all")
    filter_cell_by_counts: bool = Field(False, description="drop cells whose values sum to less than 1")
    min_cell_counts: float = Field(0.0, ge=0, description="drop cells whose values sum to less; 0: none")
    normalize_total: float = Field(1e4, ge=0, description="scale each cell's values to this sum; 0: do not")
    result_normed_key: str = Field("X_normed", description="layer of the normalised values; empty: replaces use_key")
    log1p: bool = Field(False, description="take log(1 + x) after normalising")
    result_log1p_key: str = Field("X_log1p", description="layer of the log values; empty: replaces the layer before")
    subset_hvg: int = Field(1200, ge=0, description="keep this many highly variable genes; 0: all")
    hvg_flavor: Literal["cell_ranger", "seurat", "seurat_v3", "seurat_v3_paper"] = Field(
        "cell_ranger", description="scanpy's method for variable genes; seurat_v3 wants counts"
    )
    binning: int = Field(51, ge=0, description="number of value bins, 0 being zero's own; 0: do not bin")
    result_binned_key: str = Field("X_binned", description="layer of the bins")
    embsize: int | None = Field(None, description="if given, must be the checkpoint's")
    nhead: int | None = Field(None, description="if given, must be the checkpoint's")
    d_hid: int | None = Field(None, description="if given, must be the checkpoint's")
    nlayers: int | None = Field(None, description="if given, must be the checkpoint's")
    n_layers_cls: int | None = Field(None, description="if given, must be the checkpoint's")
    mode: Literal["static", "contextual", "cell"] = Field(
        "static", description="gene vectors of the vocabulary, gene vectors in the cells' context, or cell vectors"
    )
    group_by: str = Field("", description="obs column: contextual means per value of it")
    genes: tuple[str, ...] = Field((), description="answer these genes only; empty: all")
    min_coverage: float = Field(
        0.2, ge=0, le=1, description="a row fails when known genes carry a smaller share of its counts"
    )
    data_is_binned: bool = Field(False, description="X holds bins already (with need_preprocess false)")
    max_length: int = Field(1200, ge=2, description="tokens a cell, <cls> included; longer cells are sampled")
    seed: int = Field(0, ge=0, lt=2**63, description="of random ties and of sampled genes")
    tie_break: Literal["random", "upper", "lower"] = Field(
        "random", description="bin of a value that lies on several equal bin edges"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the transformer's matrix products")
    encoding: Literal["list", "float32_base64", "float16_base64"] = Field(
        "list", description="nested arrays, or one little-endian row-major base64 string"
    )
    on_error: Literal["raise", "record"] = Field("raise", description="raise for a bad row, or answer its error")
    batch_key: str = Field("", description="obs column of batches, for variable genes")

    @model_validator(mode="after")
    def _works(self) -> Self:
        if self.binning == 1:
            raise ValueError("binning must be 0 or at least 2, not 1")
        if self.group_by and self.mode != "contextual":
            raise ValueError(f"group_by needs mode 'contextual', not {self.mode!r}")
        if self.data_is_binned and self.need_preprocess:
            raise ValueError("data_is_binned needs need_preprocess false: bins are not preprocessed again")
        if self.mode != "static" and self.need_preprocess and not self.binning:
            raise ValueError(f"mode {self.mode!r} needs bins: binning must not be 0")
        return self

    @classmethod
    def create(cls, *layers: Mapping[str, Any] | None) -> Self:
        """Build from mappings, later ones winning; None (and pandas' missing values) mean "not given".

        Raises
        ------
        ConfigError
            An unknown name or a value that cannot work; the message names each.
        """
        given: dict[str, Any] = {}
        for layer in layers:
            given |= {name: value for name, raw in (layer or {}).items() if (value := _plain(raw)) is not None}
        try:
            return cls(**given)
        except ValidationError as exc:
            raise ConfigError(validation_message(exc, "parameter")) from exc

    @classmethod
    def of_row(cls, row: Mapping[str, Any], params: Mapping[str, Any] | None) -> Self:
        """Build a row's parameters: those in its columns win over the request's `params`; a ConfigError as `create`."""
        return cls.create(params, {name: row[name] for name in cls.model_fields if name in row})

    def params_hash(self) -> str:
        """Return 16 hexadecimal digits that stand for everything here that changes a number."""
        told = json.dumps(self.model_dump(exclude=_NOT_IN_HASH), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def told_in_row(exc: ConfigError, position: int, params: Mapping[str, Any] | None) -> tuple[Parameters, RowError]:
    """Answer a ConfigError of a row's own parameters: the request's alone, by which it is told, and the row's error.

    Raises
    ------
    ConfigError
        It concerns the whole request: it lies in `params`, or their `on_error` is "raise".
    """
    parameters = Parameters.create(params)
    if parameters.on_error == "raise":
        raise type(exc)(f"row {position}: {exc}") from exc
    return parameters, RowError(str(exc))


def validation_message(exc: ValidationError, what: str) -> str:
    """Say a pydantic error in one line that names each setting and what is wrong with it."""
    told = []
    for error in exc.errors():
        name = ".".join(map(str, error["loc"]))
        if error["type"] == "extra_forbidden":
            told.append(f"unknown {what} {name!r}")
        elif name:
            told.append(f"{what} {name!r}: {error['msg']}, got {error['input']!r}")
        else:
            told.append(error["msg"].removeprefix("Value error, "))
    return "; ".join(told)


def _plain(value: Any) -> Any:
    """Turn numpy values and pandas' missing markers, as they stand in a column, into Python's."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, list):
        return tuple(value)
    if value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value):
        return None
    return value
