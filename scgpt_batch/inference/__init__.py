"""From rows to embeddings: reading, batching, the device, results. Knows no Spark and no MLflow."""
