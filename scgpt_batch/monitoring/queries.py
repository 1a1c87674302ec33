"""The monitoring queries of `sql/`, run by name, and the views through which they read tables.

The same files run in Databricks SQL and in local Spark. Queries about requests read one normalised view, which
`requests_view` creates from an inference table of any generation.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any

from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession

from scgpt_batch.errors import ConfigError
from scgpt_batch.spark import tables
from scgpt_batch.spark.errors import is_unbound_parameter

REQUESTS, RESULT = "scgpt_requests", "scgpt_query_result"  # temporary views

# Columns by which a generation of inference tables is recognised: no other generation has all of them.
GENERATIONS = {
    "requests_gateway": {"databricks_request_id", "request_time", "execution_duration_ms"},
    "requests_legacy": {"databricks_request_id", "timestamp_ms", "execution_time_ms"},
    "requests_unity": {"invocation_id", "event_time", "latency_ms"},
}
CONSTANTS_ONLY = "spark.sql.legacy.parameterSubstitution.constantsOnly"


@cache
def text(name: str) -> str:
    """Return the SQL of a query."""
    return resources.files("scgpt_batch.monitoring").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")


def parameters(name: str) -> list[str]:
    """List a query's parameters, in the order in which the SQL names them; comments do not count."""
    return _parameters(text(name))


def _parameters(sql: str) -> list[str]:
    code = "\n".join(line for line in sql.splitlines() if not line.startswith("--"))
    return list(dict.fromkeys(re.findall(r":(\w+)", code)))


def inlined(sql: str, parameters: Mapping[str, str]) -> str:
    """Return SQL with each parameter replaced by SQL text, for views and alerts, which take no parameters."""
    parameter = r"identifier\(:(\w+)\)|:(\w+)"
    return re.sub(parameter, lambda found: parameters.get(found[1] or found[2], found[0]), sql)


def question(name: str) -> str:
    """Return the question that a query answers: the first line of its file, up to the question mark."""
    return text(name).splitlines()[0].removeprefix("-- ").split("?")[0] + "?"


def names() -> list[str]:
    """List the queries and the normalising views."""
    folder = resources.files("scgpt_batch.monitoring").joinpath("sql")
    return sorted(file.name.removesuffix(".sql") for file in folder.iterdir() if file.name.endswith(".sql"))


def run(spark: SparkSession, name: str, **parameters: Any) -> DataFrame:
    """Run a query with its parameters; those that name a table take the name of a table or view.

    Raises
    ------
    ConfigError
        The session cannot bind parameters.
    """
    return _bound(spark, text(name), parameters)


def run_over(result: DataFrame, sql: str, parameters: Mapping[str, Any]) -> DataFrame:
    """Run SQL that reads a query's result under the name `result`; parameters that it does not use are ignored."""
    result.createOrReplaceTempView(RESULT)
    used = {name: parameters[name] for name in _parameters(sql)}
    return _bound(result.sparkSession, f"with result as (select * from {RESULT})\n{sql}", used)


def collect(result: DataFrame) -> list[dict[str, Any]]:
    """Return a query's rows, with times in UTC: Spark collects them naive, in this machine's time zone."""
    return [{name: _utc(value) for name, value in row.asDict().items()} for row in result.collect()]


def _utc(value: Any) -> Any:
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def _bound(spark: SparkSession, sql: str, parameters: Mapping[str, Any]) -> DataFrame:
    try:
        return spark.sql(sql, args=dict(parameters))
    except AnalysisException as exc:
        if not is_unbound_parameter(exc):
            raise
        # Delta's parser hides the parameters from Spark 4.1; see spark-local.conf
        raise ConfigError(f"this Spark session cannot bind SQL parameters: set {CONSTANTS_ONLY} to true") from exc


def requests_view(spark: SparkSession, inference_table: str, view: str = "") -> str:
    """Create the normalised view of an inference table of any generation; return the view's name.

    With `view`, a view of this name is created or replaced in the catalog, for others to read. Without, the view is
    temporary and lasts as long as the session.

    Raises
    ------
    ConfigError
        The table does not exist, or is not an inference table.
    """
    table = tables.table_name(inference_table)
    if not tables.exists(spark, table):
        raise tables.missing_table(spark, table)
    columns = set(spark.table(table).columns)
    generation = next((name for name, needed in GENERATIONS.items() if needed <= columns), None)
    if generation is None:
        known = "; ".join(", ".join(sorted(needed)) for needed in GENERATIONS.values())
        raise ConfigError(
            f"{inference_table} is not an inference table: it lacks the columns of every known generation ({known}); "
            "name another --inference-table"
        )
    # inlined, because neither Spark Connect nor Databricks' DDL accepts parameters in a view
    requests = inlined(text(generation), {"inference_table": table})
    if view:
        spark.sql(f"CREATE OR REPLACE VIEW {tables.table_name(view)} AS\n{requests}")
        return view
    spark.sql(requests).createOrReplaceTempView(REQUESTS)
    return REQUESTS


def readable(spark: SparkSession, table: str, view: str) -> str:
    """Return a name that SQL's `identifier()` accepts: the table's own, or `view`, created over a table at a path.

    Raises
    ------
    ConfigError
        The table does not exist.
    """
    table = tables.table_name(table)
    if not tables.exists(spark, table):
        raise tables.missing_table(spark, table)
    if not table.endswith("`") or "/" not in table:
        return table
    spark.table(table).createOrReplaceTempView(view)
    return view
