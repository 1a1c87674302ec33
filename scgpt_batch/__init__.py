"""scGPT embeddings for AnnData rows: a Spark batch job, an MLflow model and what they share.

Nothing is imported here: `scgpt_batch.models` has to run where only torch and numpy are installed.
"""

__version__ = "0.1.0"
