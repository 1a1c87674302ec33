"""Parses requests to the endpoint: the bytes of a body become checked rows with their parameters, or a rejection.

MLflow checks types against the model's signature, as wherever else the model is served. This module adds the limits,
so that a hostile request costs no more than its rejection.
"""

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.scoring_server import infer_and_parse_data

from scgpt_batch.errors import ConfigError, PayloadError, RequestRefused, RowError, shortened
from scgpt_batch.inference.engine import Embedder
from scgpt_batch.inference.model_parameters import check_model_parameters
from scgpt_batch.io.rows import genes_from_json, is_empty, string_labels, table_from_json
from scgpt_batch.parameters import Parameters, RequestParameters
from scgpt_batch.registry.signature import check_columns

FORMATS = ("dataframe_split", "dataframe_records", "inputs", "instances")
MAX_ROWS, MAX_COLUMNS = 10_000, 1_000
MAX_CLIENT_ID = 256  # characters
MAX_GENES = 250_000  # four times the published vocabulary; bounds the time to read the names
MAX_NAMES = 1_000_000  # in the `genes` of all rows

# Bytes of one number in a response: the shortest text that reads back as the same float32, and a comma (11.6 on random
# vectors); base64 has four characters for three bytes.
NUMBER_BYTES = {"list": 11.6, "float32_base64": 16 / 3, "float16_base64": 8 / 3}

LESS = "restrict `genes`, use encoding 'float16_base64', send fewer cells, or run the batch job (scgpt-batch embed)"


@dataclass(frozen=True)
class RequestedRow:
    """One row of a request with its own parameters; `error` is set if a parameter in a column is invalid."""

    row: Mapping[str, Any]
    parameters: Parameters
    error: RowError | None = None


@dataclass(frozen=True)
class ParsedRequest:
    """All rows of a request, and the client's id for it."""

    rows: list[RequestedRow] = field(default_factory=list)
    client_request_id: str | None = None


class RequestReader:
    """Reads requests for one model; thread-safe."""

    def __init__(self, model: PyFuncModel, embedder: Embedder, *, answer_bytes: int) -> None:
        """`answer_bytes`: maximum size of a response; larger ones are rejected before they are computed."""
        self._checked = PyFuncModel(model_meta=model.metadata, model_impl=_Checked())
        self._schema = model.metadata.get_input_schema()
        self._columns = frozenset(self._schema.input_names())
        self._parameters = frozenset(spec.name for spec in model.metadata.get_params_schema().params)
        self._embedder, self._answer_bytes = embedder, answer_bytes

    def read(self, body: bytes) -> ParsedRequest:
        """Read the JSON of a request.

        Raises
        ------
        RequestRefused
            It cannot be read, has wrong types or names, or its response would be too large.
        """
        document = parse(body)
        client_id = _client_request_id(document.get("client_request_id"))
        rows, params = records(document), document.get("params")
        request = self._parameters_of_request(rows, params)
        seen: dict[int, ConfigError | None] = {}
        requested = [self._with_parameters(i, row, request, seen) for i, row in enumerate(rows)]
        self._check_number_of_genes(requested)
        payloads = self._check_types(requested, params)
        requested = [replace(one, row=payload) for one, payload in zip(requested, payloads, strict=True)]
        return ParsedRequest(self._check_response_size(requested), client_id)

    def _parameters_of_request(self, rows: list[dict[str, Any]], params: Any) -> RequestParameters:
        """Check the names of columns and parameters."""
        if params is not None and not isinstance(params, dict):
            raise RequestRefused(400, f"params must be an object, not {type(params).__name__}")
        unknown = next((name for name in params or () if name not in self._parameters), None)
        if unknown is not None:
            raise RequestRefused(
                400, f"unknown parameter {shortened(unknown)!r}; the model has {sorted(self._parameters)}"
            )
        request = RequestParameters(params)
        try:
            if rows:
                check_columns({name: None for row in rows for name in row})
            else:
                request.of_row({})
        except ConfigError as exc:
            raise RequestRefused(400, str(exc)) from exc
        return request

    def _with_parameters(
        self, position: int, row: dict[str, Any], request: RequestParameters, seen: dict[int, ConfigError | None]
    ) -> RequestedRow:
        """Set a row's parameters, as the PyFunc does; `seen` caches the error of each set of parameters."""
        try:
            parameters = request.of_row(row)
            if id(parameters) not in seen:
                seen[id(parameters)] = self._error(parameters)
            if error := seen[id(parameters)]:
                raise error
            return RequestedRow(row, parameters)
        except ConfigError as exc:
            try:
                return RequestedRow(row, *request.error_of_row(exc, position))
            except ConfigError as of_request:
                raise RequestRefused(400, str(of_request)) from exc

    def _error(self, parameters: Parameters) -> ConfigError | None:
        try:
            check_model_parameters(parameters, self._embedder.config, self._embedder.vocabulary)
        except ConfigError as exc:
            return exc
        return None

    def _check_number_of_genes(self, rows: list[RequestedRow]) -> None:
        names = sum(len(parameters.genes) for parameters in {id(r.parameters): r.parameters for r in rows}.values())
        if names > MAX_NAMES:
            raise RequestRefused(
                413,
                f"`genes` of all rows have {names:,} names; the limit is {MAX_NAMES:,}: use fewer names, or fewer "
                "different sets of parameters",
            )

    def _check_types(self, requested: list[RequestedRow], params: Any) -> list[dict[str, Any]]:
        """Have MLflow check rows and parameters against the model's signature; return the rows as it converts them."""
        kept = [
            {
                name: None if one.error and name in self._parameters else _array(one.row[name])
                for name in one.row
                if name in self._columns
            }
            for one in requested
        ]
        for name in {name for row in kept for name in row}:
            if not all(name in row for row in kept):
                raise RequestRefused(400, f"column {name} is missing in some rows: add it there with null")
        try:
            frame = infer_and_parse_data({"dataframe_records": kept}, self._schema)
            frame, _ = self._checked.predict(frame, params=params)
        except MlflowException as exc:
            message = re.sub(r"^Failed to enforce schema of data.*Error: ", "", exc.message, flags=re.DOTALL)
            raise RequestRefused(400, message) from exc  # without the data, which MLflow repeats
        except Exception as exc:  # the input is the client's values alone, so any error is theirs
            raise RequestRefused(400, f"rows or params have wrong types: {type(exc).__name__}: {exc}") from exc
        return frame.to_dict("records") if len(frame.columns) else [{} for _ in requested]  # pandas drops such rows

    def _check_response_size(self, rows: list[RequestedRow]) -> list[RequestedRow]:
        """Reject a response that would be too large, before it is computed; rows that cannot be read get an error."""
        checked, total = [], 0.0
        for i, one in enumerate(rows):
            if one.error is None:
                try:
                    total += answer_bytes(one.row, one.parameters, self._embedder)
                except PayloadError as exc:
                    if one.parameters.on_error == "raise":
                        raise RequestRefused(400, f"row {i}: {exc}") from exc
                    one = replace(one, error=exc)
            checked.append(one)
        if total > self._answer_bytes:
            raise RequestRefused(413, too_large("the response would have about", int(total), self._answer_bytes, LESS))
        return checked


def _client_request_id(given: Any) -> str | None:
    if given is not None and (not isinstance(given, str) or len(given) > MAX_CLIENT_ID):
        raise RequestRefused(400, f"client_request_id must be a string of at most {MAX_CLIENT_ID} characters")
    return given


def _array(value: Any) -> Any:
    """Convert lists of numbers, also inner ones, to numpy arrays, which MLflow checks ten times as fast."""
    if not isinstance(value, list) or not value:
        return value
    if isinstance(value[0], list):
        return [_array(inner) for inner in value]
    if not isinstance(value[0], (int, float)):
        return value
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        return value  # ragged; MLflow reports the expected type
    return array if array.ndim == 1 and array.dtype in (np.int64, np.float64) else value


def too_large(what: str, found: int, limit: int, advice: str) -> str:
    """Return a message with the size, the limit and what to do."""
    return f"{what} {found / 1e6:.1f} MB; the limit is {limit / 1e6:.1f} MB: {advice}"


def inflate(body: bytes, limit: int) -> bytes:
    """Decompress gzip to at most `limit` bytes; raise RequestRefused for more bytes, or if it is not gzip."""
    inflater = zlib.decompressobj(wbits=31)
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error as exc:
        raise RequestRefused(400, f"Content-Encoding is gzip, but the body is not: {exc}") from exc
    if len(plain) > limit:
        raise RequestRefused(
            413, f"the decompressed body has more than {limit / 1e6:.1f} MB, the limit for a request: send fewer cells"
        )
    if not inflater.eof or inflater.unused_data:
        raise RequestRefused(400, "the body must be one whole gzip stream: it is truncated, or followed by other data")
    return plain


def parse(body: bytes) -> dict[str, Any]:
    """Parse JSON, which must be an object with exactly one of the row formats."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise RequestRefused(400, f"the body is not JSON: {exc}") from exc
    given = [name for name in FORMATS if isinstance(document, dict) and name in document]
    if len(given) != 1:
        raise RequestRefused(400, f"the body must be a JSON object with exactly one of {', '.join(FORMATS)}")
    return document


def records(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Convert any of the row formats to a list of objects, one per row."""
    name = next(name for name in FORMATS if name in document)
    rows = _from_split(document[name]) if name == "dataframe_split" else document[name]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RequestRefused(400, f"{name} must be a list of rows, each an object of columns")
    if len(rows) > MAX_ROWS:
        raise RequestRefused(413, f"the request has {len(rows)} rows; the limit is {MAX_ROWS}: send several requests")
    widest = max(map(len, rows), default=0)
    if widest > MAX_COLUMNS:
        raise RequestRefused(413, f"a row has {widest} columns; the limit is {MAX_COLUMNS}: a matrix is one column")
    return rows


def _from_split(split: Any) -> list[dict[str, Any]]:
    columns, data = (split.get("columns"), split.get("data")) if isinstance(split, dict) else (None, None)
    if not isinstance(columns, list) or not isinstance(data, list) or not set(split) <= {"columns", "data", "index"}:
        raise RequestRefused(400, "dataframe_split must be an object with the lists `columns` and `data`")
    if not all(isinstance(name, str) for name in columns) or len(set(columns)) != len(columns):
        raise RequestRefused(400, "dataframe_split: columns must be distinct strings")
    for i, row in enumerate(data):
        if not isinstance(row, list) or len(row) != len(columns):
            raise RequestRefused(
                400, f"dataframe_split: row {i} of data must have one value for each of the {len(columns)} columns"
            )
    return [dict(zip(columns, row, strict=True)) for row in data]


def answer_bytes(row: Mapping[str, Any], parameters: Parameters, embedder: Embedder) -> float:
    """Return an upper bound of the bytes of a row's response, without reading its matrix.

    obs and var are read as the embedder reads them, so the real response cannot be larger.

    Raises
    ------
    PayloadError
        A table cannot be read.
    """
    p, vector = parameters, embedder.config.embsize * NUMBER_BYTES[parameters.encoding]
    if is_empty(row) and p.input_data_path and p.mode != "cell":
        n_genes = len(embedder.vocabulary)
        return min([n_genes, *_gene_limits(p)]) * vector  # groups add to it; the response itself is checked too
    if is_empty(row) or row.get("adata_var") is None:
        return 0.0  # an error
    genes = genes_from_json(row["adata_var"])
    if len(genes) > MAX_GENES:
        raise RequestRefused(413, f"adata_var has {len(genes)} genes; the limit is {MAX_GENES}: send fewer")
    if p.mode == "cell":
        return max(_length(row.get("x_indptr")), _length(row.get("adata_sparsematrix"))) * vector
    selection = embedder.reader.genes_of(row["adata_var"])
    known = selection.names[selection.known]
    n_genes = min([len(known), *_gene_limits(p)])
    labels = _labels(row, p.group_by) if p.group_by else [""]
    return n_genes * len(labels) * vector + len(labels) * _json_bytes(known) + n_genes * _json_bytes(labels)


def _gene_limits(p: Parameters) -> list[int]:
    """Return upper bounds for the number of genes in a response, besides those of the row."""
    limits = [len(p.genes)] if p.genes else []
    if p.need_preprocess and p.subset_hvg:
        limits.append(p.subset_hvg + len(p.genes))  # requested genes are always kept
    return limits


def _labels(row: Mapping[str, Any], column: str) -> list[str]:
    """Return the distinct values of an obs column; none if it does not exist, which is reported later."""
    obs = table_from_json(row["adata_obs"], "adata_obs") if row.get("adata_obs") is not None else {}
    return list(dict.fromkeys(string_labels(obs[column]))) if column in obs else []


def _json_bytes(texts: Iterable[str]) -> int:
    return len(orjson.dumps(list(texts)))


def _length(values: Any) -> int:
    return len(values) if isinstance(values, (list, np.ndarray)) else 0


class _Checked:
    """A model for MLflow's PyFuncModel that returns its input, after MLflow has checked and converted it."""

    def predict(self, data: pd.DataFrame, params: dict[str, Any] | None = None) -> tuple[pd.DataFrame, Any]:
        return data, params
