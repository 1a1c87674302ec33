"""The parameters of one embedding request: names, types, defaults, and what cannot work.

One class serves the MLflow signature, the command line's flags and the tables' `params_hash`. Names, defaults and
meaning of the preprocessing follow scGPT's `Preprocessor`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator

from scgpt_batch.errors import ConfigError, RowError, shortened
from scgpt_batch.near_misses import did_you_mean

# Upper bounds, so that no parameter costs much memory before a row is read; docs/serving.md lists them. They are
# checked here before MLflow or numpy sees a value: numpy gives each string of an array the length of the longest.
MAX_NAME = 200  # characters of a column, layer or gene name
MAX_PATH = 4096
MAX_GENES, MAX_GENES_LENGTH = 100_000, 2_000_000  # names in `genes`, and their characters together
MAX_COUNT = 10**12
MAX_SIZE = 1_000_000
MAX_KEPT = 1000  # different sets of parameters of a request that are kept to be shared
FAULTS_SHOWN = 100  # in an error message

# Parameters for a kind of data, by name. Explicit values win over them.
PRESETS: dict[str, dict[str, Any]] = {
    "": {},
    "counts": {"data_is_raw": True, "log1p": True, "hvg_flavor": "seurat_v3"},  # raw counts, as in most files
}


def _bounded_genes(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) > MAX_GENES:
        raise ValueError(f"at most {MAX_GENES:,} names are possible, not {len(value):,}")
    lengths = [len(name) for name in value if isinstance(name, str)]
    if max(lengths, default=0) > MAX_NAME:
        raise ValueError(f"a name may have {MAX_NAME} characters, not {max(lengths):,}")
    if sum(lengths) > MAX_GENES_LENGTH:
        raise ValueError(f"the names may have {MAX_GENES_LENGTH:,} characters together, not {sum(lengths):,}")
    return value


Name = Annotated[str, Field(max_length=MAX_NAME)]
Genes = Annotated[tuple[str, ...], FailFast(), BeforeValidator(_bounded_genes)]
Size = Annotated[int | None, Field(le=MAX_SIZE)]


class Parameters(BaseModel):
    """What to compute for a row and how. Frozen; unknown names and impossible values are rejected.

    Examples
    --------
    >>> parameters = sb.Parameters(mode="cell", need_preprocess=False)
    >>> parameters.max_length
    1200
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    need_preprocess: bool = Field(True, description="filter, normalise and select variable genes first")
    input_data_path: str = Field(
        "", max_length=MAX_PATH, description=".h5ad file to read if the row has no matrix, below a registered root"
    )
    data_is_raw: bool = Field(False, description="X contains counts; rows that contradict this get a warning")
    use_key: Name = Field("X", description="'X', or the layer to normalise")
    filter_gene_by_counts: int = Field(
        3, ge=0, le=MAX_COUNT, description="minimum sum of a gene over all cells; 0 keeps all genes"
    )
    filter_cell_by_counts: bool = Field(False, description="drop cells with a sum below 1")
    min_cell_counts: float = Field(
        0.0, ge=0, le=MAX_COUNT, description="drop cells with a smaller sum; 0 keeps all cells"
    )
    normalize_total: float = Field(
        1e4, ge=0, le=MAX_COUNT, description="scale each cell to this sum; 0 disables normalisation"
    )
    result_normed_key: Name = Field(
        "X_normed", description="layer for the normalised values; empty: overwrite the input"
    )
    log1p: bool = Field(False, description="apply log(1 + x) after normalisation")
    result_log1p_key: Name = Field("X_log1p", description="layer for the log values; empty: overwrite the input")
    subset_hvg: int = Field(1200, ge=0, le=MAX_SIZE, description="number of highly variable genes; 0 keeps all genes")
    hvg_flavor: Literal["cell_ranger", "seurat", "seurat_v3", "seurat_v3_paper"] = Field(
        "cell_ranger", description="scanpy's method for variable genes; seurat_v3 needs counts"
    )
    binning: int = Field(51, ge=0, le=1000, description="number of bins, including bin 0 for zeros; 0 disables binning")
    result_binned_key: Name = Field("X_binned", description="layer for the bins")
    embsize: Size = Field(None, description="if given, must equal the checkpoint's value")
    nhead: Size = Field(None, description="if given, must equal the checkpoint's value")
    d_hid: Size = Field(None, description="if given, must equal the checkpoint's value")
    nlayers: Size = Field(None, description="if given, must equal the checkpoint's value")
    n_layers_cls: Size = Field(None, description="if given, must equal the checkpoint's value")
    mode: Literal["static", "contextual", "cell"] = Field(
        "static",
        description="the model's own gene vectors, gene vectors in the context of your cells, or cell vectors",
    )
    group_by: Name = Field("", description="obs column; contextual mode averages per value of it")
    genes: Genes = Field((), description="return these genes only; default: all")
    min_coverage: float = Field(
        0.2, ge=0, le=1, description="minimum share of a row's counts in genes that the model knows; rows below fail"
    )
    data_is_binned: bool = Field(False, description="X contains bins already (needs need_preprocess false)")
    max_length: int = Field(
        1200, ge=2, le=65_536, description="maximum tokens per cell, including <cls>; longer cells are sampled"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed for ties between bins and for sampling genes")
    tie_break: Literal["random", "upper", "lower"] = Field(
        "random", description="how to choose the bin of a value on several equal bin edges"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type of the transformer's matrix products")
    encoding: Literal["list", "float32_base64", "float16_base64"] = Field(
        "list", description="output format: nested arrays, or one little-endian row-major base64 string"
    )
    on_error: Literal["raise", "record"] = Field(
        "raise", description="raise an error for a bad row, or return the error as its result"
    )
    batch_key: Name = Field("", description="obs column with the batch, for variable genes")

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
        if len(given) > len(cls.model_fields) + FAULTS_SHOWN:
            raise ConfigError(f"{len(given):,} parameters are given; the model has {len(cls.model_fields)}")
        try:
            return cls(**given)
        except ValidationError as exc:
            raise ConfigError(validation_message(exc, "parameter", cls.model_fields)) from exc

    def params_hash(self) -> str:
        """Return 16 hexadecimal digits that stand for everything here that can change a number in this mode."""
        return hashlib.sha256(json.dumps(_what_decides(self), sort_keys=True).encode()).hexdigest()[:16]


def _what_decides(p: Parameters) -> dict[str, Any]:
    """Return what can change a number of p's mode: the other parameters may differ between equal results."""
    decides: dict[str, Any] = {
        name: getattr(p, name) for name in ("mode", "need_preprocess", "input_data_path", "use_key")
    }
    if p.mode != "cell":
        decides["genes"] = sorted(set(p.genes))
    if p.mode == "contextual":
        decides["group_by"] = p.group_by
    if p.mode != "static":
        decides |= {"dtype": p.dtype, "max_length": p.max_length, "seed": p.seed}
    if not p.need_preprocess:
        if p.mode != "static":
            decides |= {"data_is_binned": p.data_is_binned, "tie_break": "" if p.data_is_binned else p.tie_break}
        return decides
    decides["filter_gene_by_counts"] = p.filter_gene_by_counts
    decides["min_counts"] = p.min_cell_counts or float(p.filter_cell_by_counts)
    if p.subset_hvg:
        decides |= {name: getattr(p, name) for name in ("subset_hvg", "hvg_flavor", "batch_key")}
        decides["variable_genes_of"] = _what_variable_genes_see(p)
    if p.mode != "static":
        decides |= {name: getattr(p, name) for name in ("normalize_total", "log1p", "binning", "tie_break")}
    return decides


def _what_variable_genes_see(p: Parameters) -> list[float]:
    """How X was scaled and logged before genes are chosen by it: not at all where layers took the results."""
    if p.use_key != "X" or (p.normalize_total and p.result_normed_key):
        return []
    return [p.normalize_total, float(p.log1p)]


class RequestParameters:
    """The parameters of a request's rows, read once: rows without parameters of their own share one object."""

    def __init__(self, params: Mapping[str, Any] | None) -> None:
        """Keep the request's `params`. Invalid ones raise when the parameters of a row are read."""
        self._params = dict(params or {})
        self._genes = self._params.pop("genes", None)
        self._shared_genes: tuple[str, ...] | None = None
        self._known: dict[Any, Parameters] = {}

    def of_row(self, row: Mapping[str, Any]) -> Parameters:
        """Return the parameters of a row: those in its columns win over the request's.

        Raises
        ------
        ConfigError
            An unknown name or a value that cannot work.
        """
        own = {name: value for name in Parameters.model_fields if (value := _plain(row.get(name))) is not None}
        key = tuple((name, type(value), value) for name, value in own.items())
        try:
            known = self._known.get(key)
        except TypeError:  # not hashable, and so no value that a parameter takes
            return Parameters.create(own)
        if known is None:
            known = Parameters.create(self._params, own)
            if "genes" not in own:
                known = known.model_copy(update={"genes": self._request_genes()})
            if len(self._known) < MAX_KEPT:
                self._known[key] = known
        return known

    def error_of_row(self, exc: ConfigError, position: int) -> tuple[Parameters, RowError]:
        """Return the request's parameters and the row's error, when a row's own parameters cannot work.

        Raises
        ------
        ConfigError
            It concerns the whole request: `params` are wrong, or their `on_error` is "raise".
        """
        parameters = self.of_row({})
        if parameters.on_error == "raise":
            raise type(exc)(f"row {position}: {exc}") from exc
        return parameters, RowError(str(exc))

    def _request_genes(self) -> tuple[str, ...]:
        if self._shared_genes is None:
            self._shared_genes = Parameters.create({"genes": self._genes}).genes
        return self._shared_genes


def validation_message(exc: ValidationError, what: str, known: Iterable[str] = ()) -> str:
    """Describe a pydantic error in one line that names each setting, its fault and what was probably meant."""
    return "; ".join(_fault(error, what, known) for error in exc.errors()[:FAULTS_SHOWN])


def _fault(error: Any, what: str, known: Iterable[str]) -> str:
    name = shortened(".".join(map(str, error["loc"])))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"unknown {what} {name!r}{did_you_mean(name, known)}"
    if not name:
        return message
    value = error["input"]
    end = ""
    if error["type"] == "literal_error" and isinstance(value, str):
        end = did_you_mean(value, re.findall("'([^']*)'", error["ctx"]["expected"]))
    return f"{what} {name!r}: {message}, got {shortened(repr(value))}{end}"


def _plain(value: Any) -> Any:
    """Turn numpy values and pandas' missing markers, as they stand in a column, into Python's."""
    import numpy as np  # here, because every command imports this module
    import pandas as pd

    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, list):
        return tuple(value)
    if value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value):
        return None
    return value
