"""Gene programs and label transfer on arrays: what scanpy and scikit-learn find, with bounded memory."""

from importlib import import_module

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

from scgpt_batch.analysis import annotate
from scgpt_batch.analysis.annotate import Neighbors, nearest_cells, transfer_labels
from scgpt_batch.analysis.clusters import COMPILED, keep_compiled_umap, leiden, neighbor_graph
from scgpt_batch.analysis.largest import largest
from scgpt_batch.analysis.programs import find_programs, score_programs, stability
from scgpt_batch.errors import ConfigError


def blobs(n_clusters=6, size=30, d=16, seed=0):
    """Well separated clusters of vectors, and the cluster of each."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_clusters), size)
    x = rng.standard_normal((n_clusters, d))[labels] * 5 + 0.3 * rng.standard_normal((len(labels), d))
    return x.astype(np.float32), labels


@pytest.fixture(scope="module")
def genes():
    x, labels = blobs()
    return pd.DataFrame(x, index=[f"G{i}" for i in range(len(x))]), labels


def test_programs_are_the_clusters_of_the_vectors(genes):
    vectors, labels = genes
    table = find_programs(vectors, resolution=1.0, n_seeds=3)
    assert table.columns.tolist() == ["program", "gene", "rank", "stability"]
    program = table.set_index("gene")["program"].reindex(vectors.index)
    assert adjusted_rand_score(labels, program) == 1.0
    assert set(table["stability"]) == {1.0}
    assert table.groupby("program")["rank"].apply(list).iloc[0] == list(range(1, 31))


def test_a_program_is_named_by_its_first_genes(genes):
    table = find_programs(genes[0], resolution=1.0, n_seeds=1)
    first = table[table["program"] == table["program"].iloc[0]]
    assert first["program"].iloc[0] == f"P1 {' '.join(first['gene'][:3])}"


def test_small_clusters_are_no_programs():
    x, labels = blobs(3, 20)
    few = np.r_[np.flatnonzero(labels < 2), np.flatnonzero(labels == 2)[:4]]
    vectors = pd.DataFrame(x[few], index=[f"G{i}" for i in range(len(few))])
    table = find_programs(vectors, resolution=1.0, n_neighbors=4, n_seeds=1, min_genes=5)
    assert set(table["gene"]) == set(vectors.index[:40])


def test_stability_counts_pairs_that_stay_together():
    members = np.array([0, 1, 2, 3])
    assert stability(members, [np.array([0, 0, 0, 0]), np.array([0, 0, 1, 1])]) == pytest.approx((1 + 2 / 6) / 2)
    assert stability(members, []) == 1.0


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (pd.DataFrame(np.ones((3, 2)), index=list("abc")), "3 genes are too few"),
        (pd.DataFrame(np.ones((9, 2)), index=list("aabcdefgh")), "gene 'a' has several vectors"),
        (pd.DataFrame([[np.nan, 1.0]] + [[1.0, 1.0]] * 8, index=list("abcdefghi")), "gene 'a' contains NaN"),
    ],
)
def test_unusable_vectors_are_named(vectors, message):
    with pytest.raises(ConfigError, match=message):
        find_programs(vectors)


def test_the_graph_is_scanpys():
    x, _ = blobs()
    adata = ad.AnnData(x)
    sc.pp.neighbors(adata, use_rep="X")
    assert (neighbor_graph(x) != adata.obsp["connectivities"]).nnz == 0


def test_what_numba_compiles_of_umap_is_kept_on_disk():
    keep_compiled_umap()
    for module, names in COMPILED.items():
        for name in names:
            assert getattr(import_module(module), name).stats.cache_path, name


class Refuses:
    """A function that numba cannot cache: no folder is writable."""

    def enable_caching(self):
        raise RuntimeError("cannot cache function: no locator available")


def test_a_read_only_machine_compiles_in_each_process(monkeypatch):
    monkeypatch.setattr("umap.umap_.smooth_knn_dist", Refuses())
    keep_compiled_umap()


def test_the_graph_of_many_vectors_joins_near_ones():
    cluster = np.arange(8_400) % 2  # more vectors than scanpy compares each with each
    x = np.random.default_rng(0).normal(size=(len(cluster), 4)) + 100 * cluster[:, None]
    graph = neighbor_graph(x)
    rows, columns = graph.nonzero()
    assert (graph.getnnz(axis=1) >= 14).all() and (cluster[rows] == cluster[columns]).all()


def test_leiden_numbers_clusters_by_size():
    x, labels = blobs(3, 20)
    kept = np.r_[np.flatnonzero(labels == 0)[:8], np.flatnonzero(labels > 0)]
    found = leiden(neighbor_graph(x[kept], n_neighbors=5), resolution=0.5)
    assert sorted(np.bincount(found), reverse=True) == list(np.bincount(found))
    assert adjusted_rand_score(labels[kept], found) > 0.9


def test_scores_equal_scanpys_scaled_to_one(pbmc3k):
    adata = pbmc3k[:200].copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    found = score_programs(adata, {"T": ["CD3D", "CD3E", "not a gene"], "none": ["not a gene"]})
    sc.tl.score_genes(adata, ["CD3D", "CD3E"], score_name="s")
    wanted = adata.obs["s"].to_numpy()
    assert np.allclose(found["T"], (wanted - wanted.min()) / np.ptp(wanted), atol=1e-12)
    assert not found["none"].any()


# Label transfer


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbours_are_those_of_an_exact_search(metric, monkeypatch):
    monkeypatch.setattr(annotate, "QUERY_BLOCK", 7)
    monkeypatch.setattr(annotate, "REFERENCE_BLOCK", 50)
    rng = np.random.default_rng(0)
    reference, query = (rng.standard_normal((n, 12)).astype(np.float32) for n in (403, 60))
    found = nearest_cells(query, reference, 10, metric=metric)
    distance, index = (
        NearestNeighbors(n_neighbors=10, metric=metric, algorithm="brute").fit(reference).kneighbors(query)
    )
    assert np.array_equal(found.index, index)
    assert np.allclose(found.distance, distance, atol=1e-3 if metric == "euclidean" else 1e-5)
    in_blocks = nearest_cells(query, iter([reference[:9], reference[9:]]), 10, metric=metric)
    assert np.array_equal(in_blocks.index, index)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_vectors_with_nan_are_nobodys_neighbours(metric):
    reference = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    query, expected = reference[40:43].copy(), np.arange(40, 43)
    reference[[5, 6], [0, 3]] = np.nan, np.inf
    found = nearest_cells(query, iter([reference[:30], reference[30:]]), 3, metric=metric)
    assert np.array_equal(found.index[:, 0], expected) and not np.isin(found.index, [5, 6]).any()
    assert np.isfinite(found.distance).all()


def test_too_small_a_reference_is_an_error():
    with pytest.raises(ConfigError, match="the reference has 3 cells, fewer than the 10"):
        nearest_cells(np.ones((2, 4), np.float32), np.ones((3, 4), np.float32))
    with pytest.raises(ConfigError, match="query vectors have 4 numbers, reference vectors 5"):
        nearest_cells(np.ones((2, 4), np.float32), np.ones((30, 5), np.float32))


def votes(index, distance, labels, **options):
    neighbors = Neighbors(np.array(index), np.array(distance, np.float32))
    return transfer_labels(neighbors, np.array(labels, dtype=object), **options)


def test_the_label_of_most_neighbours_wins():
    table = votes([[0, 1, 2]], [[0.1, 0.2, 0.3]], ["T", "B", "B"])
    assert table["label"].tolist() == ["B"] and table["confidence"][0] == pytest.approx(2 / 3)
    table = votes([[0, 1, 2]], [[0.1, 0.4, 0.4]], ["T", "B", "B"])
    assert table["label"][0] == "B" and table["label_weighted"][0] == "T"
    assert table["confidence_weighted"][0] == pytest.approx(10 / 15)


def test_equal_votes_go_to_the_nearest_label():
    assert votes([[0, 1]], [[0.1, 0.2]], ["Z", "A"])["label"].tolist() == ["Z"]


def test_uncertain_cells_are_unknown():
    table = votes([[0, 1, 2], [1, 2, 3]], [[0.1, 0.2, 0.3]] * 2, ["T", "B", "B", "B"], min_confidence=0.9)
    assert table["label"].tolist() == ["unknown", "B"]


def test_rare_labels_can_be_given_more_weight():
    labels = ["rare"] + ["common"] * 50
    index = [[0, 1, 2]]
    assert votes(index, [[0.1, 0.1, 0.1]], labels)["label"][0] == "common"
    assert votes(index, [[0.1, 0.1, 0.1]], labels, correct_frequency=True)["label"][0] == "rare"


def test_cells_of_a_cluster_share_its_label():
    table = votes([[0, 1], [2, 3], [2, 4]], [[0.1, 0.2]] * 3, ["T", "T", "B", "B", "B"], clusters=np.array([0, 0, 0]))
    assert table["label"].tolist() == ["B"] * 3


def test_unlabelled_reference_cells_are_an_error():
    with pytest.raises(ConfigError, match="1 reference cells have no label"):
        votes([[0]], [[0.1]], ["T", None])


def test_half_of_the_cells_label_the_other_half():
    x, labels = blobs()
    names = np.array([f"type {i}" for i in labels], dtype=object)
    found = transfer_labels(nearest_cells(x[::2], x[1::2], 5), names[1::2])
    assert (found["label"] == names[::2]).all() and (found["confidence"] == 1).all()


@pytest.mark.parametrize(("width", "k"), [(1, 1), (5, 5), (7, 0), (7, 3), (100, 1), (1_000, 10), (1_003, 5)])
def test_largest_values_are_those_of_a_sort(width, k):
    values = np.random.default_rng(width).integers(-50, 50, (40, width)).astype(np.float32)  # many are equal
    values[:, : width // 3] = -np.inf
    columns = largest(values, k)
    assert columns.shape == (40, k) and all(len(set(row)) == k for row in columns.tolist())
    found = np.sort(np.take_along_axis(values, columns, axis=1), axis=1)
    assert np.array_equal(found, np.sort(values, axis=1)[:, width - k :])
