"""scGPT embeddings of genes and cells: in a notebook, as a Spark batch job, and as an MLflow model.

    import scgpt_batch as sb

    sb.embed(adata, "scGPT_human")            # adata.obsm["X_scGPT"]
    sb.gene_embeddings("scGPT_human")         # DataFrame, genes × d
    sb.read_embeddings("/data/cell_embeddings", adata=adata)

Names are imported when they are first used: `scgpt_batch.models` has to run where only torch and numpy are installed.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "EmbeddingWarning": "errors",
    "LoadedModel": "api",
    "Parameters": "parameters",
    "embed": "api",
    "gene_embeddings": "api",
    "load_model": "api",
    "read_embeddings": "embedding_tables",
    "similar_genes": "embedding_tables",
}
__all__ = [
    "EmbeddingWarning",
    "LoadedModel",
    "Parameters",
    "embed",
    "errors",
    "gene_embeddings",
    "load_model",
    "read_embeddings",
    "similar_genes",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("scgpt_batch.errors")
    if name not in _PLACES:
        raise AttributeError(f"module 'scgpt_batch' has no attribute {name!r}")
    return getattr(import_module(f"scgpt_batch.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
