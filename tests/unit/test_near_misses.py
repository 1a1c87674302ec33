"""Suggestions for misspelt names."""

import time

import pytest

from scgpt_batch.errors import listed, suggestion
from scgpt_batch.near_misses import closest, did_you_mean


@pytest.mark.parametrize(
    ("name", "known", "wanted"),
    [
        ("contxtual", ["static", "contextual", "cell"], "contextual"),
        ("Max-Lenght", ["mode", "max_length"], "max_length"),
        ("cd3d", ["CD3E", "CD3D"], "CD3D"),
        ("spark-conf", ["spark_conf"], "spark_conf"),
        ("xyz", ["static", "cell"], None),
        ("", ["static"], None),
        ("mode", [], None),
    ],
)
def test_closest_ignores_case_dashes_and_few_letters(name, known, wanted):
    assert closest(name, known) == wanted


def test_close_name_is_suggested():
    assert did_you_mean("doner", ["donor", "batch"]) == ": did you mean 'donor'?"
    assert suggestion("doner", ["donor", "batch"]) == ": did you mean 'donor'?"


def test_known_names_are_listed_if_none_is_close():
    assert suggestion("xyz", ["donor", "batch"], label="its columns") == "; its columns: 'donor', 'batch'"
    assert suggestion("xyz", []) == "; known: none"
    assert "1,000 in total" in suggestion("xyz", map(str, range(1_000)))
    assert listed(["counts", "raw"], "Count") == "'counts', 'raw' (did you mean 'counts'?)"


def test_long_names_and_many_genes_are_looked_up_fast():
    genes = [f"GENE{i}" for i in range(60_000)]
    started = time.perf_counter()
    assert closest("G" * 10_000, genes) is None
    assert closest("GENE59999X", [*genes[:1_000], "GENE59999"]) == "GENE59999"
    assert closest("gene-12", [*genes, "OTHER"]) in genes
    assert time.perf_counter() - started < 5
