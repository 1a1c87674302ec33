"""Draw the README's picture from the tables that `make demo` writes:  .venv/bin/python docs/images/genes.py

Each dot is a gene: a UMAP of the static vectors in `.demo/gene_embeddings`. The nearest genes of four markers are
coloured; the same numbers are printed by `scgpt-batch summary`.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import umap
from deltalake import DeltaTable

REPO = Path(__file__).parents[2]
# marker -> its cells, its colour, and the side of its genes on which their names have room
MARKERS = {
    "CD3D": ("T cells", "#1f77b4", "left"),
    "MS4A1": ("B cells", "#d62728", "left"),
    "LYZ": ("monocytes", "#ff7f0e", "right"),
    "NKG7": ("NK cells", "#2ca02c", "left"),
}
NEIGHBOURS, NAMED = 40, 5


def main() -> None:
    """Write `docs/images/genes.png`."""
    table = DeltaTable(REPO / ".demo/gene_embeddings").to_pandas(columns=["gene", "embedding", "mode"])
    table = table[table["mode"] == "static"].drop_duplicates("gene")
    genes = table["gene"].to_numpy()
    vectors = np.stack(table["embedding"].to_list())
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    places = umap.UMAP(metric="cosine", random_state=0, n_neighbors=30, min_dist=0.3).fit_transform(vectors)

    figure, axes = plt.subplots(figsize=(8, 5.2), dpi=110)
    axes.scatter(*places.T, s=3, color="#d0d0d0", linewidths=0)
    for marker, (cells, colour, side) in MARKERS.items():
        nearest = np.argsort(-(vectors @ vectors[genes == marker][0]))[: NEIGHBOURS + 1]
        axes.scatter(*places[nearest].T, s=14, color=colour, linewidths=0)
        edge = places[nearest, 0].min() if side == "left" else places[nearest, 0].max()
        axes.annotate(
            "\n".join([f"{marker}: {cells}", *genes[nearest[1 : NAMED + 1]]]),
            (edge, np.median(places[nearest, 1])),
            xytext=(-6 if side == "left" else 6, 0),
            textcoords="offset points",
            ha="right" if side == "left" else "left",
            va="center",
            fontsize=9,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
        )
    axes.set_title(
        f"{len(genes):,} genes of PBMC3k: UMAP of their vectors, and the {NEIGHBOURS} nearest of 4 markers", fontsize=11
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
