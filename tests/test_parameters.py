"""Parameters: the contract's names and defaults, where values come from, which are refused, and their hash."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from scgpt_batch.errors import ConfigError
from scgpt_batch.parameters import Parameters

# Users script against these.
DEFAULTS = {
    "need_preprocess": True, "input_data_path": "", "data_is_raw": False, "use_key": "X", "filter_gene_by_counts": 3,
    "filter_cell_by_counts": False, "min_cell_counts": 0, "normalize_total": 1e4, "result_normed_key": "X_normed",
    "log1p": False, "result_log1p_key": "X_log1p", "subset_hvg": 1200, "hvg_flavor": "cell_ranger", "binning": 51,
    "result_binned_key": "X_binned", "embsize": None, "nhead": None, "d_hid": None, "nlayers": None,
    "n_layers_cls": None, "mode": "static", "group_by": "", "genes": (), "min_coverage": 0.2, "data_is_binned": False,
    "max_length": 1200, "seed": 0, "tie_break": "random", "dtype": "float32", "encoding": "list", "on_error": "raise",
    "batch_key": "",
}  # fmt: skip


def test_names_and_defaults_are_the_contract():
    assert Parameters().model_dump() == DEFAULTS


def test_every_parameter_is_described():
    assert all(field.description for field in Parameters.model_fields.values())


@pytest.mark.parametrize(
    "missing", [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT], ids=["None", "NaN", "numpy NaN", "NA", "NaT"]
)
def test_missing_values_mean_not_given(missing):
    assert Parameters.create(dict.fromkeys(DEFAULTS, missing)) == Parameters()
    assert Parameters.create({"seed": 7}, {"seed": missing}).seed == 7


def test_later_layers_win():
    parameters = Parameters.create({"seed": 1, "binning": 9}, None, {"seed": 2}, {})
    assert (parameters.seed, parameters.binning) == (2, 9)


def test_numpy_values_are_taken_for_pythons():
    given = {"seed": np.int64(7), "normalize_total": np.float32(0.5), "log1p": np.bool_(True), "binning": np.array(9)}
    parameters = Parameters.create(given | {"genes": np.array(["CD3D", "LYZ"]), "use_key": np.str_("counts")})
    assert parameters == Parameters(
        seed=7, normalize_total=0.5, log1p=True, binning=9, genes=("CD3D", "LYZ"), use_key="counts"
    )
    assert {type(value) for value in parameters.model_dump().values()} <= {bool, int, float, str, tuple, type(None)}


@pytest.mark.parametrize(
    "genes", [["A", "B"], ("A", "B"), np.array(["A", "B"], dtype=object)], ids=lambda g: str(type(g))
)
def test_genes_come_as_any_sequence(genes):
    assert Parameters.create({"genes": genes}).genes == ("A", "B")


def test_call_with_upstreams_booleans_works():
    parameters = Parameters.create(
        {"filter_gene_by_counts": True, "filter_cell_by_counts": True, "subset_hvg": False, "batch_key": None}
    )
    assert (parameters.filter_gene_by_counts, parameters.subset_hvg) == (1, 0)
    assert parameters.filter_cell_by_counts is True


@pytest.mark.parametrize("name", ["embsize", "nhead", "d_hid", "nlayers", "n_layers_cls"])
def test_what_the_checkpoint_says_may_be_stated(name):
    assert getattr(Parameters.create({name: np.int64(12)}), name) == 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nlayer": 12}, "unknown parameter 'nlayer'"),
        ({"mode": "genes"}, "'mode': .*'static', 'contextual' or 'cell', got 'genes'"),
        ({"hvg_flavor": "scran"}, "'hvg_flavor': .*got 'scran'"),
        ({"tie_break": "middle"}, "'tie_break'"),
        ({"dtype": "float16"}, "'dtype'"),
        ({"encoding": "json"}, "'encoding'"),
        ({"on_error": "ignore"}, "'on_error'"),
        ({"binning": 1}, "binning must be 0 or at least 2, not 1"),
        ({"binning": -1}, "'binning'"),
        ({"max_length": 1}, "'max_length'"),
        ({"seed": -1}, "'seed'"),
        ({"seed": 2**63}, "'seed'"),
        ({"seed": 0.5}, "'seed'"),
        ({"normalize_total": float("inf")}, "'normalize_total'"),
        ({"normalize_total": "much"}, "'normalize_total': .*got 'much'"),
        ({"filter_cell_by_counts": 200}, "'filter_cell_by_counts': .*got 200"),
        ({"subset_hvg": -1}, "'subset_hvg'"),
        ({"nlayers": "many"}, "'nlayers'"),
        ({"genes": "CD3D"}, "'genes'"),
        ({"genes": ["CD3D", 3]}, r"'genes\.1'"),
        ({"group_by": "donor"}, "group_by needs mode 'contextual', not 'static'"),
        ({"group_by": "donor", "mode": "cell"}, "group_by needs mode 'contextual', not 'cell'"),
        ({"data_is_binned": True}, "data_is_binned needs need_preprocess false"),
        ({"binning": 0, "mode": "cell"}, "mode 'cell' needs bins"),
    ],
    ids=str,
)
def test_impossible_values_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        Parameters.create(given)


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError, match=r"^(?=.*'mode')(?=.*'seed')(?=.*unknown parameter 'nlayer').*$"):
        Parameters.create({"mode": "x", "seed": -1, "nlayer": 1})


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "contextual", "group_by": "donor"},
        {"need_preprocess": False, "data_is_binned": True},
        {"binning": 0},
        {"binning": 2},
        {"max_length": 2},
        {"seed": 2**63 - 1},
    ],
    ids=str,
)
def test_the_nearest_possible_values_are_taken(given):
    assert Parameters.create(given).model_dump() == DEFAULTS | given


def test_parameters_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Parameters().seed = 1


CHANGES = {
    "need_preprocess": False, "input_data_path": "a.h5ad", "use_key": "counts",
    "filter_gene_by_counts": 4, "filter_cell_by_counts": True, "min_cell_counts": 200, "normalize_total": 1e6,
    "result_normed_key": "", "log1p": True, "result_log1p_key": "", "subset_hvg": 0, "hvg_flavor": "seurat",
    "binning": 11, "mode": "cell", "genes": ("LYZ",), "max_length": 600, "seed": 1, "tie_break": "upper",
    "dtype": "bfloat16", "batch_key": "donor",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_hash_tells_what_changes_a_number(name):
    assert Parameters.create({name: CHANGES[name]}).params_hash() != Parameters().params_hash()


def test_hash_tells_group_and_bins():
    contextual = {"mode": "contextual", "need_preprocess": False}
    rest = [contextual, contextual | {"group_by": "donor"}, contextual | {"data_is_binned": True}]
    assert len({Parameters.create(given).params_hash() for given in rest}) == 3


@pytest.mark.parametrize(
    "given",
    [{"encoding": "float16_base64"}, {"on_error": "record"}, {"min_coverage": 0.5}]
    + [{name: 64} for name in ("embsize", "nhead", "d_hid", "nlayers", "n_layers_cls")]
    + [{"normalize_total": 10000}, {"seed": np.int64(0)}, {"genes": []}],
    ids=str,
)
def test_hash_leaves_out_what_changes_none(given):
    assert Parameters.create(given).params_hash() == Parameters().params_hash()


def test_hash_is_the_same_in_another_process():
    code = "from scgpt_batch.parameters import Parameters; print(Parameters(genes=('B', 'A'), seed=3).params_hash())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == Parameters(genes=("B", "A"), seed=3).params_hash()
    assert len(other) == 16 and int(other, 16)


def test_hash_of_the_defaults_is_stable():
    # tables hold it: when it changes, every row counts as not yet embedded
    assert Parameters().params_hash() == "825a3f9e10833481"
