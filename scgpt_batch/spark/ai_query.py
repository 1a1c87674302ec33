"""`ai_query` on open-source Spark: the SQL that dashboards run on Databricks, against any endpoint of this model.

The forms that Databricks supports with custom models work as they are written there: a struct whose fields are the
model's input columns, parameters among them, and `failOnError`. What differs, because a Spark function has one type:
beside the model's output columns the struct has `response` (the same columns) and `errorMessage`, which alone are
filled with `failOnError => false`, and are null without.
"""

# No `from __future__ import annotations`: Spark reads the kind of function from the types themselves.
import json
import os
from collections.abc import Mapping
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
REQUEST_BYTES = 16_000_000  # of Databricks Model Serving, for a request's body
TIMEOUT = 300  # seconds; a model may take 297 there

Row = dict[str, Any]


def register_ai_query(spark: SparkSession, endpoints: Mapping[str, str]) -> None:
    """Register `ai_query(endpoint, request [, failOnError => false])` in the session.

    Parameters
    ----------
    endpoints
        Name as it stands in the SQL -> URL, such as http://127.0.0.1:5001. A bearer token is taken from
        SCGPT_BATCH_TOKEN now.

    Raises
    ------
    ConfigError
        An address is none. (Faults of a query come up in Spark, when it runs.)
    """
    from pyspark.sql.functions import arrow_udf  # new in Spark 4.1; the rest of this package runs on older ones

    for name, url in endpoints.items():
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint {name!r} has no address: {url!r}, wanted http://host:port")
    known = {
        name: Endpoint(name, url.rstrip("/").removesuffix("/invocations") + "/invocations", os.environ.get(TOKEN, ""))
        for name, url in endpoints.items()
    }
    returned = answer_type()
    arrow_type = to_arrow_type(returned)

    # The arguments' names are those of Databricks: SQL binds `failOnError => false` by them.
    def ai_query(
        endpoint: pa.Array,
        request: pa.Array,
        returnType: pa.Array = None,
        failOnError: pa.Array = None,
        modelParameters: pa.Array = None,
    ) -> pa.Array:
        if returnType is not None:
            raise ScgptBatchError("ai_query: returnType is not taken here, the type is that of the model's output")
        if modelParameters is not None:
            raise ScgptBatchError("ai_query: a custom model takes no modelParameters, give columns of the struct")
        asked = _endpoint(known, endpoint)
        fail = failOnError is None or failOnError[0].as_py() is not False
        return pa.array(_answers(asked, request, fail), arrow_type)

    # not deterministic: otherwise Spark may ask twice, once for a filter and once for the columns
    # (Spark's stubs don't know struct as an arrow_udf's type)
    function = arrow_udf(ai_query, returned)  # type: ignore[call-overload]
    spark.udf.register("ai_query", function.asNondeterministic())


def answer_type() -> StructType:
    """Return the struct that `ai_query` gives: the model's output columns, then `response` and `errorMessage`."""
    from scgpt_batch.registry.signature import signature  # seconds to import, which Spark's workers are spared

    columns = [StructField(column.name, _spark_type(column.type)) for column in signature().outputs]
    return StructType(
        [*columns, StructField("response", StructType(columns)), StructField("errorMessage", StringType())]
    )


def _spark_type(kind: Any) -> DataType:
    """The Spark type of a column of MLflow's schema: a plain one, or arrays of it."""
    return ArrayType(_spark_type(kind.dtype)) if hasattr(kind, "dtype") else kind.to_spark()


@dataclass(frozen=True)
class Endpoint:
    """An endpoint by name, and how it is reached."""

    name: str
    url: str
    token: str


class _Refused(Exception):
    """The endpoint did not answer a request."""

    def __init__(self, message: str, *, divisible: bool) -> None:
        super().__init__(message)
        self.divisible = divisible  # fewer rows at once may be answered


def _endpoint(known: Mapping[str, Endpoint], column: pa.Array) -> Endpoint:
    names = set(column.to_pylist())
    if len(names) != 1:
        raise ScgptBatchError("ai_query: the endpoint must be one literal")
    (name,) = names
    if name not in known:
        raise ScgptBatchError(f"ai_query: no endpoint {name!r}; registered are: {', '.join(sorted(known))}")
    return known[name]


def _answers(endpoint: Endpoint, request: pa.Array, fail: bool) -> list[Row | None]:
    """Ask for all rows of a batch; a null request has a null answer."""
    if not pa.types.is_struct(request.type):
        raise ScgptBatchError("ai_query: the request must be a struct of the model's columns: struct(genes, ...)")
    rows = request.to_pylist()
    asked = [row for row in rows if row is not None]
    answers = iter(_ask(endpoint, asked, fail) if asked else [])
    return [None if row is None else next(answers) for row in rows]


def _ask(endpoint: Endpoint, rows: list[Row], fail: bool) -> list[Row]:
    """Ask for some rows at once; where that is refused, for the halves, until the rows at fault stand alone."""
    try:
        answers = _post(endpoint, rows)
    except _Refused as refused:
        if len(rows) > 1 and refused.divisible:
            half = len(rows) // 2
            return _ask(endpoint, rows[:half], fail) + _ask(endpoint, rows[half:], fail)
        if fail:
            raise ScgptBatchError(f"ai_query: {refused}") from None
        return [{"errorMessage": str(refused)}] * len(rows)
    return answers if fail else [{"response": answer} for answer in answers]


def _post(endpoint: Endpoint, rows: list[Row]) -> list[Row]:
    body = _body(rows)
    if len(body) > REQUEST_BYTES:
        raise _Refused(f"a request of {len(body):,} bytes; the limit is {REQUEST_BYTES:,}", divisible=True)
    try:
        reply = _session(endpoint.token).post(endpoint.url, data=body, timeout=TIMEOUT)
    except requests.RequestException as exc:
        told = f"endpoint {endpoint.name!r} at {endpoint.url} cannot be reached: {type(exc).__name__}"
        raise _Refused(told, divisible=False) from exc
    if not reply.ok:
        # 400 and 413 may be one row's fault; 401 or 503 concern all of them
        raise _Refused(f"HTTP {reply.status_code}: {_said(reply)}", divisible=reply.status_code in (400, 413))
    return reply.json()["predictions"]


def _body(rows: list[Row]) -> bytes:
    """Spell rows as MLflow's `dataframe_split`; a column that is null in all of them is left out."""
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    split = {"columns": columns, "index": list(range(len(rows))), "data": [[row[c] for c in columns] for row in rows]}
    try:
        return json.dumps({"dataframe_split": split}, allow_nan=False).encode()
    except (TypeError, ValueError) as exc:
        raise _Refused(f"the request has no JSON: {exc}", divisible=True) from exc


@cache
def _session(token: str) -> requests.Session:
    """The process's connections; an overloaded endpoint is asked again, in growing pauses."""
    session = requests.Session()
    again = Retry(total=5, connect=2, backoff_factor=0.5, status_forcelist=(429, 502, 503), allowed_methods=None,
                  raise_on_status=False)  # fmt: skip
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=again))
    session.headers["Content-Type"] = "application/json"
    if token:
        session.headers["Authorization"] = f"Bearer {token}"
    return session


def _said(reply: requests.Response) -> str:
    """The endpoint's own words, without a traceback."""
    try:
        told = str(reply.json()["message"])
    except (ValueError, KeyError, TypeError):
        told = reply.text
    return told.strip().split("\n")[0][:500] or reply.reason
