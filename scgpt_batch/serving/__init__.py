"""The local HTTP endpoint of a registered model, with its inference table."""
