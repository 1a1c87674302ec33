"""Files of single-cell counts: where they are, what they contain, and slices of it. Knows neither Spark nor MLflow."""
