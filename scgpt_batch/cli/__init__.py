"""The command line: `scgpt-batch COMMAND`, and the same commands as jobs for spark-submit."""

from scgpt_batch.cli.main import entry_point, job

__all__ = ["entry_point", "job"]
