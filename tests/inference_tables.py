"""Generated inference tables of all three generations, with the irregularities of real ones."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql.pandas.types import to_arrow_schema

from tests.helpers import assert_close

GATEWAY = """
    databricks_request_id STRING, request_date DATE, client_request_id STRING, request_time TIMESTAMP, status_code INT,
    sampling_fraction DOUBLE, execution_duration_ms BIGINT, request STRING, response STRING,
    logging_error_codes ARRAY<STRING>, served_entity_id STRING, requester STRING
"""
# As Databricks makes it; local Spark writes it too.
GATEWAY_PROPERTIES = """
    CLUSTER BY (request_date) TBLPROPERTIES ('delta.checkpointPolicy' = 'v2', 'delta.enableChangeDataFeed' = 'true',
    'delta.enableDeletionVectors' = 'true', 'delta.enableRowTracking' = 'true')
"""
LEGACY = """
    client_request_id STRING, databricks_request_id STRING, date DATE, timestamp_ms BIGINT, status_code INT,
    sampling_fraction DOUBLE, execution_time_ms BIGINT, request STRING, response STRING,
    request_metadata MAP<STRING, STRING>
"""
UNITY = """
    invocation_id STRING, event_time TIMESTAMP, status_code INT, latency_ms BIGINT, request STRING, response STRING,
    logging_error_codes ARRAY<STRING>
"""
TOO_LARGE = {"request": "MAX_REQUEST_SIZE_EXCEEDED", "response": "MAX_RESPONSE_SIZE_EXCEEDED"}


def requests(n: int, *, until: datetime, days: int = 8, seed: int = 0) -> pd.DataFrame:
    """Make requests in the columns of a gateway table: sampled, some failed, some too large to be logged."""
    rng = np.random.default_rng(seed)
    seconds = rng.integers(0, days * 86_400, n)
    status = rng.choice([200, 200, 200, 200, 200, 200, 400, 404, 429, 500, 504], n)
    version = np.where(seconds < 2 * 86_400, "scgpt-3", rng.choice(["scgpt-2", "scgpt-3"], n))
    lines = pd.DataFrame(
        {
            "databricks_request_id": [f"id-{i:05}" for i in range(n)],
            "client_request_id": np.where(rng.random(n) < 0.3, "mine", None),
            "request_time": [until - timedelta(seconds=int(s) + 1) for s in seconds],
            "status_code": status,
            "sampling_fraction": rng.choice([1.0, 1.0, 0.5, 0.3], n),
            "execution_duration_ms": pd.array(rng.lognormal(5, 1.5, n).astype(int), dtype="object"),
            "request": [f'{{"dataframe_records": [{"é" * int(k)}]}}' for k in rng.integers(0, 40, n)],
            "response": [f'{{"answer": "{s}"}}' for s in status],
            "served_entity_id": version,
            "requester": rng.choice(["ann@lab.org", "bob@lab.org", "job", None], n),
        }
    )
    lines.loc[rng.random(n) < 0.02, ["execution_duration_ms"]] = None
    lines.loc[rng.random(n) < 0.01, ["sampling_fraction"]] = None
    for column in TOO_LARGE:
        lines.loc[rng.random(n) < 0.1, [column]] = None
    lines["logging_error_codes"] = [
        [code for column, code in TOO_LARGE.items() if line[column] is None] for line in lines.to_dict("records")
    ]
    lines["request_date"] = [time.astimezone(UTC).date() for time in lines["request_time"]]
    return lines.astype(object).where(lines.notna(), None)


def delivered(lines: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Deliver some requests twice or three times, in any order."""
    again = lines.sample(frac=0.1, random_state=seed)
    return pd.concat([lines, again, again.head(20)]).sample(frac=1, random_state=seed)


def as_gateway(line: dict[str, Any]) -> dict[str, Any]:
    return line


def as_legacy(line: dict[str, Any]) -> dict[str, Any]:
    name, version = line["served_entity_id"].split("-")
    return line | {
        "date": line["request_date"],
        "timestamp_ms": int(line["request_time"].timestamp() * 1000),
        "execution_time_ms": line["execution_duration_ms"],
        "request_metadata": [("endpoint_name", "scgpt"), ("model_name", name), ("model_version", version)],
    }


def as_unity(line: dict[str, Any]) -> dict[str, Any]:
    return line | {
        "invocation_id": line["databricks_request_id"],
        "event_time": line["request_time"],
        "latency_ms": line["execution_duration_ms"],
    }


# What of the requests a generation does not tell, and what the view then says.
NOT_RECORDED: dict[str, dict[str, Any]] = {
    "gateway": {},
    "legacy": {"requester": None, "logging_error_codes": []},
    "unity": {"requester": None, "served_entity_id": None, "sampling_fraction": 1.0, "client_request_id": None},
}
TABLES = {"gateway": (GATEWAY, as_gateway), "legacy": (LEGACY, as_legacy), "unity": (UNITY, as_unity)}


def visible(lines: pd.DataFrame, generation: str) -> pd.DataFrame:
    """Return the lines as a generation has them: columns that it does not record are null."""
    return lines.assign(**{name: [value] * len(lines) for name, value in NOT_RECORDED[generation].items()})


def write(spark: Any, lines: pd.DataFrame, table: str, generation: str = "gateway") -> str:
    """Write the lines as a table of a generation; return its name."""
    columns, convert = TABLES[generation]
    spark.sql(f"CREATE TABLE {table} ({columns}) USING delta {GATEWAY_PROPERTIES if generation == 'gateway' else ''}")
    schema = to_arrow_schema(spark.table(table).schema)
    rows = pa.Table.from_pylist([convert(line) for line in lines.to_dict("records")], schema)
    spark.createDataFrame(rows).write.format("delta").mode("append").saveAsTable(table)
    return table


def assert_holds(view: Any, lines: pd.DataFrame) -> None:
    """Compare the view of a table with the requests that were written: each is there once with all its columns."""
    found, wanted = view.orderBy("request_id").toPandas(), lines
    assert found["request_id"].tolist() == wanted["databricks_request_id"].tolist()
    for column in ("client_request_id", "status_code", "request", "response", "requester", "request_date"):
        assert found[column].tolist() == wanted[column].tolist(), column
    assert [time.replace(tzinfo=UTC) for time in found["request_time"]] == wanted["request_time"].tolist()
    assert found["served_entity"].tolist() == wanted["served_entity_id"].tolist()
    assert [list(codes) for codes in found["logging_error_codes"]] == wanted["logging_error_codes"].tolist()
    assert_close(found["duration_ms"].astype(float), wanted["execution_duration_ms"].astype(float))
