"""Former name of `inference.engine`, which the code of models registered with early versions of 0.1.0 imports."""

from scgpt_batch.inference.engine import Embedder, load_embedder
from scgpt_batch.inference.results import RowResult as Answer

__all__ = ["Answer", "Embedder", "load_embedder"]
