"""The model behind HTTP: the local endpoint with its inference table, and a client for it and for Databricks'."""
