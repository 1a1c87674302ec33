"""Evaluation of embeddings: figures that are 1 where they must be, near chance on noise, beside HVG + PCA."""

import re

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from sklearn.metrics import silhouette_score

from scgpt_batch.analysis import evaluate
from scgpt_batch.analysis.evaluate import cell_metrics, compare, drift, gene_family_recall, hvg_pca
from scgpt_batch.errors import ConfigError
from tests.unit.test_analysis import blobs


@pytest.fixture(scope="module")
def separated():
    return cell_metrics(*blobs())


def test_separated_labels_get_full_marks(separated):
    assert {name: separated[name] for name in ("knn_accuracy", "ari", "nmi", "graph_connectivity")} == dict.fromkeys(
        ("knn_accuracy", "ari", "nmi", "graph_connectivity"), pytest.approx(1.0)
    )
    x, labels = blobs()
    assert separated["asw_label"] == pytest.approx((silhouette_score(x, labels) + 1) / 2, abs=1e-6)
    assert separated["avg_bio"] == pytest.approx((2 + separated["asw_label"]) / 3)


def test_labels_without_meaning_score_near_chance():
    x, labels = blobs()
    shuffled = np.random.default_rng(1).permutation(labels)
    found = cell_metrics(x, shuffled)
    assert found["knn_accuracy"] < 0.35 and found["ari"] < 0.1


def test_batches_that_mix_score_higher_than_batches_apart():
    x, labels = blobs()
    mixed = np.arange(len(x)) % 2
    apart = x + 8 * mixed[:, None].astype(np.float32)
    assert cell_metrics(x, labels, batches=mixed)["asw_batch"] > 0.95
    assert cell_metrics(apart, labels, batches=mixed)["asw_batch"] < 0.5


def test_silhouettes_of_a_sample_are_close_to_those_of_all(separated, monkeypatch):
    monkeypatch.setattr(evaluate, "SILHOUETTE_CELLS", 90)
    assert cell_metrics(*blobs())["asw_label"] == pytest.approx(separated["asw_label"], abs=0.05)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 40, "at least two labels"),
        (["a"] * 38 + ["b"] * 2, "label 'b' has 2 cells; each needs at least 5"),
        (["a"] * 3, "3 labels are given for 40 cells"),
    ],
)
def test_unusable_labels_are_named(labels, message):
    with pytest.raises(ConfigError, match=message):
        cell_metrics(np.random.default_rng(0).standard_normal((40, 4)), labels)


def marked_cells(pbmc3k):
    """T cells, B cells and monocytes by their markers."""
    adata = pbmc3k.copy()
    marker = {"T": "CD3D", "B": "MS4A1", "monocyte": "LYZ"}
    counts = np.stack([adata[:, gene].X.toarray().ravel() for gene in marker.values()], axis=1)
    only = (counts > 1).sum(axis=1) == 1
    adata = adata[only].copy()
    adata.obs["cell_type"] = np.array(list(marker), dtype=object)[(counts[only] > 1).argmax(axis=1)]
    return adata[:600].copy()


def test_the_baseline_is_scanpys_usual_way(pbmc3k):
    adata = pbmc3k[:200].copy()
    found = hvg_pca(adata)
    assert found.shape == (200, 50)
    sc.pp.filter_genes(adata, min_cells=1)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=2000)
    adata = adata[:, adata.var["highly_variable"]].copy()
    sc.pp.pca(adata, n_comps=50, random_state=0)
    assert np.allclose(np.abs(found), np.abs(adata.obsm["X_pca"]), atol=1e-3)


def test_noise_is_worse_than_the_baseline_and_the_verdict_says_so(pbmc3k):
    adata = marked_cells(pbmc3k)
    adata.obs.loc[adata.obs_names[0], "cell_type"] = None
    noise = np.random.default_rng(0).standard_normal((adata.n_obs, 16))
    found = compare(noise, adata, "cell_type")
    assert found.table.columns.tolist() == ["metric", "embedding", "baseline", "difference"]
    by_name = found.table.set_index("metric")
    assert by_name.loc["knn_accuracy", "difference"] < -0.2
    assert found.verdict.startswith(f"On these {adata.n_obs - 1:,} cells the embedding separates the labels worse than")
    with pytest.raises(ConfigError, match=r"'type' is not a column of obs; its columns: .*'cell_type'"):
        compare(noise, adata, "type")


def test_families_are_found_and_permuted_names_are_not():
    rng = np.random.default_rng(0)
    names = [f"RPL{i}" for i in range(1, 21)] + ["CD3D", "CD3E", "CD3G"] + [f"GENE{i}" for i in range(200)]
    x = rng.standard_normal((len(names), 16))
    x[:20] += 8 * rng.standard_normal(16)
    found = gene_family_recall(pd.DataFrame(x, index=names)).set_index("family")
    assert found.index.tolist() == ["ribosomal", "CD3"]
    assert found.loc["ribosomal", "recall"] == 1.0 and found.loc["ribosomal", "permuted"] < 0.3
    assert found.loc["CD3", "recall"] < 0.5


@pytest.mark.parametrize(
    ("family", "symbols"),
    [
        ("ribosomal", ["RPL3", "RPS27A", "RPL10L", "RPS4Y1"]), ("HLA", ["HLA-DRA"]), ("mitochondrial", ["MT-ND4L"]),
        ("collagen", ["COL1A1"]), ("keratin", ["KRT18"]), ("histone", ["HIST1H1C", "H2AC6", "H1-2", "H3C2"]),
        ("CD3", ["CD3E"]),
    ],
)  # fmt: skip
def test_family_patterns_fit_their_symbols(family, symbols):
    for symbol in symbols:
        assert [name for name, pattern in evaluate.FAMILIES.items() if re.fullmatch(pattern, symbol)] == [family]


def test_drift_is_none_for_equal_vectors_and_large_for_others():
    x, _ = blobs()
    assert drift(x, x) == pytest.approx({"mean_cosine": 1.0, "least_cosine": 1.0, "neighbor_overlap": 1.0})
    other = np.random.default_rng(3).standard_normal((len(x), 8)).astype(np.float32)
    found = drift(x, other)
    assert np.isnan(found["mean_cosine"]) and found["neighbor_overlap"] < 0.3
    with pytest.raises(ConfigError, match="180 and 9 vectors"):
        drift(x, x[:9])
