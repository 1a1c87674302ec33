"""The registered model as its users call it: through `mlflow.pyfunc`, JSON and the command line."""

import base64
import json
import os
import subprocess
import sys

import anndata as ad
import mlflow
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from mlflow.models import convert_input_example_to_serving_input
from mlflow.pyfunc.scoring_server import invocations
from mlflow.types import DataType
from mlflow.types.schema import Array

from scgpt_batch.errors import ConfigError, LowCoverage, PayloadError
from scgpt_batch.io.rows import PAYLOAD_COLUMNS, to_row
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.parameters import Parameters
from scgpt_batch.registry.register import register
from tests.helpers import assert_close, random_adata
from tests.paths import DATA, GOLDEN

TOKENS = Vocabulary.from_file(GOLDEN / "checkpoint_flash" / "vocab.json").tokens
GENES = [*TOKENS[:30], "not-a-gene"]
UNPROCESSED = {"need_preprocess": False}
CELLS = {"need_preprocess": False, "mode": "cell"}
OUTPUTS = {
    "genes": Array(DataType.string),
    "groups": Array(DataType.string),
    "gene_embeddings": Array(Array(DataType.float)),
    "n_cells": Array(DataType.integer),
    "cell_ids": Array(DataType.string),
    "cell_embeddings": Array(Array(DataType.float)),
    "embeddings_base64": DataType.string,
    "embedding_dim": DataType.integer,
    "coverage": DataType.double,
    "warnings": Array(DataType.string),
    "error": DataType.string,
}
# The call of the blog post that this model replaces, word for word.
BLOGS_CALL = {
    "need_preprocess": True,
    "input_data_path": None,
    "data_is_raw": False,
    "use_key": "X",
    "filter_gene_by_counts": 3,
    "filter_cell_by_counts": False,
    "normalize_total": 1e4,
    "result_normed_key": "X_normed",
    "log1p": False,
    "result_log1p_key": "X_log1p",
    "subset_hvg": 1200,
    "hvg_flavor": "cell_ranger",
    "binning": 51,
    "result_binned_key": "X_binned",
}
SIZES = {"embsize": 64, "nhead": 4, "d_hid": 128, "nlayers": 3, "n_layers_cls": 3}


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(home):
    """The golden checkpoint, which may read files below `data` of `registered_once`."""
    return mlflow.pyfunc.load_model("models:/scgpt@champion")


@pytest.fixture(scope="module")
def model_without_roots(home):
    """The golden checkpoint of the other layout, which may read no files."""
    return mlflow.pyfunc.load_model(register(str(GOLDEN / "checkpoint_torch"), "plain").uri)


@pytest.fixture(params=["model", "model_without_roots"], ids=["flash", "plain"])
def either_model(request):
    return request.getfixturevalue(request.param)


def frame(*rows, **columns):
    payload = {name: pd.Series([row.get(name) for row in rows], dtype=object) for name in PAYLOAD_COLUMNS}
    return pd.DataFrame(payload | {name: pd.Series(values) for name, values in columns.items()})


def row(seed=0, n_obs=4, layout="csr"):
    return to_row(random_adata(n_obs, len(GENES), seed=seed, genes=GENES), layout=layout)


def assert_same_answers(found, wanted):
    assert list(found.columns) == list(wanted.columns) and len(found) == len(wanted)
    for name in found:
        for a, b in zip(found[name], wanted[name], strict=True):
            assert (a is None) == (b is None), name
            if a is not None and name.endswith("_embeddings"):  # their batches may differ, and so torch's kernels
                assert_close(np.array([*map(np.asarray, a)]), np.array([*map(np.asarray, b)]), atol=1e-6)
            else:
                assert a is None or np.array_equal(a, b), name


# Rows in, results out


@pytest.mark.parametrize("parameters", [UNPROCESSED, CELLS], ids=["static", "cell"])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_batch_gives_the_results_of_single_rows_in_order(model, n, parameters):
    rows = [row(seed, n_obs=2 + seed) for seed in range(n)]
    answers = model.predict(frame(*rows), params=parameters)
    assert list(answers.columns) == list(OUTPUTS) and len(answers) == n
    for i, one in enumerate(rows):
        alone = model.predict(frame(one), params=parameters)
        assert_same_answers(answers.iloc[i : i + 1].reset_index(drop=True), alone)


def test_rows_of_both_formats_can_be_mixed(model):
    answers = model.predict(frame(row(1), row(1, layout="dense")), params=CELLS)
    assert np.array_equal(*answers["cell_embeddings"])


def test_no_input_gives_the_whole_vocabulary(model):
    answer = model.unwrap_python_model().predict(None, None, UNPROCESSED).iloc[0]
    assert answer["genes"] == list(TOKENS)
    assert_close(answer["gene_embeddings"], golden("static")["embeddings"], atol=1e-5)


def test_row_of_nulls_fails(model):
    with pytest.raises(PayloadError, match=r"row 0: the row is empty: .* x_data, .* are null or missing"):
        model.predict(frame({}, row()), params=UNPROCESSED)
    answers = model.predict(frame({}, row()), params=UNPROCESSED | {"on_error": "record"})
    assert [len(genes) for genes in answers["genes"]] == [0, 30]
    assert answers["error"][0].startswith("PayloadError: the row is empty")


@pytest.mark.parametrize("renamed", [str.upper, lambda name: f"my_{name}"], ids=["upper case", "other names"])
def test_rows_without_a_known_column_are_an_error(model, renamed):
    unknown = pd.DataFrame([{renamed(name): value for name, value in row().items()}] * 3)
    with pytest.raises(ConfigError, match="a row needs x_data, x_indices, x_indptr"):
        model.predict(unknown.drop(columns=renamed("n_obs")), params=CELLS)
    with pytest.raises(ConfigError, match=r"unknown column|no column is an input"):
        model.unwrap_python_model().predict(None, unknown, CELLS)


@pytest.mark.parametrize("empty", [pd.DataFrame(), pd.DataFrame(index=range(3))], ids=["no rows", "rows"])
def test_frame_without_columns_is_an_error(model, empty):
    for predict in (model.predict, lambda data, params: model.unwrap_python_model().predict(None, data, params)):
        with pytest.raises(ConfigError, match="no column is an input of the model"):
            predict(empty, params=CELLS)


def test_misspelt_column_gets_a_suggestion(model):
    with pytest.raises(ConfigError, match="unknown column 'maxLength': did you mean 'max_length'"):
        model.unwrap_python_model().predict(None, frame(row(), maxLength=[5]), CELLS)
    other = frame(row(), adata_id=["a"], sample_id=["s"], x_dtype=["float32"], donor=["d"])
    assert model.unwrap_python_model().predict(None, other, CELLS)["error"][0] is None


def test_input_that_is_not_a_dataframe_is_an_error(model):
    with pytest.raises(ConfigError, match="must be a DataFrame of rows, or None, not dict"):
        model.unwrap_python_model().predict(None, {"x_data": [1.0]}, CELLS)


def test_unknown_genes_are_a_warning_if_others_are_known(model):
    parameters = UNPROCESSED | {"genes": [GENES[3], "cd4"]}
    assert model.predict(frame(row()), params=parameters)["warnings"][0] == [
        "1 requested gene is not in the model's vocabulary: cd4"
    ]
    with pytest.raises(ConfigError, match="none of the 1 names"):
        model.predict(frame(row()), params=UNPROCESSED | {"genes": ["cd4"]})
    answers = model.predict(
        frame(row(), row(), genes=[["cd4"], [GENES[3]]]), params=UNPROCESSED | {"on_error": "record"}
    )
    assert "none of the 1 names" in answers["error"][0] and answers["error"][1] is None


@pytest.mark.parametrize("wrap", [sp.csr_matrix, sp.csc_matrix, sp.csr_array], ids=lambda wrap: wrap.__name__)
def test_matrix_and_table_objects_work_in_python(model, wrap):
    adata = random_adata(4, len(GENES), genes=GENES)
    objects = pd.DataFrame(
        [{"adata_sparsematrix": wrap(adata.X), "adata_obs": adata.obs, "adata_var": adata.var}], dtype=object
    )
    found = model.unwrap_python_model().predict(None, objects, CELLS)
    assert_same_answers(found, model.predict(frame(to_row(adata)), params=CELLS))


# Coverage and warnings


def test_answer_carries_coverage_and_warnings(model):
    answer = model.predict(frame(row()), params=CELLS).iloc[0]
    counts = random_adata(4, len(GENES), genes=GENES).X
    assert_close(answer["coverage"], counts[:, :30].sum() / counts.sum(), atol=1e-6)
    assert answer["warnings"] == []
    contradicted = model.predict(frame(row()), params=CELLS | {"data_is_raw": True})
    assert "X looks log-transformed" in contradicted["warnings"][0][0]


def test_row_below_min_coverage_fails(model):
    mixed = random_adata(4, 20, genes=[*GENES[:2], *(f"unknown{i}" for i in range(18))])
    with pytest.raises(LowCoverage, match="row 0: 2 of 20 gene names"):
        model.predict(frame(to_row(mixed)), params=CELLS)
    answer = model.predict(frame(to_row(mixed)), params=CELLS | {"min_coverage": 0}).iloc[0]
    assert 0 < answer["coverage"] < 0.2 and len(answer["cell_ids"]) == 4


def test_failed_row_reports_its_coverage(model):
    answers = model.predict(frame(to_row(random_adata(3, 5)), row()), params=CELLS | {"on_error": "record"})
    assert answers["coverage"][0] == 0 and answers["coverage"][1] > 0.2


# Golden parity through MLflow


def test_static_vectors_equal_upstream(either_model):
    wanted = golden("static")["embeddings"]
    answer = either_model.predict(frame(row()), params=UNPROCESSED).iloc[0]
    assert answer["genes"] == GENES[:30] and answer["embedding_dim"] == 64
    assert_close(np.stack(answer["gene_embeddings"]), wanted[:30], atol=1e-5)


def test_contextual_means_of_binned_cells_equal_upstream(either_model):
    wanted, tokens = golden("contextual"), golden("transformer")
    x = np.zeros((len(tokens["lengths"]), len(TOKENS)), np.float32)
    for i, n in enumerate(tokens["lengths"]):
        x[i, tokens["gene_ids"][i, 1:n]] = tokens["values"][i, 1:n]
    obs = pd.DataFrame(index=[f"cell {i}" for i in range(len(x))])
    binned = ad.AnnData(sp.csr_matrix(x[:, :-3]), obs=obs, var=pd.DataFrame(index=list(TOKENS[:-3])))
    parameters = {"mode": "contextual", "need_preprocess": False, "data_is_binned": True}
    answer = either_model.predict(frame(to_row(binned)), params=parameters).iloc[0]
    assert answer["genes"] == wanted["tokens"].tolist()
    assert answer["n_cells"] == wanted["count"].tolist()
    assert_close(np.stack(answer["gene_embeddings"]), wanted["mean"], atol=1e-4)


@pytest.mark.parametrize("tie_break", ["upper", "lower"])
def test_cell_vectors_equal_upstreams_embed_data(either_model, tie_break):
    wanted, some = golden("embed_data"), slice(None, None, 4)
    adata = ad.read_h5ad(DATA / "pbmc3k.h5ad")[wanted["cell_index"][some]]
    answer = either_model.predict(frame(to_row(adata)), params=CELLS | {"tie_break": tie_break}).iloc[0]
    assert answer["cell_ids"] == wanted["cell_names"][some].tolist()
    assert_close(np.stack(answer["cell_embeddings"]), wanted[f"x_1200_{tie_break}"][some], atol=1e-5)


# Parameters


def test_parameter_column_overrides_params_for_its_row(model):
    found = model.predict(frame(row(), row(), row(), mode=["cell", None, "contextual"]), params=UNPROCESSED)
    for i, mode in enumerate(["cell", "static", "contextual"]):
        alone = model.predict(frame(row()), params=UNPROCESSED | {"mode": mode})
        assert_same_answers(found.iloc[i : i + 1].reset_index(drop=True), alone)


def test_number_column_overrides_params_for_its_row(model):
    found = model.predict(frame(row(), row(), max_length=[3, 1200]), params=CELLS)
    alone = model.predict(frame(row()), params=CELLS | {"max_length": 3})
    assert_close(np.stack(found["cell_embeddings"][0]), np.stack(alone["cell_embeddings"][0]), atol=1e-6)
    assert not np.array_equal(*found["cell_embeddings"])


def test_array_column_overrides_params_for_its_row(model):
    found = model.predict(frame(row(), row(), genes=[[GENES[3]], [GENES[7], GENES[5]]]), params=UNPROCESSED)
    assert found["genes"].tolist() == [[GENES[3]], [GENES[5], GENES[7]]]


def test_genes_restrict_the_result(model):
    found = model.predict(frame(row()), params=UNPROCESSED | {"genes": [GENES[3], "not-a-gene"]})
    assert found["genes"].tolist() == [[GENES[3]]]


def log1p_cells():
    given, raw = golden("preprocess_input"), ad.read_h5ad(DATA / "pbmc3k.h5ad")
    raw = raw[given["cell_index"]]
    x = sp.csr_matrix((given["log1p_data"], raw.X.indices, given["indptr"]), raw.shape)
    return ad.AnnData(x, obs=raw.obs, var=raw.var)[:150].copy()


def test_blogs_call_works_unchanged_and_is_the_default(model):
    cells = frame(to_row(log1p_cells()))
    theirs, default = model.predict(cells, params=BLOGS_CALL | SIZES), model.predict(cells)
    assert_same_answers(theirs, default)
    assert 500 < len(default["genes"][0]) < 1200
    row_of = {token: i for i, token in enumerate(TOKENS)}
    wanted = golden("static")["embeddings"][[row_of[gene] for gene in default["genes"][0]]]
    assert_close(np.stack(default["gene_embeddings"][0]), wanted, atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_size_that_differs_from_the_checkpoint_is_an_error(model, name):
    with pytest.raises(ConfigError, match=f"{name} is 12, but the checkpoint has {SIZES[name]}"):
        model.predict(frame(row()), params=UNPROCESSED | {name: 12})


def test_invalid_parameter_value_is_named(model):
    with pytest.raises(ConfigError, match=r"'mode'.*'fast'"):
        model.predict(frame(row()), params={"mode": "fast"})


def test_bad_row_raises_by_default_with_its_position(model):
    with pytest.raises(PayloadError, match="row 1: x_indptr"):
        model.predict(frame(row(), row() | {"x_indptr": [0, 1]}), params=UNPROCESSED)


def test_recorded_bad_row_leaves_others_unaffected(model):
    unknown = to_row(random_adata(3, 5))
    rows = [row(1), row(2) | {"adata_var": "{"}, unknown, row(3)]
    answers = model.predict(frame(*rows), params=CELLS | {"on_error": "record"})
    assert [None if e is None else e.split(":")[0] for e in answers["error"]] == [
        None,
        PayloadError.__name__,
        LowCoverage.__name__,
        None,
    ]
    assert all(answers.loc[1, name] == [] for name, kind in OUTPUTS.items() if isinstance(kind, Array))
    good = model.predict(frame(rows[0], rows[3]), params=CELLS)
    assert_same_answers(answers.loc[[0, 3]].reset_index(drop=True), good)


def test_invalid_parameter_column_fails_its_row_only(model):
    answers = model.predict(frame(row(), row(), mode=["fast", "cell"]), params=UNPROCESSED | {"on_error": "record"})
    assert "'fast'" in answers["error"][0] and answers["error"][1] is None


def test_on_error_can_be_a_column(model):
    answers = model.predict(frame(row() | {"x_indptr": [0]}, on_error=["record"]), params=UNPROCESSED)
    assert answers["error"][0].startswith("PayloadError: x_indptr")


@pytest.mark.parametrize("mode", ["static", "contextual", "cell"])
def test_encodings_contain_the_same_vectors(model, mode):
    answers = {
        encoding: model.predict(frame(row()), params=UNPROCESSED | {"mode": mode, "encoding": encoding}).iloc[0]
        for encoding in ("list", "float32_base64", "float16_base64")
    }
    name = "cell_embeddings" if mode == "cell" else "gene_embeddings"
    vectors = np.stack(answers["list"][name])
    assert vectors.shape[1] == answers["list"]["embedding_dim"] == 64
    for encoding, dtype, atol in (("float32_base64", "<f4", 0), ("float16_base64", "<f2", 2e-3)):
        answer = answers[encoding]
        assert answer[name] == [] and answers["list"]["embeddings_base64"] is None
        assert answer["embedding_dim"] == 64
        decoded = np.frombuffer(base64.b64decode(answer["embeddings_base64"]), dtype).reshape(-1, 64)
        assert_close(decoded, vectors, atol=atol)


# Files


def test_files_are_read_below_the_registered_roots_only(registered_once, model, tmp_path):
    root = registered_once / "data"
    adata = random_adata(4, len(GENES), genes=GENES)
    for folder in (root, tmp_path):
        adata.write_h5ad(folder / "cells.h5ad")
    found = model.predict(frame({}), params=CELLS | {"input_data_path": str(root / "cells.h5ad")})
    assert_same_answers(found, model.predict(frame(to_row(adata)), params=CELLS))
    (root / "link.h5ad").symlink_to(tmp_path / "cells.h5ad")
    for path in (tmp_path / "cells.h5ad", root / ".." / "data" / "cells.h5ad", root / "link.h5ad"):
        with pytest.raises(PayloadError, match="is not below one of the --input-roots"):
            model.predict(frame({}), params=CELLS | {"input_data_path": str(path)})


def test_no_file_is_read_without_registered_roots(model_without_roots):
    with pytest.raises(PayloadError, match="registered without roots"):
        model_without_roots.predict(frame({}), params=CELLS | {"input_data_path": "/etc/passwd"})


# As an HTTP server calls it


@pytest.fixture(scope="module")
def post(model):
    """Call the model as MLflow's server does; return its predictions, or the server's error."""

    def post(body):
        body = body if isinstance(body, str) else json.dumps(body)
        answered = invocations(body, "application/json", model, model.metadata.get_input_schema())
        result = json.loads(answered.response)
        return result["predictions"] if answered.status == 200 else result

    return post


def as_json(row):
    """The payload columns that a row gives, in JSON's own types."""
    given = {name: row[name] for name in PAYLOAD_COLUMNS if row[name] is not None}
    return {name: v if isinstance(v, str) else np.asarray(v).tolist() for name, v in given.items()}


@pytest.mark.parametrize("layout", ["csr", "dense"])
@pytest.mark.parametrize("body", ["dataframe_split", "dataframe_records", "inputs"])
def test_every_json_format_gives_the_results_of_python(model, post, body, layout):
    given = as_json(row(layout=layout))
    spelled = {
        "dataframe_split": {"columns": list(given), "data": [list(given.values())]},
        "dataframe_records": [given],
        "inputs": [given],
    }
    (found,) = post({body: spelled[body], "params": CELLS})
    wanted = model.predict(frame(row()), params=CELLS).iloc[0]
    assert list(found) == list(OUTPUTS)
    assert found["cell_ids"] == wanted["cell_ids"] and found["error"] is None
    assert_close(found["cell_embeddings"], np.stack(wanted["cell_embeddings"]), atol=1e-7)


def test_input_example_works_over_http(registered, post):
    example = mlflow.models.Model.load(registered.uri).load_input_example()
    answers = post(convert_input_example_to_serving_input((example, UNPROCESSED)))
    assert [len(answer["genes"]) for answer in answers] == [4, 4]


def test_blogs_call_works_as_json(post):
    given = as_json(to_row(log1p_cells()))
    (answer,) = post({"dataframe_records": [given], "params": BLOGS_CALL | SIZES})
    assert len(answer["genes"]) > 500


def test_every_parameter_can_be_a_json_column(post):
    columns = Parameters(mode="cell", need_preprocess=False, on_error="record").model_dump(mode="json")
    given = as_json(row())
    (answer,) = post({"dataframe_records": [given | {name: v for name, v in columns.items() if v is not None}]})
    assert answer["error"] is None and len(answer["cell_ids"]) == 4


# Signature


def test_signature_has_every_parameter_and_optional_column(model):
    signature = model.metadata.signature
    defaults = Parameters().model_dump(mode="json")
    assert {spec.name: spec.default for spec in signature.params} == defaults
    columns = {spec.name: spec for spec in signature.inputs}
    assert list(columns) == [*PAYLOAD_COLUMNS, *defaults]
    assert not any(spec.required for spec in columns.values())
    for spec in signature.params:
        column = columns[spec.name].type
        assert spec.dtype == getattr(column, "dtype", column), spec.name
        assert (spec.shape == (-1,)) == isinstance(column, Array), spec.name


def test_defaults_equal_the_blogs_call():
    assert Parameters.create(BLOGS_CALL) == Parameters()
    ours = {
        "mode": "static",
        "group_by": "",
        "genes": (),
        "min_coverage": 0.2,
        "data_is_binned": False,
        "max_length": 1200,
        "seed": 0,
    }
    ours |= {"tie_break": "random", "dtype": "float32", "encoding": "list", "on_error": "raise", "batch_key": ""}
    assert {name: getattr(Parameters(), name) for name in ours} == ours
    assert set(Parameters.model_fields) == {*BLOGS_CALL, *SIZES, *ours, "min_cell_counts"}


def test_output_columns_are_fixed(model):
    assert [(spec.name, spec.type) for spec in model.metadata.signature.outputs] == list(OUTPUTS.items())


def test_mlflow_models_predict_answers_json(registered, model, tmp_path):
    given = as_json(row())
    (tmp_path / "input.json").write_text(json.dumps({"dataframe_records": [given, given], "params": CELLS}))
    command = [sys.executable, "-m", "mlflow", "models", "predict", "--env-manager", "local", "-m", registered.uri]
    command += ["-i", str(tmp_path / "input.json"), "-o", str(tmp_path / "output.json"), "-t", "json"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "output.json").read_text())["predictions"]
    wanted = model.predict(frame(row()), params=CELLS)
    assert len(answers) == 2
    for answer in answers:
        assert_close(answer["cell_embeddings"], np.stack(wanted["cell_embeddings"][0]), atol=1e-6)
