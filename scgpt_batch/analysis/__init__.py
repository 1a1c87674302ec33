"""What embeddings are for: gene programs, label transfer. Plain arrays and tables; no Spark, no model."""
