"""`promote`: the alias moves when the challenger answers right, fast and like the champion, and not otherwise."""

import json
import shutil

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

from scgpt_batch.cli.main import FAILED, OK, WRONG_USAGE
from scgpt_batch.promotion import promotion
from scgpt_batch.registry.register import register
from scgpt_batch.registry.resolve import resolve
from scgpt_batch.registry.sample_answers import sample_path
from tests.helpers import name_version, small_rows, write_rows

PATIENT = ("--max-slowdown", "100")  # two processes on a busy machine: their times are no subject here


@pytest.fixture(scope="module")
def names(home):
    """A name for each test's model."""
    return iter(f"model-{i}" for i in range(100))


@pytest.fixture
def model(names, monkeypatch):
    """A registered model of its own: version 1 is champion, 2 challenger, of equal checkpoint."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the versions' processes
    name = next(names)
    name_version(name, "1", "champion")
    name_version(name, "2", "challenger")
    return name


def alias(name, which="champion"):
    """The version that an alias stands for, None without it."""
    found = mlflow.MlflowClient().get_registered_model(name).aliases.get(which)
    return None if found is None else str(found)


def checks(told):
    return {check["check"]: check for check in told["checks"]}


def test_an_equal_challenger_becomes_champion_once(run, model):
    code, told, _ = run("promote", "--name", model, *PATIENT)
    assert (code, told["promoted"], told["version"], told["previous"], told["refused"]) == (OK, True, "2", "1", [])
    assert list(checks(told)) == ["parity", "rows", "latency", "gene_drift", "cell_drift"]
    assert checks(told)["gene_drift"]["value"] == pytest.approx(1) == checks(told)["cell_drift"]["value"]
    assert alias(model) == "2"
    code, told, _ = run("promote", "--name", model)
    assert (code, told["promoted"], told["checks"]) == (OK, False, [])


def test_the_first_champion_has_nothing_to_be_compared_with(run, spark, model, golden, tmp_path):
    mlflow.MlflowClient().delete_registered_model_alias(model, "champion")
    write_rows(spark, small_rows(4, golden), f"delta.`{tmp_path}/rows`")
    rows = ("--rows", f"delta.`{tmp_path}/rows`", "--max-rows", "3")
    code, told, _ = run("promote", "--name", model, "--challenger", "1", "--plan", *rows)
    assert (code, told["promoted"], told["previous"], list(checks(told))) == (OK, False, None, ["parity", "rows"])
    assert checks(told)["rows"]["message"] == "3 of 3 rows succeed as before" and alias(model) is None


def drifted(golden, folder):
    """A checkpoint whose gene vectors and last layer are somewhat different."""
    shutil.copytree(golden / "checkpoint_flash", folder)
    state = torch.load(folder / "best_model.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("encoder.embedding.weight", "transformer_encoder.layers.2.linear2.weight"):
        state[name] += state[name].std() * torch.randn(state[name].shape, generator=generator)
    torch.save(state, folder / "best_model.pt")
    return folder


def test_a_challenger_that_drifts_or_is_slow_is_refused_with_figures(run, model, golden, tmp_path, caplog):
    version = register(str(drifted(golden, tmp_path / "drifted")), model, alias="challenger").version
    held = list(small_rows(3, golden))
    held[1]["adata_obs"] = "{"  # a row that the champion fails too is no fault of the challenger
    pd.DataFrame(held).to_parquet(tmp_path / "rows.parquet")
    flags = ("--rows", tmp_path / "rows.parquet", "--max-slowdown", "0.001")
    code, told, _ = run("promote", "--name", model, *flags)
    assert (code, told["promoted"], alias(model)) == (FAILED, False, "1")
    assert told["refused"] == ["latency", "gene_drift", "cell_drift"]
    assert f"version {version} is not promoted: latency, gene_drift, cell_drift" in caplog.text
    assert 0.5 < checks(told)["gene_drift"]["value"] < 0.95 and "moved most" in checks(told)["gene_drift"]["message"]
    assert "times the champion's" in checks(told)["latency"]["message"]
    assert checks(told)["cell_drift"]["message"].startswith("mean cosine of 6 cells")


def test_a_row_that_only_the_champion_answers_is_a_reason_to_refuse(model):
    version = resolve(f"models:/{model}/2")
    answers = lambda *errors: {"answers": [{"error": error} for error in errors]}  # noqa: E731
    assert not promotion._rows_answered(version, answers(None, "PayloadError: x"), answers(None, None)).passed
    assert promotion._rows_answered(version, answers(None, "PayloadError: x"), answers(None, "PayloadError: x")).passed


def broken_copy(model, tmp_path, file, old, new):
    """Register a copy of the model's version 2 in which one file says something else."""
    folder = tmp_path / "broken"
    shutil.copytree(resolve(f"models:/{model}/2").folder, folder)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    made = mlflow.MlflowClient().create_model_version(model, str(folder))
    mlflow.MlflowClient().set_registered_model_alias(model, "challenger", made.version)


def test_the_code_that_the_version_carries_is_what_answers(run, model, tmp_path):
    broken_copy(model, tmp_path, "code/scgpt_batch/registry/signature.py", "answer.base64(", "answer.base64and_more(")
    code, told, _ = run("promote", "--name", model)
    assert (code, told["refused"], alias(model)) == (FAILED, ["parity"], "1")
    assert "base64and_more" in checks(told)["parity"]["message"]


def test_a_version_that_answers_other_numbers_than_when_registered_is_refused(run, model, tmp_path):
    broken_copy(model, tmp_path, "code/scgpt_batch/inference/results.py", "vectors.astype(", "(vectors + .01).astype(")
    code, told, _ = run("promote", "--name", model, *PATIENT)
    assert (code, told["refused"], alias(model)) == (FAILED, ["parity"], "1")
    assert checks(told)["parity"]["value"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("flags", "wanted"), [
    (["--challenger", "nobody"], "'nobody'"),
    (["--challenger", "99"], "99"),
    (["--name", "nothing"], "'nothing'"),
    (["--rows", "/nowhere.parquet"], "/nowhere.parquet"),
])  # fmt: skip
def test_a_wrong_call_says_what_to_do(run, model, flags, wanted):
    given = flags if "--name" in flags else ["--name", model, *flags]
    code, _, err = run("promote", *given)
    assert code == WRONG_USAGE and wanted in err.strip().splitlines()[-1] and "Traceback" not in err


def test_registering_stores_what_the_model_answers_in_every_mode(model):
    stored = json.loads(sample_path(resolve(f"models:/{model}/1")).read_text())
    assert [case["params"]["mode"] for case in stored["cases"]] == ["static", "contextual", "cell", "cell"]
    for case in stored["cases"]:
        (answer,) = case["answers"]
        assert answer["error"] is None and len(answer["embeddings_base64"]) > 3 * 64 * 4
    assert np.asarray(stored["rows"][0]["adata_sparsematrix"]).shape == (3, 32)
