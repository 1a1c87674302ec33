"""Parameters: the contract's names and defaults, where values come from, which are refused, and their hash."""

import subprocess
import sys
from typing import Literal, get_origin

import numpy as np
import pandas as pd
import pytest

from scgpt_batch.errors import ConfigError
from scgpt_batch.parameters import Parameters, RequestParameters

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


def test_numpy_values_are_accepted():
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
def test_sizes_of_the_checkpoint_can_be_given(name):
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


BOUNDS = dict.fromkeys(("use_key", "result_normed_key", "result_log1p_key", "result_binned_key", "batch_key"), 200)
BOUNDS |= {"group_by": 200, "input_data_path": 4096}
NUMBERS = {"filter_gene_by_counts": 10**12, "min_cell_counts": 1e12, "normalize_total": 1e12, "subset_hvg": 10**6}
NUMBERS |= {"binning": 1000, "max_length": 65_536, "min_coverage": 1, "seed": 2**63 - 1, "embsize": 10**6}
NUMBERS |= {"nhead": 10**6, "d_hid": 10**6, "nlayers": 10**6, "n_layers_cls": 10**6}


def test_every_parameter_has_an_upper_bound():
    mode = {"mode": "contextual", "need_preprocess": False}
    for name, length in BOUNDS.items():
        Parameters.create(mode, {name: "x" * length})
        with pytest.raises(ConfigError, match=f"'{name}': .*at most {length} characters, got 'xxx"):
            Parameters.create(mode, {name: "x" * (length + 1)})
    for name, most in NUMBERS.items():
        Parameters.create({name: most})
        with pytest.raises(ConfigError, match=f"'{name}'"):
            Parameters.create({name: most * 2})
    closed = {name for name, field in Parameters.model_fields.items() if get_origin(field.annotation) is Literal}
    closed |= {name for name, field in Parameters.model_fields.items() if field.annotation is bool}
    assert {*BOUNDS, *NUMBERS, *closed, "genes"} == set(DEFAULTS)


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        (["A"] * 100_001, "at most 100,000 names are possible, not 100,001"),
        (["A", "B" * 201], "a name may have 200 characters, not 201"),
        (["A" * 200] * 10_001, "2,000,000 characters together, not 2,000,200"),
    ],
    ids=["names", "length", "together"],
)
def test_genes_are_bounded_in_number_and_length(genes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Parameters.create({"genes": genes})
    assert len(str(caught.value)) < 500


def test_error_message_is_short_whatever_is_given():
    for given in ({"mode": "x" * 10**6}, {"x" * 10**6: 1}, {"genes": [1] * 10**5}, {str(i): 1 for i in range(10**5)}):
        with pytest.raises(ConfigError) as caught:
            Parameters.create(given)
        assert len(str(caught.value)) < 1000


def test_unknown_parameter_suggests_the_known_one():
    with pytest.raises(ConfigError, match=r"unknown parameter 'Max_Lenght': did you mean 'max_length'\?"):
        Parameters.create({"Max_Lenght": 1})


# The parameters of a request


def test_columns_of_a_row_win_over_params():
    request = RequestParameters({"mode": "cell", "seed": 1, "genes": ["A"]})
    assert request.of_row({"mode": None, "x_data": [1.0]}) == Parameters(mode="cell", seed=1, genes=("A",))
    found = request.of_row({"mode": "static", "seed": float("nan"), "genes": np.array(["B"])})
    assert found == Parameters(mode="static", seed=1, genes=("B",))


def test_params_that_only_a_row_completes_work():
    request = RequestParameters({"group_by": "donor"})
    assert request.of_row({"mode": "contextual"}).group_by == "donor"
    with pytest.raises(ConfigError, match="group_by needs mode 'contextual'"):
        request.of_row({})


def test_rows_share_parameters_and_genes():
    request = RequestParameters({"genes": ["A"] * 1000})
    assert request.of_row({}) is request.of_row({"x_data": [1.0]})
    assert request.of_row({"seed": 1}) is request.of_row({"seed": 1})
    assert request.of_row({"seed": 1}).genes is request.of_row({"seed": 2}).genes


@pytest.mark.parametrize("wrong", [{"seed": [{}]}, {"genes": [["A"]]}, {"mode": {}}, {"seed": []}], ids=str)
def test_row_with_nested_values_is_an_error(wrong):
    with pytest.raises(ConfigError, match=f"'{next(iter(wrong))}"):
        RequestParameters({}).of_row(wrong)


def test_all_faults_are_reported_at_once():
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


# Which parameters can change a number, by mode: with preprocessing, and without
INPUT = {"input_data_path": "a.h5ad", "use_key": "counts"}
GENES = {"genes": ("LYZ",)}
FILTERS = {"filter_gene_by_counts": 4, "filter_cell_by_counts": True, "min_cell_counts": 200.0}
VARIABLE_GENES = {"subset_hvg": 0, "hvg_flavor": "seurat", "batch_key": "donor"}
X_REPLACED = {"result_normed_key": ""}  # variable genes are then chosen by normalised values
VALUES = {"normalize_total": 1e6, "log1p": True, "binning": 11}
CELLS = {"tie_break": "upper", "seed": 1, "max_length": 600, "dtype": "bfloat16"}
GROUPS = {"group_by": "donor"}
CHANGES = INPUT | GENES | FILTERS | VARIABLE_GENES | X_REPLACED | VALUES | CELLS | GROUPS
CHANGES |= {"data_is_binned": True, "result_log1p_key": "", "result_binned_key": "bins", "data_is_raw": True}
CHANGES |= {"encoding": "float16_base64", "on_error": "record", "min_coverage": 0.5}
CHANGES |= dict.fromkeys(("embsize", "nhead", "d_hid", "nlayers", "n_layers_cls"), 64)
DECIDING = {
    ("static", True): INPUT | GENES | FILTERS | VARIABLE_GENES | X_REPLACED,
    ("static", False): INPUT | GENES,
    ("contextual", True): INPUT | GENES | FILTERS | VARIABLE_GENES | X_REPLACED | VALUES | CELLS | GROUPS,
    ("contextual", False): INPUT | GENES | CELLS | GROUPS | {"data_is_binned": True},
    ("cell", True): INPUT | FILTERS | VARIABLE_GENES | X_REPLACED | VALUES | CELLS,
    ("cell", False): INPUT | CELLS | {"data_is_binned": True},
}


def test_hash_is_tested_with_every_parameter():
    assert set(CHANGES) == set(DEFAULTS) - {"mode", "need_preprocess"}


@pytest.mark.parametrize(("mode", "need_preprocess"), DECIDING, ids=str)
def test_hash_differs_only_where_numbers_can(mode, need_preprocess):
    basis = Parameters(mode=mode, need_preprocess=need_preprocess)
    different = set()
    for name, value in CHANGES.items():
        try:
            changed = Parameters.create(basis.model_dump(), {name: value})
        except ConfigError:  # the mode does not take it
            continue
        if changed.params_hash() != basis.params_hash():
            different.add(name)
    assert different == set(DECIDING[mode, need_preprocess])


def test_hash_differs_by_mode():
    assert len({Parameters(mode=mode, need_preprocess=p).params_hash() for mode, p in DECIDING}) == 6


def test_hash_covers_log1p_if_variable_genes_depend_on_it():
    for replaced in ({"result_normed_key": ""}, {"normalize_total": 0}):
        plain, logged = (Parameters.create(replaced, {"log1p": log1p}) for log1p in (False, True))
        assert plain.params_hash() != logged.params_hash()
        layer = [Parameters.create(replaced, {"log1p": log1p, "use_key": "counts"}) for log1p in (False, True)]
        assert layer[0].params_hash() == layer[1].params_hash()
    no_cut = [Parameters(subset_hvg=0, result_normed_key="", log1p=log1p) for log1p in (False, True)]
    assert no_cut[0].params_hash() == no_cut[1].params_hash()


def test_hash_does_not_depend_on_how_a_value_is_written():
    assert Parameters.create({"normalize_total": 10000, "seed": np.int64(0), "genes": []}) == Parameters()
    assert Parameters(genes=("B", "A", "A")).params_hash() == Parameters(genes=("A", "B")).params_hash()
    assert Parameters(filter_cell_by_counts=True).params_hash() == Parameters(min_cell_counts=1).params_hash()
    binned = {"mode": "cell", "need_preprocess": False, "data_is_binned": True}
    assert Parameters(**binned).params_hash() == Parameters(**binned, tie_break="upper").params_hash()


def test_hash_is_the_same_in_another_process():
    code = "from scgpt_batch.parameters import Parameters; print(Parameters(genes=('B', 'A'), seed=3).params_hash())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == Parameters(genes=("B", "A"), seed=3).params_hash()
    assert len(other) == 16 and int(other, 16)


def test_hash_of_the_defaults_is_stable():
    # tables hold it: when it changes, every row counts as not yet embedded
    assert Parameters().params_hash() == "4848a03e9e9a37c4"
