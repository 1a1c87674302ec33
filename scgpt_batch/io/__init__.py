"""Reading single-cell count files slice by slice, and converting between AnnData and table rows.

Nothing here depends on Spark or MLflow.
"""
