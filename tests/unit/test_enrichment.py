"""Enrichment of programs in gene sets: Fisher's exact test with Benjamini-Hochberg."""

import pytest
from scipy.stats import fisher_exact

from scgpt_batch.analysis.enrichment import enrich, read_gmt
from scgpt_batch.errors import ConfigError

GENES = [f"G{i}" for i in range(100)]


def test_p_values_are_those_of_fishers_exact_test():
    table = enrich({"P1": GENES[:10]}, {"half": [*GENES[5:25], "outside"], "other": GENES[50:60]}, GENES)
    assert table["term"].tolist() == ["half"]
    row = table.iloc[0]
    assert (row["genes"], row["term_genes"]) == (GENES[5:10], 20)
    expected = fisher_exact([[5, 5], [15, 75]], alternative="greater").pvalue
    assert row["p_value"] == pytest.approx(expected)
    assert row["p_adjusted"] == pytest.approx(min(1, 2 * expected))  # of two sets


def test_sets_without_a_clustered_gene_are_an_error():
    with pytest.raises(ConfigError, match="no gene of the gene sets is among the clustered genes"):
        enrich({"P1": GENES[:5]}, {"mouse": ["Cd3d"]}, GENES)


def test_a_gmt_file_is_read(tmp_path):
    (tmp_path / "sets.gmt").write_text("T CELL\thttp://x\tCD3D\tCD3E\tCD3D\n\nB CELL\t\tMS4A1\n")
    assert read_gmt(tmp_path / "sets.gmt") == {"T CELL": ["CD3D", "CD3E"], "B CELL": ["MS4A1"]}


@pytest.mark.parametrize(
    ("text", "message"), [("", "has no gene sets"), ("A\tx\tCD3D\nB CELL MS4A1\n", "line 2 is not a gene set")]
)
def test_a_file_without_gene_sets_is_an_error(tmp_path, text, message):
    (tmp_path / "sets.gmt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_gmt(tmp_path / "sets.gmt")
    with pytest.raises(ConfigError, match="cannot read"):
        read_gmt(tmp_path / "missing.gmt")
