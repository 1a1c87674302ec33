"""`ai_query` for open-source Spark: runs the SQL of Databricks dashboards against any endpoint of this model.

It supports what Databricks supports with custom models: a struct with the model's input columns and parameters, and
`failOnError`. One thing differs, because a Spark function has a single return type: the struct also has the fields
`response` (with the same columns) and `errorMessage`. With `failOnError => false`, only these two are set; otherwise
they are null.
"""

# No `from __future__ import annotations`: Spark infers the kind of function from the annotations.
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa
import requests
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import to_arrow_type
from pyspark.sql.types import ArrayType, DataType, StringType, StructField, StructType
from urllib3 import Retry

from scgpt_batch.errors import ConfigError, ScgptBatchError

TOKEN = "SCGPT_BATCH_TOKEN"
REQUEST_BYTES = 16_000_000  # limit of Databricks Model Serving for a request's body
TIMEOUT = 300  # seconds; Databricks Model Serving allows 297

Row = dict[str, Any]


def register_ai_query(
    spark: SparkSession, endpoints: Mapping[str, str], *, token: Callable[[], str] | None = None
) -> None:
    """Register `ai_query(endpoint, request [, failOnError => false])` in the session.

    Parameters
    ----------
    endpoints
        Name used in the SQL -> URL, such as http://127.0.0.1:5001.
    token
        Function that returns the bearer token. Spark's workers call it for each request, so that a query may outlive a
        token. Default: the value that SCGPT_BATCH_TOKEN has now.

    Raises
    ------
    ConfigError
        A URL is invalid. (Errors of a query are raised by Spark, when it runs.)
    """
    from pyspark.sql.functions import arrow_udf  # new in Spark 4.1; the rest of this package runs on older ones

    for name, url in endpoints.items():
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint {name!r} has an invalid URL, {url!r}: use http://host:port")
    fixed = os.environ.get(TOKEN, "")
    known = {
        name: Endpoint(name, url.rstrip("/").removesuffix("/invocations") + "/invocations", token or (lambda: fixed))
        for name, url in endpoints.items()
    }
    returned = answer_type()
    arrow_type = to_arrow_type(returned)

    # The argument names are those of Databricks, because SQL binds `failOnError => false` by name.
    def ai_query(
        endpoint: pa.Array,
        request: pa.Array,
        returnType: pa.Array = None,
        failOnError: pa.Array = None,
        modelParameters: pa.Array = None,
    ) -> pa.Array:
        if returnType is not None:
            raise ScgptBatchError("ai_query: remove returnType, the type is that of the model's output")
        if modelParameters is not None:
            raise ScgptBatchError(
                "ai_query: custom models do not support modelParameters: add the parameters as fields of the struct"
            )
        target = _endpoint(known, endpoint)
        fail = failOnError is None or failOnError[0].as_py() is not False
        return pa.array(_responses(target, request, fail), arrow_type)

    # not deterministic: otherwise Spark may send requests twice, for a filter and for the columns
    # (Spark's type stubs lack struct as the type of an arrow_udf)
    function = arrow_udf(ai_query, returned)  # type: ignore[call-overload]
    spark.udf.register("ai_query", function.asNondeterministic())


def answer_type() -> StructType:
    """Return the type of `ai_query`: a struct of the model's output columns, `response` and `errorMessage`."""
    from scgpt_batch.registry.signature import signature  # takes seconds to import, so workers skip it

    columns = [StructField(column.name, _spark_type(column.type)) for column in signature().outputs]
    return StructType(
        [*columns, StructField("response", StructType(columns)), StructField("errorMessage", StringType())]
    )


def _spark_type(kind: Any) -> DataType:
    """Return the Spark type for a column of MLflow's schema, which can be an array."""
    return ArrayType(_spark_type(kind.dtype)) if hasattr(kind, "dtype") else kind.to_spark()


@dataclass(frozen=True)
class Endpoint:
    """An endpoint's name and URL, and the function that returns its token (an empty one: none is sent)."""

    name: str
    url: str
    token: Callable[[], str]


class _Refused(Exception):
    """The endpoint did not return embeddings for a request."""

    def __init__(self, message: str, *, divisible: bool) -> None:
        super().__init__(message)
        self.divisible = divisible  # whether fewer rows at a time may succeed


def _endpoint(known: Mapping[str, Endpoint], column: pa.Array) -> Endpoint:
    names = set(column.to_pylist())
    if len(names) != 1:
        raise ScgptBatchError("ai_query: the endpoint must be a string literal, the same for all rows")
    (name,) = names
    if name not in known:
        raise ScgptBatchError(f"ai_query: no endpoint {name!r}; registered are: {', '.join(map(repr, sorted(known)))}")
    return known[name]


def _responses(endpoint: Endpoint, request: pa.Array, fail: bool) -> list[Row | None]:
    """Return the responses for a batch of rows; null for a null request."""
    if not pa.types.is_struct(request.type):
        raise ScgptBatchError("ai_query: the request must be a struct of the model's columns: struct(genes, ...)")
    rows = request.to_pylist()
    requested = [row for row in rows if row is not None]
    responses = iter(_query(endpoint, requested, fail) if requested else [])
    return [None if row is None else next(responses) for row in rows]


def _query(endpoint: Endpoint, rows: list[Row], fail: bool) -> list[Row]:
    """Send rows in one request; if it is rejected, send the halves, until each rejected row is alone."""
    try:
        responses = _post(endpoint, rows)
    except _Refused as refused:
        if len(rows) > 1 and refused.divisible:
            half = len(rows) // 2
            return _query(endpoint, rows[:half], fail) + _query(endpoint, rows[half:], fail)
        if fail:
            raise ScgptBatchError(f"ai_query: {refused}") from None
        return [{"errorMessage": str(refused)}] * len(rows)
    return responses if fail else [{"response": response} for response in responses]


def _post(endpoint: Endpoint, rows: list[Row]) -> list[Row]:
    body = _body(rows)
    if len(body) > REQUEST_BYTES:
        raise _Refused(f"the request has {len(body):,} bytes; the limit is {REQUEST_BYTES:,}", divisible=True)
    try:
        token = endpoint.token().strip()
    except Exception as exc:  # the caller's function raises anything; its message may contain a secret
        raise _Refused(f"no token for endpoint {endpoint.name!r}: {type(exc).__name__}", divisible=False) from None
    login = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        reply = _session().post(endpoint.url, data=body, headers=login, timeout=TIMEOUT)
    except requests.RequestException as exc:
        message = f"endpoint {endpoint.name!r} at {endpoint.url} cannot be reached: {type(exc).__name__}"
        raise _Refused(message, divisible=False) from exc
    if reply.status_code in (401, 403):
        raise _Refused(
            f"endpoint {endpoint.name!r} rejects the token (HTTP {reply.status_code}: {_message(reply)}): it is "
            f"missing, expired, or lacks CAN QUERY. Set {TOKEN} and register ai_query again, or register it with a "
            "token function, whose tokens may change during a query",
            divisible=False,
        )
    if not reply.ok:
        # 400 and 413 can be caused by one row; 503 affects all of them
        raise _Refused(f"HTTP {reply.status_code}: {_message(reply)}", divisible=reply.status_code in (400, 413))
    return reply.json()["predictions"]


def _body(rows: list[Row]) -> bytes:
    """Return rows in MLflow's `dataframe_split` format; columns that are null in all rows are left out."""
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    split = {"columns": columns, "index": list(range(len(rows))), "data": [[row[c] for c in columns] for row in rows]}
    try:
        return json.dumps({"dataframe_split": split}, allow_nan=False).encode()
    except (TypeError, ValueError) as exc:
        raise _Refused(f"the request cannot be written as JSON: {exc}", divisible=True) from exc


@cache
def _session() -> requests.Session:
    """Return the process' HTTP session; it retries with growing pauses while an endpoint is overloaded."""
    session = requests.Session()
    retry = Retry(total=5, connect=2, backoff_factor=0.5, status_forcelist=(429, 502, 503), allowed_methods=None,
                  raise_on_status=False)  # fmt: skip
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
    session.headers["Content-Type"] = "application/json"
    return session


def _message(reply: requests.Response) -> str:
    """Return the endpoint's error message, without a traceback."""
    try:
        message = str(reply.json()["message"])
    except (ValueError, KeyError, TypeError):
        message = reply.text
    return message.strip().split("\n")[0][:500] or reply.reason
