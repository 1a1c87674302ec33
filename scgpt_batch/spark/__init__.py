"""Spark: the session, the tables, the jobs, and `ai_query` for SQL."""

from scgpt_batch.spark.ai_query import register_ai_query

__all__ = ["register_ai_query"]
