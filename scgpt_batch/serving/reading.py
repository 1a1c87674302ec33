"""What a request to the endpoint asks: bytes in, checked rows with their parameters out; what is refused, and why.

Types are checked by MLflow against the model's signature, as everywhere else that the model is served; here stand the
limits, and what keeps a hostile request from costing more than a refusal.
"""

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.scoring_server import infer_and_parse_data

from scgpt_batch.anndata_rows import is_empty
from scgpt_batch.embedder import Embedder, check_model_parameters
from scgpt_batch.errors import ConfigError, RequestRefused, RowError
from scgpt_batch.model import Vocabulary
from scgpt_batch.parameters import Parameters, told_in_row

FORMATS = ("dataframe_split", "dataframe_records", "inputs", "instances")
MAX_ROWS, MAX_COLUMNS = 10_000, 1_000
MAX_CLIENT_ID = 256  # characters
MAX_GENES = 250_000  # four times the published vocabulary; reading the names of more takes longer than a refusal may

# Bytes of one number in an answer: float32 as the shortest text that reads back as it, and a comma (11.6 on random
# vectors); base64 takes four characters for three bytes.
NUMBER_BYTES = {"list": 11.6, "float32_base64": 16 / 3, "float16_base64": 8 / 3}

LESS = "restrict `genes`, take encoding 'float16_base64', send fewer cells, or run the batch job (scgpt-batch embed)"


@dataclass(frozen=True)
class AskedRow:
    """One row of a request with its own parameters; `error` where a parameter in a column cannot work."""

    row: Mapping[str, Any]
    parameters: Parameters
    error: RowError | None = None


@dataclass(frozen=True)
class Asked:
    """All rows of a request, and the caller's id for it."""

    rows: list[AskedRow] = field(default_factory=list)
    client_request_id: str | None = None


class RequestReader:
    """Reads requests for one model; safe to call from several threads."""

    def __init__(self, model: PyFuncModel, embedder: Embedder, *, answer_bytes: int) -> None:
        """`answer_bytes`: what an answer may hold; a request that wants more is refused before it is computed."""
        self._checked = PyFuncModel(model_meta=model.metadata, model_impl=_Checked())
        self._schema = model.metadata.get_input_schema()
        self._columns = frozenset(self._schema.input_names())
        self._parameters = frozenset(spec.name for spec in model.metadata.get_params_schema().params)
        self._embedder, self._answer_bytes = embedder, answer_bytes

    def read(self, body: bytes) -> Asked:
        """Read the JSON of a request.

        Raises
        ------
        RequestRefused
            It cannot be read, has wrong types or names, or its answer would be too large.
        """
        document = parse(body)
        client_id = _client_request_id(document.get("client_request_id"))
        rows, params = self._check_types(records(document), document.get("params"))
        asked = Asked(
            [self._with_parameters(i, row, params) for i, row in enumerate(rows)],
            client_id,
        )
        self._refuse_large_answer(asked.rows)
        return asked

    def _check_types(self, given: list[dict[str, Any]], params: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Check rows and parameters against the model's signature, by MLflow."""
        if params is not None and not isinstance(params, dict):
            raise RequestRefused(400, f"params must be an object, not {type(params).__name__}")
        unknown = sorted(set(params or ()) - self._parameters)
        if unknown:
            raise RequestRefused(400, f"unknown parameter {unknown[0]!r}; the model knows {sorted(self._parameters)}")
        kept = [{name: _array(row[name]) for name in row if name in self._columns} for row in given]
        for name in {name for row in kept for name in row}:
            if not all(name in row for row in kept):
                raise RequestRefused(400, f"column {name} stands in some rows and not in others: give null there")
        try:
            frame = infer_and_parse_data({"dataframe_records": kept}, self._schema)
            frame, checked = self._checked.predict(frame, params=params)
        except MlflowException as exc:
            told = re.sub(r"^Failed to enforce schema of data.*Error: ", "", exc.message, flags=re.DOTALL)
            raise RequestRefused(400, told) from exc  # without the data, which MLflow repeats
        except Exception as exc:  # nothing but the client's values went in: whatever broke, they broke it
            raise RequestRefused(400, f"rows or params have wrong types: {type(exc).__name__}: {exc}") from exc
        # pandas forgets rows without columns; each is a question for the whole vocabulary
        return (frame.to_dict("records") if len(frame.columns) else [{} for _ in given]), checked or {}

    def _with_parameters(self, position: int, row: dict[str, Any], params: dict[str, Any]) -> AskedRow:
        """Set a row's parameters, as the PyFunc does it."""
        try:
            parameters = Parameters.of_row(row, params)
            check_model_parameters(parameters, self._embedder.config)
            return AskedRow(row, parameters)
        except ConfigError as exc:
            try:
                return AskedRow(row, *told_in_row(exc, position, params))
            except ConfigError as of_request:
                raise RequestRefused(400, str(of_request)) from exc

    def _refuse_large_answer(self, rows: Iterable[AskedRow]) -> None:
        d, total = self._embedder.config.embsize, 0.0
        for asked in rows:
            if asked.error is None:
                vectors = expected_vectors(asked.row, asked.parameters, self._embedder.vocabulary)
                total += vectors * d * NUMBER_BYTES[asked.parameters.encoding]
        if total > self._answer_bytes:
            raise RequestRefused(413, too_large("the answer would hold about", int(total), self._answer_bytes, LESS))


def _client_request_id(given: Any) -> str | None:
    if given is not None and (not isinstance(given, str) or len(given) > MAX_CLIENT_ID):
        raise RequestRefused(400, f"client_request_id must be a string of at most {MAX_CLIENT_ID} characters")
    return given


def _array(value: Any) -> Any:
    """Make numpy arrays of lists of numbers, also of inner lists: MLflow checks them ten times as fast."""
    if not isinstance(value, list) or not value:
        return value
    if isinstance(value[0], list):
        return [_array(inner) for inner in value]
    if not isinstance(value[0], (int, float)):
        return value
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        return value  # ragged; MLflow says what it wants
    return array if array.ndim == 1 and array.dtype in (np.int64, np.float64) else value


def too_large(what: str, found: int, limit: int, advice: str) -> str:
    """Say which limit is passed, by how much, and what to do."""
    return f"{what} {found / 1e6:.1f} MB; the limit is {limit / 1e6:.1f} MB: {advice}"


def inflate(body: bytes, limit: int) -> bytes:
    """Undo gzip, never making more than `limit` bytes; RequestRefused for more, or for what is no gzip."""
    inflater = zlib.decompressobj(wbits=31)
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error as exc:
        raise RequestRefused(400, f"the body is not gzip, though Content-Encoding says so: {exc}") from exc
    if len(plain) > limit:
        raise RequestRefused(
            413, f"the body inflates to more than {limit / 1e6:.1f} MB, the limit of a request: send fewer cells a row"
        )
    if not inflater.eof or inflater.unused_data:
        raise RequestRefused(400, "the body must be one whole gzip stream: it is cut short, or something follows it")
    return plain


def parse(body: bytes) -> dict[str, Any]:
    """Read JSON that must be an object with one of the row formats."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise RequestRefused(400, f"the body is not JSON: {exc}") from exc
    given = [name for name in FORMATS if isinstance(document, dict) and name in document]
    if len(given) != 1:
        raise RequestRefused(400, f"the body must be a JSON object with exactly one of {', '.join(FORMATS)}")
    return document


def records(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bring every row format to a list of objects, one a row."""
    name = next(name for name in FORMATS if name in document)
    rows = _from_split(document[name]) if name == "dataframe_split" else document[name]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RequestRefused(400, f"{name} must be a list of rows, each an object of columns")
    if len(rows) > MAX_ROWS:
        raise RequestRefused(413, f"{len(rows)} rows; the limit is {MAX_ROWS}: send several requests")
    widest = max(map(len, rows), default=0)
    if widest > MAX_COLUMNS:
        raise RequestRefused(413, f"a row has {widest} columns; the limit is {MAX_COLUMNS}: a matrix is one column")
    return rows


def _from_split(split: Any) -> list[dict[str, Any]]:
    columns, data = (split.get("columns"), split.get("data")) if isinstance(split, dict) else (None, None)
    if not isinstance(columns, list) or not isinstance(data, list) or not set(split) <= {"columns", "data", "index"}:
        raise RequestRefused(400, "dataframe_split must be an object with the lists `columns` and `data`")
    if not all(isinstance(name, str) for name in columns) or len(set(columns)) != len(columns):
        raise RequestRefused(400, "dataframe_split: columns must be strings, each given once")
    for i, row in enumerate(data):
        if not isinstance(row, list) or len(row) != len(columns):
            raise RequestRefused(
                400, f"dataframe_split: row {i} of data has not a value for each of the {len(columns)} columns"
            )
    return [dict(zip(columns, row, strict=True)) for row in data]


def expected_vectors(row: Mapping[str, Any], parameters: Parameters, vocabulary: Vocabulary) -> int:
    """Bound the vectors of a row's answer from above, without reading its matrix."""
    if is_empty(row):
        whole = not parameters.need_preprocess and not parameters.input_data_path and parameters.mode == "static"
        return (len(parameters.genes) or len(vocabulary)) if whole else 0
    n_cells = _length(row.get("x_indptr")) or _length(row.get("adata_sparsematrix"))
    genes = _index(row.get("adata_var"))
    if len(genes) > MAX_GENES:
        raise RequestRefused(413, f"adata_var names {len(genes)} genes; the limit is {MAX_GENES}: drop some")
    if parameters.mode == "cell":
        return n_cells
    # Names that are all unknown may be Ensembl ids, which are mapped to symbols later
    bounds = [int((vocabulary.ids(genes) >= 0).sum()) or len(genes)]
    if parameters.genes:
        bounds.append(len(parameters.genes))
    if parameters.need_preprocess and parameters.subset_hvg:
        bounds.append(parameters.subset_hvg)
    return min(bounds) * (_groups(row.get("adata_obs"), parameters.group_by) if parameters.group_by else 1)


def _length(values: Any) -> int:
    return len(values) if isinstance(values, (list, np.ndarray)) else 0


def _split_json(text: Any) -> dict[str, Any]:
    """The table's JSON; nothing where it cannot be read, which the embedder says better."""
    try:
        table = orjson.loads(text) if isinstance(text, str) else {}
    except orjson.JSONDecodeError:
        return {}
    return table if isinstance(table, dict) else {}


def _index(text: Any) -> np.ndarray:
    names = _split_json(text).get("index")
    return np.array([str(name) for name in names] if isinstance(names, list) else [], dtype=object)


def _groups(text: Any, column: str) -> int:
    """How many values an obs column has; 1 where it cannot be read."""
    table = _split_json(text)
    columns, data = table.get("columns"), table.get("data")
    if not isinstance(columns, list) or not isinstance(data, list) or column not in columns:
        return 1
    at = columns.index(column)
    return len({str(row[at]) for row in data if isinstance(row, list) and len(row) > at}) or 1


class _Checked:
    """Stands where MLflow expects a model: hands back what MLflow found to fit the signature."""

    def predict(self, data: pd.DataFrame, params: dict[str, Any] | None = None) -> tuple[pd.DataFrame, Any]:
        return data, params
