"""Enrichment of gene programs in gene sets from a local .gmt file; nothing leaves the machine."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, hypergeom

from scgpt_batch.errors import ConfigError


def read_gmt(path: str | Path) -> dict[str, list[str]]:
    """Return the genes of each set of a .gmt file: name, description and genes, separated by tabs.

    Raises
    ------
    ConfigError
        The file cannot be read, or a line has no genes.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from exc
    sets = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = line.rstrip().split("\t")
        if len(rest) < 2:
            raise ConfigError(
                f"{path}, line {number} is not a gene set: name, description and genes, separated by tabs"
            )
        sets[name] = list(dict.fromkeys(gene for gene in rest[1:] if gene))
    if not sets:
        raise ConfigError(f"{path} has no gene sets")
    return sets


def enrich(
    programs: Mapping[str, Sequence[str]], sets: Mapping[str, Sequence[str]], background: Sequence[str]
) -> pd.DataFrame:
    """Test each program for each gene set: Fisher's exact test, one-sided.

    Parameters
    ----------
    programs, sets
        Genes by name. Genes outside the background do not count.
    background
        All genes that could be in a program: those that were clustered.

    Returns
    -------
    DataFrame
        One row per program and set that share a gene, most significant first: program, term, genes (those shared),
        term_genes (the set's genes in the background), p_value and p_adjusted (Benjamini-Hochberg, over all sets of a
        program that have genes in the background).

    Raises
    ------
    ConfigError
        No gene of the sets is in the background.

    Examples
    --------
    >>> sets = {"T cell receptor": ["CD3D", "CD3E", "CD3G"]}
    >>> found = enrich({"P1": ["CD3D", "CD3E"]}, sets, background=["CD3D", "CD3E", "CD3G", "LYZ", "NKG7"])
    >>> found[["term", "genes", "term_genes"]].to_dict("records")
    [{'term': 'T cell receptor', 'genes': ['CD3D', 'CD3E'], 'term_genes': 3}]
    """
    known = set(background)
    terms = {name: known.intersection(genes) for name, genes in sets.items()}
    terms = {name: genes for name, genes in terms.items() if genes}
    if not terms:
        raise ConfigError("no gene of the gene sets is among the clustered genes: are both human gene symbols?")
    sizes = np.array([len(genes) for genes in terms.values()])
    rows = []
    for program, genes in programs.items():
        shared = [sorted(term.intersection(genes)) for term in terms.values()]
        n_shared = np.array([len(found) for found in shared])
        p_values = hypergeom.sf(n_shared - 1, len(known), sizes, len(known.intersection(genes)))
        adjusted = false_discovery_control(p_values)
        for i in np.lexsort((np.arange(len(shared)), p_values)):
            if n_shared[i]:
                rows.append((program, list(terms)[i], shared[i], int(sizes[i]), float(p_values[i]), float(adjusted[i])))
    return pd.DataFrame(rows, columns=["program", "term", "genes", "term_genes", "p_value", "p_adjusted"])
