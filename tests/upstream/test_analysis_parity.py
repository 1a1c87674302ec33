"""Gene programs side by side with the real scgpt 0.2.4 (`scgpt.tasks.GeneEmbedding`)."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scgpt.tasks import GeneEmbedding
from sklearn.metrics import adjusted_rand_score

from scgpt_batch.analysis.clusters import leiden, neighbor_graph
from scgpt_batch.analysis.programs import RESOLUTION, score_programs
from scgpt_batch.embedding_tables import nearest
from tests.paths import DATA

pytestmark = pytest.mark.upstream

N_GENES, N_SEEDS = 1_200, 10


@pytest.fixture(scope="module")
def pbmc():
    """Log-normalised cells with the variable genes of upstream's tutorial."""
    adata = ad.read_h5ad(DATA / "pbmc3k.h5ad")
    sc.pp.filter_genes(adata, min_counts=3)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=N_GENES, flavor="cell_ranger")
    return adata[:, adata.var["highly_variable"]].copy()


@pytest.fixture(scope="module")
def vectors(pbmc):
    """Gene vectors with the structure of co-expression, as those of a model have: components over cells."""
    centered = np.asarray(pbmc.X.todense()) - np.asarray(pbmc.X.mean(axis=0))
    _, values, axes = np.linalg.svd(centered, full_matrices=False)
    table = (axes[:32].T * values[:32]).astype(np.float32)
    return pd.DataFrame(table, index=pbmc.var_names)


@pytest.fixture(scope="module")
def theirs(vectors):
    return GeneEmbedding(dict(zip(vectors.index, vectors.to_numpy(), strict=True)))


@pytest.fixture(scope="module")
def their_graph(theirs, tmp_path_factory):
    """Upstream's AnnData of genes: it writes a file to the working directory on the way.

    Without its last step, `scanpy.tl.umap`, which lays out the clusters that are already found: umap-learn sets weights
    below 1/500 of the largest to zero in the graph that it is given, 24 of 30,442 here.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("upstream"))
        patch.setattr(sc.tl, "umap", lambda _: None)
        return theirs.get_adata(resolution=RESOLUTION)


@pytest.mark.parametrize("gene", ["GZMB", "MS4A1", "NKG7"])
def test_cosines_and_nearest_genes_equal_upstreams(theirs, vectors, gene):
    expected = theirs.compute_similarities(gene).set_index("Gene")["Similarity"]
    assert expected.index[0] == gene  # upstream lists the gene itself first
    found = nearest(vectors.index, vectors.to_numpy(), [gene], 20)
    assert found["neighbour"].tolist() == expected.index[1:21].tolist()
    assert np.allclose(found["similarity"], expected.iloc[1:21], atol=1e-6)


def test_the_graph_equals_upstreams(their_graph, vectors):
    ours = neighbor_graph(vectors.to_numpy())
    assert their_graph.obs_names.tolist() == vectors.index.tolist()
    upstreams = their_graph.obsp["connectivities"]
    assert ours.nnz == upstreams.nnz > 15 * len(vectors)
    assert (ours != upstreams).nnz == 0


def test_neighbours_in_the_graph_are_the_nearest_genes(their_graph, vectors):
    """Fifteen with the gene itself, by euclidean distance."""
    x = vectors.to_numpy(np.float64)
    nearest_first = np.argsort(np.linalg.norm(x[:, None] - x, axis=2), axis=1)
    upstreams = their_graph.obsp["distances"].tocsr()
    for gene, places in enumerate(np.split(upstreams.indices, upstreams.indptr[1:-1])):
        assert set(places.tolist()) == set(nearest_first[gene, 1:15].tolist()), vectors.index[gene]


def test_scores_of_upstreams_programs_equal_upstreams(theirs, their_graph, pbmc):
    programs = {name: genes for name, genes in theirs.get_metagenes(their_graph).items() if len(genes) >= 5}
    expected = pbmc.copy()
    theirs.score_metagenes(expected, programs)
    found = score_programs(pbmc, programs)
    for name in programs:
        assert np.allclose(found[name], expected.obs[f"{name}_SCORE"], atol=1e-6), name


def test_partitions_agree_as_upstreams_own_seeds_do(their_graph, vectors):
    """Leiden's partition depends on the seed: ours is as near to upstream's as upstream's are to each other."""
    ours = [leiden(neighbor_graph(vectors.to_numpy()), resolution=RESOLUTION, seed=seed) for seed in range(N_SEEDS)]
    upstreams = []
    for seed in range(N_SEEDS):
        sc.tl.leiden(their_graph, resolution=RESOLUTION, random_state=seed, key_added="seed")
        upstreams.append(their_graph.obs["seed"].to_numpy())
    among = [adjusted_rand_score(a, b) for i, a in enumerate(upstreams) for b in upstreams[:i]]
    between = [adjusted_rand_score(a, b) for a in ours for b in upstreams]
    print(f"ARI among upstream's seeds {np.mean(among):.3f}, between ours and upstream's {np.mean(between):.3f}")
    assert np.mean(between) > np.mean(among) - 0.05
