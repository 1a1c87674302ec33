"""Tables of the analysis commands, read at paths."""

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from scgpt_batch.cli.analysis_tables import AnalysisTables
from scgpt_batch.cli.cell_sources import read_cells
from scgpt_batch.cli.gene_vectors import gene_vectors
from scgpt_batch.io.rows import to_row
from tests.analysis_data import CELLS, cell_lines, gene_lines, labelled_cells


@pytest.mark.parametrize("lines", [cell_lines, gene_lines])
def test_all_readings_of_a_table_are_of_one_version(tmp_path, lines):
    table, tables = str(tmp_path / "vectors"), AnalysisTables({})
    write_deltalake(table, lines())
    tables.columns(table)
    write_deltalake(table, lines(version="2", hours=1), mode="append")
    assert tables.values(table, "model_version") == ["1"]
    assert tables.read(table, ["run_id"]).num_rows == CELLS
    assert tables.embeddings(table).model["model_version"] == "1"
    assert tables.lines(table).model["model_version"] == "1"
    assert tables.made_of(table, tables.embeddings(table).model, {})["source_version"] == 0
    assert AnalysisTables({}).embeddings(table).model["model_version"] == "2"


def test_vectors_do_not_depend_on_the_order_of_lines(tmp_path):
    lines, order = cell_lines(), np.random.default_rng(0).permutation(CELLS)
    for name, table in (("a", lines), ("b", lines.take(order))):
        write_deltalake(str(tmp_path / name), table)
    a, b = (AnalysisTables({}).embeddings(str(tmp_path / name)) for name in "ab")
    assert a.frame().equals(b.frame()) and np.array_equal(a.vectors, b.vectors)


def test_static_vectors_are_one_per_gene(tmp_path):
    table = str(tmp_path / "genes")
    write_deltalake(table, pa.concat_tables([gene_lines(), gene_lines(20, adata_id="other")]))
    found = gene_vectors(AnalysisTables({}), table)
    assert (found.source, found.count, found.dimension) == (table, CELLS, 8)
    assert found.groups[None].index.is_monotonic_increasing and found.groups[None].index.is_unique


def test_only_rows_with_wanted_cells_are_decoded(tmp_path):
    table, cells = str(tmp_path / "rows"), labelled_cells()
    rows = [{"adata_id": f"row{start}", **to_row(cells[start : start + 30])} for start in range(0, CELLS, 30)]
    rows[1]["x_data"] = rows[1]["x_data"][:-1]  # unreadable
    write_deltalake(table, pa.Table.from_pylist(rows))
    wanted = np.array([75, 3, 61])
    found = read_cells(table, AnalysisTables({})).counts(wanted)
    assert found.obs_names.tolist() == cells.obs_names[wanted].tolist()
    assert np.array_equal(found.X.toarray(), cells.X[wanted])
