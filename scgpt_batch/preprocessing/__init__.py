"""From a row's counts to tokens: gene names, filters, normalisation, variable genes, bins."""
