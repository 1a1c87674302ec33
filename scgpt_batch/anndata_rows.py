"""Former name of `io.rows`, which the code of models registered with early versions of 0.1.0 imports."""

from scgpt_batch.io.rows import PAYLOAD_COLUMNS

__all__ = ["PAYLOAD_COLUMNS"]
