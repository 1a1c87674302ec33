"""Spark: the session, the tables, the jobs, and `ai_query` for SQL."""

from scgpt_batch.spark_version import require_supported_spark

require_supported_spark()  # first: on older versions the modules below fail to import, without saying why

from scgpt_batch.spark.ai_query import register_ai_query  # noqa: E402

__all__ = ["register_ai_query"]
