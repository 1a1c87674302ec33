"""The questions of `sql/`, one a file, run by name; and the views through which they read tables.

The files are for Databricks SQL and local Spark alike. Every question on requests reads one normalising view, which
`requests_view` makes from an inference table of any generation.
"""

import re
from functools import cache
from importlib import resources
from typing import Any

from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession

from scgpt_batch.errors import ConfigError
from scgpt_batch.spark import tables

REQUESTS = "scgpt_requests"

# What tells the generation of an inference table: columns that no other has.
GENERATIONS = {
    "requests_gateway": {"databricks_request_id", "request_time", "execution_duration_ms"},
    "requests_legacy": {"databricks_request_id", "timestamp_ms", "execution_time_ms"},
    "requests_unity": {"invocation_id", "event_time", "latency_ms"},
}
CONSTANTS_ONLY = "spark.sql.legacy.parameterSubstitution.constantsOnly"


@cache
def text(name: str) -> str:
    """Return the SQL of a question."""
    return resources.files("scgpt_batch.monitoring").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")


def parameters(name: str) -> list[str]:
    """List a question's parameters, as the SQL (not its comments) names them."""
    sql = "\n".join(line for line in text(name).splitlines() if not line.startswith("--"))
    return list(dict.fromkeys(re.findall(r":(\w+)", sql)))


def filled(name: str, **parameters: str) -> str:
    """Return the SQL of a question with SQL in place of each parameter, for views and alerts, which take none."""
    spelt = r"identifier\(:(\w+)\)|:(\w+)"
    return re.sub(spelt, lambda found: parameters.get(found[1] or found[2], found[0]), text(name))


def question(name: str) -> str:
    """Return what a file asks: its first line, up to the question mark."""
    return text(name).splitlines()[0].removeprefix("-- ").split("?")[0] + "?"


def names() -> list[str]:
    """List the questions and the normalising views."""
    folder = resources.files("scgpt_batch.monitoring").joinpath("sql")
    return sorted(file.name.removesuffix(".sql") for file in folder.iterdir() if file.name.endswith(".sql"))


def ask(spark: SparkSession, name: str, **parameters: Any) -> DataFrame:
    """Run a question with its parameters; those that name a table take a table's or view's name.

    Raises
    ------
    ConfigError
        The session cannot bind parameters.
    """
    try:
        return spark.sql(text(name), args=parameters)
    except AnalysisException as exc:
        if exc.getCondition() not in ("UNBOUND_SQL_PARAMETER", "NOT_A_CONSTANT_STRING.NOT_CONSTANT"):
            raise
        # Delta's parser hides the parameters from Spark 4.1; see spark-local.conf
        raise ConfigError(f"this Spark session cannot bind SQL parameters: set {CONSTANTS_ONLY} to true") from exc


def requests_view(spark: SparkSession, inference_table: str, view: str = "") -> str:
    """Make the normalising view of an inference table, whichever its generation; return the view's name.

    Without a name it lasts as long as the session; a `view` of the catalog is there for others, and made anew.

    Raises
    ------
    ConfigError
        There is no such table, or it is no inference table.
    """
    table = tables.table_name(inference_table)
    if not tables.exists(spark, table):
        raise ConfigError(f"no Delta table {table}")
    columns = set(spark.table(table).columns)
    generation = next((name for name, needed in GENERATIONS.items() if needed <= columns), None)
    if generation is None:
        told = "; ".join(", ".join(sorted(needed)) for needed in GENERATIONS.values())
        raise ConfigError(f"{inference_table} is no inference table: it has none of these sets of columns: {told}")
    # spelt out, because a view's text takes no parameters (Spark Connect refuses them, and Databricks' DDL)
    requests = filled(generation, inference_table=table)
    if view:
        spark.sql(f"CREATE OR REPLACE VIEW {tables.table_name(view)} AS\n{requests}")
        return view
    spark.sql(requests).createOrReplaceTempView(REQUESTS)
    return REQUESTS


def readable(spark: SparkSession, table: str, view: str) -> str:
    """Return a name that `identifier()` takes: the table's own, or for a path that of a view made on it.

    Raises
    ------
    ConfigError
        There is no such table.
    """
    table = tables.table_name(table)
    if not tables.exists(spark, table):
        raise ConfigError(f"no Delta table {table}")
    if not table.endswith("`") or "/" not in table:
        return table
    spark.table(table).createOrReplaceTempView(view)
    return view
