"""The rules for values and names hold at every door: the same AnnData gives the same vectors, warnings and errors."""

import gzip
import json
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4
from warnings import catch_warnings, simplefilter

import anndata as ad
import numpy as np
import orjson
import pandas as pd
import pytest
import scipy.sparse as sp

from scgpt_batch import client
from scgpt_batch.errors import PartsFailed, ScgptBatchError
from scgpt_batch.inference.engine import Embedder
from scgpt_batch.io import files
from scgpt_batch.io.rows import to_row
from scgpt_batch.models.scgpt.checkpoint import load_checkpoint
from scgpt_batch.parameters import Parameters
from scgpt_batch.registry.pyfunc import ScgptModel
from tests.helpers import assert_close
from tests.paths import GOLDEN

CHECKPOINT = GOLDEN / "checkpoint_flash"
GENES = [name for name in json.loads((CHECKPOINT / "vocab.json").read_text()) if not name.startswith("<")][:200]
CELLS = {"mode": "cell", "need_preprocess": False, "data_is_raw": True}


class Found:
    """What a door answers: a vector for each cell (or group and gene), and warnings where the door has them."""

    def __init__(self, keys: list, vectors: Iterable, warnings: list[str] | None) -> None:
        self.keys, self.vectors, self.warnings = keys, np.array([*vectors], np.float32), warnings


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("doors")


@pytest.fixture(scope="module")
def embedder(folder) -> Embedder:
    return Embedder(load_checkpoint(CHECKPOINT), device="cpu", roots=[str(folder)])


@pytest.fixture(scope="module")
def url(embedder) -> Iterator[str]:
    """An endpoint over the PyFunc, with nothing of the server around it."""
    model = ScgptModel()
    model.embedder = embedder

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = gzip.decompress(self.rfile.read(int(self.headers["Content-Length"])))
            document = orjson.loads(body)
            answer = model.predict(None, pd.DataFrame(document["dataframe_records"]), document.get("params"))
            body = orjson.dumps({"predictions": answer.to_dict("records")}, option=orjson.OPT_SERIALIZE_NUMPY)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def answered(embedder: Embedder, row: dict, parameters: dict, warnings: list[str]) -> Found:
    answer = embedder.embed(row, Parameters(**parameters))
    if answer.error is not None:
        raise answer.error
    keys = answer.cell_ids or list(zip(answer.groups, answer.genes, strict=True))
    return Found(keys, answer.embeddings, [*warnings, *answer.report.warnings])


@pytest.fixture(params=["to_row", "notebook", "ingest", "input_data_path", "client and PyFunc"])
def door(request, embedder, url, folder):
    """A function: AnnData and parameters in, what the door answers out."""

    def through(adata: ad.AnnData, **parameters) -> Found:
        if request.param == "to_row":
            warnings: list[str] = []
            return answered(embedder, to_row(adata, warnings=warnings), parameters, warnings)
        if request.param == "notebook":
            tables = {"adata_obs": adata.obs, "adata_var": adata.var}
            # scipy has no float16, and the machine's byte order alone
            x = adata.X.astype(np.float32 if adata.X.dtype == np.float16 else adata.X.dtype.newbyteorder("="))
            return answered(embedder, {"adata_sparsematrix": sp.csr_matrix(x), **tables}, parameters, [])
        if request.param == "client and PyFunc":
            with catch_warnings(record=True) as caught:
                simplefilter("always")
                answer = client.embed(adata, url, progress=False, retries=0, **{"on_error": "record"} | parameters)
            keys = answer["cell_id"] if "cell_id" in answer else zip(answer["group"], answer["gene"], strict=True)
            return Found(list(keys), answer["embedding"], [str(one.message) for one in caught])
        path = folder / f"{uuid4()}.h5ad"
        adata.write_h5ad(path)
        if request.param == "input_data_path":
            return answered(embedder, {}, parameters | {"input_data_path": str(path)}, [])
        options = files.ReadOptions(layer="X")
        (task,) = files.plan([str(path)], options)
        (row,) = files.read(task, options)
        return answered(embedder, row, parameters, [])

    through.name = request.param
    return through


def counts(n_cells: int = 4, n_genes: int = 12) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.poisson(2, (n_cells, n_genes)).astype(np.float32) + np.eye(n_cells, n_genes, dtype=np.float32)


def cells(x=None, *, genes=None, names=None, obs=None, var=None) -> ad.AnnData:
    x = sp.csr_matrix(counts()) if x is None else x
    obs = pd.DataFrame(obs or {}, index=names or [f"c{i}" for i in range(x.shape[0])])
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(var or {}, index=list(genes or GENES[: x.shape[1]])))


def assert_same(found: Found, wanted: Found, *, said: str | None = None) -> None:
    assert found.keys == wanted.keys
    assert_close(found.vectors, wanted.vectors, atol=1e-6)
    if said is not None and found.warnings is not None:
        assert any(said in warning for warning in found.warnings), found.warnings


# Values

TYPES = ["float64", "float16", "int8", "int64", "uint16", ">f4", ">i4", "bool"]


@pytest.mark.parametrize("dtype", TYPES)
def test_all_number_types_equal_float32(door, dtype):
    x = (counts() > 1 if dtype == "bool" else counts()).astype(dtype)
    wanted = cells(sp.csr_matrix(x.astype(np.float32)))
    assert_same(door(cells(x), **CELLS), door(wanted, **CELLS))


def test_values_that_float32_does_not_hold_are_rounded(door):
    x = counts().astype(np.float64) + np.where(counts() > 0, 1e-12, 0)
    x[0, 0] = 1e-50
    rounded = sp.csr_matrix(x.astype(np.float32))
    assert_same(door(cells(x), **CELLS), door(cells(rounded), **CELLS))


def test_large_whole_numbers_that_change_are_counted(door):
    x = counts().astype(np.int64)
    x[1, 3] = 2**24 + 1
    wanted = door(cells(sp.csr_matrix(x.astype(np.float32))), **CELLS)
    said = "1 whole numbers above 2^24 are rounded to float32 (first: cell 1, gene "
    assert_same(door(cells(x), **CELLS), wanted, said=None if door.name == "ingest" else said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-1.0, "contains negative values (first: cell 1, gene {gene!r}); X looks scaled; use raw counts"),
        (np.nan, "contains NaN or infinity (first: cell 1, gene {gene!r})"),
        (np.inf, "contains NaN or infinity (first: cell 1, gene {gene!r})"),
        (1e39, "contains values outside the range of float32 (3.4e38) (first: cell 1, gene {gene!r})"),
    ],
    ids=["negative", "NaN", "infinity", "too large"],
)
def test_impossible_counts_are_reported_with_cell_and_gene(door, value, said):
    x = counts().astype(np.float64)
    x[1, 3] = value
    with pytest.raises((ScgptBatchError, PartsFailed)) as refused:
        door(cells(x), **CELLS)
    assert said.format(gene=GENES[3]) in str(refused.value)


# Genes


def test_columns_of_one_gene_are_added_up(door):
    x = counts()
    added = np.delete(x, 5, axis=1)
    added[:, 2] += x[:, 5]
    genes = [*GENES[:5], GENES[2], *GENES[6:12]]
    wanted = door(cells(sp.csr_matrix(added), genes=[*GENES[:5], *GENES[6:12]]), **CELLS)
    said = f"1 columns repeat the name of an earlier gene (first: {GENES[2]!r}): their values are summed"
    assert_same(door(cells(genes=genes), **CELLS), wanted, said=said)


def test_vector_of_a_cell_is_independent_of_other_cells(door):
    genes = [*GENES[:5], GENES[2], *GENES[6:12]]
    adata = cells(genes=genes)
    alone, together = door(adata[1:2].copy(), **CELLS), door(adata, **CELLS)
    assert_close(alone.vectors[0], together.vectors[1], atol=1e-6)


def test_genes_without_a_name_are_unknown(door):
    genes = [*GENES[:3], "", *GENES[4:8], "", *GENES[9:12]]
    named = [*GENES[:3], "unknown 1", *GENES[4:8], "unknown 2", *GENES[9:12]]
    wanted = door(cells(genes=named), **CELLS)
    assert_same(door(cells(genes=genes), **CELLS), wanted, said="2 genes have no name")


def test_features_that_are_not_gene_expression_are_left_out(door):
    types = ["Gene Expression"] * 9 + ["Antibody Capture", "Antibody Capture", "CRISPR Guide Capture"]
    wanted = door(cells(sp.csr_matrix(counts()[:, :9])), **CELLS)
    said = "3 features are not gene expression and are dropped: 2 Antibody Capture, 1 CRISPR Guide Capture"
    assert_same(door(cells(var={"feature_types": types}), **CELLS), wanted, said=said)


def test_symbols_are_taken_from_a_column(door):
    ids = [f"ENSG{i:011}" for i in range(11)] + [GENES[11]]
    found = door(cells(genes=ids, var={"feature_name": GENES[:12]}), **CELLS)
    said = "gene names taken from var column 'feature_name' (matches 12 of 12 genes; var's index matches 1)"
    assert_same(found, door(cells(), **CELLS), said=said)


# Cells


def test_repeated_cell_names_get_a_suffix(door):
    wanted = door(cells(names=["a", "b", "a-1", "b-1"]), **CELLS)
    found = door(cells(names=["a", "b", "a", "b"]), **CELLS)
    said = "2 repeated cell names got a suffix (first: 'a')"
    assert_same(found, wanted, said=None if door.name == "ingest" else said)  # ingest says it of the file


GROUPED = {"mode": "contextual", "need_preprocess": False, "data_is_raw": True, "group_by": "type"}


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (["T", None, "B", "T"], ["T", "(missing)", "B", "T"]),
        (pd.Categorical(["T", None, "B", "T"]), ["T", "(missing)", "B", "T"]),
        ([1.0, np.nan, 2.0, 1.0], ["1", "(missing)", "2", "1"]),
        ([0.5, np.nan, 2.0, 0.5], ["0.5", "(missing)", "2", "0.5"]),
    ],
    ids=["strings", "categories", "whole numbers", "fractions"],
)
def test_cells_without_a_group_form_one(door, labels, wanted):
    found = door(cells(obs={"type": labels}), **GROUPED)
    said = "1 cells have no 'type': they form the group (missing)"
    assert_same(found, door(cells(obs={"type": wanted}), **GROUPED), said=said)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [([1, 2], ["1", "2"]), ([True, False], ["True", "False"]), ([0.5, 2.0], ["0.5", "2"])],
    ids=["whole numbers", "bools", "floats"],
)
def test_groups_of_any_type_are_strings(door, labels, wanted):
    found = door(cells(obs={"type": labels * 2}), **GROUPED)
    assert_same(found, door(cells(obs={"type": wanted * 2}), **GROUPED))


@pytest.mark.parametrize("labels", [["a", None], [1.0, np.nan], [1, 2], [True, False]], ids=str)
def test_batches_of_any_type_and_none_choose_genes(door, labels):
    rng = np.random.default_rng(0)
    x = sp.csr_matrix(rng.poisson(rng.gamma(1, 3, 200), (60, 200)).astype(np.float32))
    parameters = {
        "mode": "cell",
        "subset_hvg": 60,
        "hvg_flavor": "seurat_v3",
        "data_is_raw": True,
        "batch_key": "batch",
    }
    found = door(cells(x, obs={"batch": labels * 30}), **parameters)
    wanted = door(cells(x, obs={"batch": ["x", "y"] * 30}), **parameters)
    said = "30 cells have no 'batch': they form the group (missing)" if pd.isna(labels).any() else None
    assert_same(found, wanted, said=said)
