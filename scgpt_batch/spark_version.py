"""The Spark versions that the package runs on; the one place that rejects older ones."""

import os
from importlib.metadata import PackageNotFoundError, version

from scgpt_batch.errors import ConfigError

OLDEST = 4  # Python data sources, which `ingest` reads files with
REMEDY = "use Spark 4.0 or newer; on Databricks, ML runtime 17.3 or newer (18.x LTS is the bundle's default)"


def require_supported_spark() -> None:
    """Check the version of the installed Spark.

    Raises
    ------
    ConfigError
        It is older than 4.0, as on Databricks runtime 16.4 and older.
    """
    try:
        found = version("pyspark")
    except PackageNotFoundError:  # a runtime may bring it without metadata
        import pyspark

        found = pyspark.__version__
    if int(found.split(".")[0]) < OLDEST:
        runtime = os.environ.get("DATABRICKS_RUNTIME_VERSION")
        where = f"Databricks runtime {runtime} has" if runtime else "this environment has"
        raise ConfigError(f"{where} Spark {found}, which is not supported: {REMEDY}")
