"""Gene names: looked up by what matches most genes, each gene once, gene expression alone."""

import time

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scgpt_batch.errors import PayloadError
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.preprocessing.gene_names import SYMBOL_COLUMNS, lookup_columns, select_genes

SYMBOLS = ["CD3D", "LYZ", "NKG7"]
IDS = ["ENSG00000167286", "ENSG00000090382", "ENSG00000105374"]
VOCABULARY = Vocabulary({name: i for i, name in enumerate([*SYMBOLS, "GNLY", "ENSG00000283886"])})


def select(index: list, vocabulary: Vocabulary = VOCABULARY, **columns):
    return select_genes(pd.DataFrame(columns, index=pd.Index(index, dtype=object)), vocabulary)


@pytest.mark.parametrize("column", [*SYMBOL_COLUMNS, "Symbol", "Gene_Name"])
def test_ids_are_mapped_by_a_symbol_column(column):
    genes = select(IDS, **{column: pd.Categorical(SYMBOLS)})
    assert genes.names.tolist() == SYMBOLS
    counts = "matches 3 of 3 genes; var's index matches 0"
    assert genes.warnings == (f"gene names taken from var column {column!r} ({counts})",)


@pytest.mark.parametrize("index", [["0", "1", "2"], ["7", "8", "9"]])
def test_row_numbers_are_mapped_by_a_symbol_column(index):
    assert select(index, feature_id=IDS, feature_name=SYMBOLS).names.tolist() == SYMBOLS


@pytest.mark.parametrize("known", ["GNLY", "ENSG00000283886"])
def test_one_known_name_does_not_switch_the_mapping_off(known):
    genes = select([*IDS, known], feature_name=[*SYMBOLS, None])
    assert genes.names.tolist() == [*SYMBOLS, known]
    assert (genes.genes_in, genes.genes_matched) == (4, 4)
    assert "matches 3 of 4 genes; var's index matches 1" in genes.warnings[0]


def test_a_symbol_column_that_matches_less_is_not_used():
    genes = select([*SYMBOLS, "XIST"], gene_symbol=["a", "b", "NKG7", "GNLY"])
    assert genes.names.tolist() == [*SYMBOLS, "XIST"]
    assert genes.warnings == ()


def test_index_is_used_unless_a_column_matches_twice_as_many():
    made_unique = ["CD3D", "LYZ", "NKG7", "GNLY", "GNLY-1"]
    genes = select(made_unique, gene_symbol=["CD3D", "LYZ", "NKG7", "GNLY", "GNLY"])
    assert genes.names.tolist() == made_unique
    assert (genes.genes_matched, genes.place, genes.warnings) == (4, None, ())


def test_unknown_ids_among_symbols_get_their_symbol():
    genes = select(["CD3D", "LYZ", IDS[2], "other"], gene_symbol=["CD3D", "LYZ", "NKG7", "GNLY"])
    assert genes.names.tolist() == ["CD3D", "LYZ", "NKG7", "other"]
    assert genes.warnings == ("1 Ensembl ids named by var column 'gene_symbol'",)


def test_the_column_that_matches_most_is_used():
    genes = select(IDS, gene_symbol=["CD3D", "x", "y"], gene_name=SYMBOLS)
    assert genes.names.tolist() == SYMBOLS


@pytest.mark.parametrize(
    "written",
    [
        "GRCh38_{}", "GRCh38______{}", "hg19_{}", " {} ", "{} ", "{}_ENSG00000167286", "{}|ENSG00000167286.4",
        "ENSG00000167286|{}", "ENSG00000167286.4_{}", "GRCh38_{}_ENSG00000167286",
    ],
)  # fmt: skip
def test_prefixes_and_suffixes_of_names_are_dropped(written):
    genes = select([written.format(name) for name in SYMBOLS])
    assert genes.names.tolist() == SYMBOLS
    assert genes.warnings[0].startswith(f"gene names shortened, e.g. {written.format('CD3D')!r} to 'CD3D'")


def test_versions_of_ensembl_ids_are_dropped():
    genes = select([f"{name}.9" for name in IDS], Vocabulary({name: i for i, name in enumerate(IDS)}))
    assert genes.names.tolist() == IDS


def test_a_name_with_a_version_that_the_vocabulary_has_stays():
    names = ["ENSG00000167286.9", "ENSG00000090382.1"]
    genes = select(names, Vocabulary({names[0]: 0, "ENSG00000167286": 1, "ENSG00000090382": 2}))
    assert genes.names.tolist() == [names[0], "ENSG00000090382"]


def test_genes_of_another_species_stay_unknown():
    genes = select(["GRCh38_CD3D", "mm10___Cd3d", "GRCh38_LYZ", "mm10___Lyz2"])
    assert genes.names.tolist() == ["CD3D", "mm10___Cd3d", "LYZ", "mm10___Lyz2"]
    assert genes.known.tolist() == [True, False, True, False]
    assert "mouse genes of a mixed-species file" in genes.warnings[1]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["Cd3d", "Lyz2", "Nkg7"], "mouse gene symbols (e.g. 'Cd3d'): map them to human orthologs"),
        (["cd3d", "lyz", "nkg7"], "gene symbols in lower case (e.g. 'cd3d')"),
        (["915", "4069", "4818"], "numbers (Entrez ids or row numbers) (e.g. '915'): use gene symbols"),
        (IDS, "Ensembl ids (e.g. 'ENSG00000167286'): add a var column of gene symbols"),
        (["ENSMUSG00000032094", "ENSMUSG00000069516"], "Ensembl ids of another species"),
    ],
    ids=["mouse", "lower case", "Entrez", "Ensembl", "mouse Ensembl"],
)
def test_names_that_cannot_be_mapped_safely_are_described(names, said):
    genes = select(names)
    assert genes.names.tolist() == names
    assert said in genes.hint and genes.warnings == (genes.hint,)


def test_unknown_symbols_are_not_described():
    genes = select([*SYMBOLS, "XIST", "RP11-34P13.7", "C1orf112", "AC0123.4", "B", "A1BG-AS1"])
    assert (genes.hint, genes.warnings) == ("", ())


def test_special_tokens_are_not_genes():
    assert select(["<cls>", "<pad>", "CD3D"]).known.tolist() == [False, False, True]


# Columns


def values(genes) -> list:
    x = sp.csr_matrix(np.array([[1, 2, 4, 8], [0, 16, 0, 32]], np.float32))
    return genes.apply(x).toarray().tolist()


def test_columns_of_equal_name_are_summed():
    genes = select(["CD3D", "LYZ", "CD3D", "NKG7"])
    assert genes.names.tolist() == ["CD3D", "LYZ", "NKG7"]
    assert values(genes) == [[5, 2, 8], [0, 16, 32]]
    assert genes.warnings == ("1 columns repeat the name of an earlier gene (first: 'CD3D'): their values are summed",)


def test_columns_of_equal_symbol_are_summed():
    mapped = select([*IDS, "ENSG00000115523"], feature_name=["CD3D", "LYZ", "CD3D", "NKG7"])
    named = select(["CD3D", "LYZ", "CD3D", "NKG7"])
    assert mapped.names.tolist() == named.names.tolist()
    assert values(mapped) == values(named)


def test_a_sum_beyond_float32_is_an_error():
    genes = select(["CD3D", "CD3D"])
    with pytest.raises(PayloadError, match="'CD3D' exceeds float32"):
        genes.apply(sp.csr_matrix(np.array([[3e38, 3e38]], np.float32)))


def test_genes_without_a_name_stay_apart_and_unknown():
    genes = select(["CD3D", "", "LYZ", " "])
    assert genes.known.tolist() == [True, False, True, False]
    assert values(genes) == [[1, 2, 4, 8], [0, 16, 0, 32]]
    assert genes.warnings == ("2 genes have no name, so the model does not know them",)


@pytest.mark.parametrize("column", ["feature_types", "feature_type", "Feature_Types"])
def test_features_that_are_not_gene_expression_are_left_out(column):
    types = ["Gene Expression", "Antibody Capture", "CRISPR Guide Capture", "Gene Expression"]
    genes = select(["CD3D", "NKG7", "guide", "LYZ"], **{column: types})
    assert genes.names.tolist() == ["CD3D", "LYZ"]
    assert values(genes) == [[1, 8], [0, 32]]
    assert (genes.genes_in, genes.genes_matched) == (2, 2)
    left_out = "2 features are not gene expression and are dropped: 1 Antibody Capture, 1 CRISPR Guide Capture"
    assert genes.warnings == (left_out,)


def test_an_antibody_is_not_added_to_the_gene_of_its_name():
    genes = select(["CD3D", "LYZ", "CD3D"], feature_types=["Gene Expression"] * 2 + ["Antibody Capture"])
    assert genes.place.tolist() == [0, 1, -1]


def test_a_row_without_gene_expression_is_an_error():
    with pytest.raises(PayloadError, match=r"no feature has the type 'Gene Expression' .* 3 Antibody Capture"):
        select(SYMBOLS, feature_types=["Antibody Capture"] * 3)


def test_biotypes_in_feature_type_leave_all_genes_in():
    genes = select(SYMBOLS, feature_type=["protein_coding", "lncRNA", "protein_coding"])
    assert genes.place is None and genes.warnings == ()


def test_columns_that_decide_are_listed():
    columns = ["n_counts", "Symbol", "feature_types", "highly_variable", 7]
    assert lookup_columns(columns) == ["Symbol", "feature_types"]


@pytest.mark.parametrize(
    "name",
    [
        "A" + "a" * 200_000 + "!", "mm9" + "_" * 200_000 + "\n", "ENSG00000000000." + "1" * 200_000 + "!",
        "_ENSG00000000000" * 20_000 + "!", "hg19" + "_" * 200_000, "a." * 100_000 + "!",
    ],
    ids=["capital", "prefix", "version", "ids", "genome", "lower case"],
)  # fmt: skip
def test_long_names_are_matched_in_linear_time(name):
    """Backtracking would take minutes."""
    began = time.monotonic()
    assert select([*SYMBOLS, name]).genes_matched == 3
    assert time.monotonic() - began < 5
