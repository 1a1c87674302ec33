"""The MLflow model: its schema, its code, and functions to register and resolve versions."""
