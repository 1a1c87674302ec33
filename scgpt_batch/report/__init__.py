"""The page of `scgpt-batch report`: maps of cells and genes, programs, groups and figures, from tables already read."""
