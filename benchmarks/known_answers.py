"""What the demo finds of what is known of PBMC3k: gene programs beside random vectors, cell types beside HVG + PCA.

`make demo` calls it: first with `--write-labels`, which writes the labels of half of the cells for `annotate`, then
`.venv/bin/python benchmarks/known_answers.py`.
"""

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from deltalake import DeltaTable
from sklearn.metrics import adjusted_rand_score

import scgpt_batch as sb
from scgpt_batch.analysis.annotate import nearest_cells, transfer_labels
from scgpt_batch.analysis.evaluate import hvg_pca
from scgpt_batch.analysis.programs import find_programs
from scgpt_batch.command_result import plural

PBMC = Path(__file__).parents[1] / "tests" / "data" / "pbmc3k.h5ad"
DEMO = Path(".demo")
LABELS = DEMO / "half_labels.csv"
UNKNOWN = "unassigned"  # cells that the published labels leave out
K = 10  # neighbours, as in `annotate`
VARIABLE_GENES = 2_000
# Published markers of blood cells: genes of one type should share a program, genes of different types should not
MARKERS = {
    "T": ["CD3D", "CD3E", "CD3G", "IL7R", "CD2", "LCK", "IL32", "LDHB"],
    "B": ["CD79A", "CD79B", "MS4A1", "TCL1A", "LINC00926", "VPREB3", "HLA-DQA1", "BANK1"],
    "NK": ["GNLY", "NKG7", "GZMB", "PRF1", "FGFBP2", "SPON2", "CST7", "CLIC3"],
    "monocyte": ["LYZ", "S100A8", "S100A9", "CD14", "LGALS2", "FCN1", "CST3", "MS4A6A"],
    "platelet": ["PPBP", "PF4", "GNG11", "SDPR", "GP9", "SPARC", "CLU", "TUBB1"],
}


def write_labels(adata: ad.AnnData) -> None:
    """Write the labels of a random half of the labelled cells."""
    labels = adata.obs.loc[adata.obs["cell_type"] != UNKNOWN, ["cell_type"]]
    labels.sample(frac=0.5, random_state=0).rename_axis("cell_id").to_csv(LABELS)


def programs(adata: ad.AnnData) -> str:
    """Cluster the variable genes and the markers; compare the markers' programs with their cell types."""
    kinds = {gene: kind for kind, genes in MARKERS.items() for gene in genes}
    table = sb.read_embeddings(DEMO / "gene_embeddings", mode="static")
    wanted = table.var_names.intersection(variable_genes(adata).union(list(kinds)))
    vectors = pd.DataFrame(table[:, wanted].varm["X_scGPT"], index=wanted)
    random = pd.DataFrame(np.random.default_rng(0).standard_normal(vectors.shape), index=wanted)
    ours, chance = (agreement(each, kinds) for each in (vectors, random))
    n = len(wanted.intersection(list(kinds)))
    return (
        f"{plural(n, 'marker gene')} of {len(MARKERS)} cell types: adjusted Rand index of programs and types "
        f"{ours:.2f}, with random vectors {chance:.2f}"
    )


def agreement(vectors: pd.DataFrame, kinds: dict[str, str]) -> float:
    """Return the adjusted Rand index of the markers' programs and cell types."""
    clusters = find_programs(vectors, resolution=1.0, min_genes=2, n_seeds=1).set_index("gene")["program"]
    markers = [gene for gene in kinds if gene in clusters.index]
    return float(adjusted_rand_score([kinds[gene] for gene in markers], clusters[markers]))


def variable_genes(adata: ad.AnnData) -> pd.Index:
    """Return the most variable genes."""
    work = sc.pp.log1p(sc.pp.normalize_total(adata, target_sum=1e4, copy=True), copy=True)
    sc.pp.highly_variable_genes(work, n_top_genes=VARIABLE_GENES)
    return work.var_names[work.var["highly_variable"]]


def labels(adata: ad.AnnData) -> str:
    """Compare the labels that `annotate` wrote with the published ones, and with those that HVG + PCA transfers."""
    adata = adata[adata.obs["cell_type"] != UNKNOWN].copy()
    truth = adata.obs["cell_type"].astype(str).to_numpy(dtype=object)
    known = adata.obs_names.isin(pd.read_csv(LABELS)["cell_id"])
    annotated = DeltaTable(DEMO / "annotations").to_pandas(columns=["cell_id", "label"]).set_index("cell_id")["label"]
    ours = annotated[adata.obs_names[~known]].to_numpy() == truth[~known]
    x = hvg_pca(adata)
    theirs = transfer_labels(nearest_cells(x[~known], x[known], K), truth[known])["label"].to_numpy() == truth[~known]
    return (
        f"{plural(int((~known).sum()), 'cell')} labelled from the other half: {ours.mean():.1%} have their published "
        f"type, with HVG + PCA {theirs.mean():.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write-labels", action="store_true")
    args = parser.parse_args()
    adata = ad.read_h5ad(PBMC)
    if args.write_labels:
        write_labels(adata)
        return
    print(programs(adata))
    print(labels(adata))


if __name__ == "__main__":
    main()
