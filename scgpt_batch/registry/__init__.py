"""The MLflow model: its signature, its code, and how versions are registered and resolved."""
