"""`promote`: the alias moves if the challenger reproduces its answers, is fast enough and close to the champion.

The command runs each version in a process of its own; tests of a single check run versions in this process.
"""

import base64
import json
import shutil

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

from scgpt_batch.cli.main import FAILED, OK, WRONG_USAGE
from scgpt_batch.promotion import run_version
from scgpt_batch.promotion.promotion import check, promote
from scgpt_batch.registry.register import register
from scgpt_batch.registry.resolve import resolve
from scgpt_batch.registry.sample_answers import sample_path
from scgpt_batch.settings import PromoteSettings
from tests.helpers import name_version, small_rows, write_rows

ANY_SPEED = 100  # --max-slowdown where times do not matter: other processes use the machine too


def in_this_process(model, requests):
    """Compute a version's results as its process does, with the installed code."""
    loaded = mlflow.pyfunc.load_model(str(model.folder))
    return [run_version.run(loaded, request) for request in requests]


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


def by_name(checks):
    return {each.check: each for each in checks}


def test_equal_challenger_becomes_champion(run, model):
    code, summary, _ = run("promote", "--name", model, "--max-slowdown", ANY_SPEED)
    assert code == OK
    assert [summary[key] for key in ("promoted", "version", "previous", "refused")] == [True, "2", "1", []]
    checks = {each["check"]: each for each in summary["checks"]}
    assert list(checks) == ["parity", "rows", "latency", "gene_drift", "cell_drift"]
    assert checks["gene_drift"]["value"] == pytest.approx(1) == checks["cell_drift"]["value"]
    assert alias(model) == "2"


def test_champion_is_not_promoted_again(run, model):
    code, summary, _ = run("promote", "--name", model, "--challenger", "1")
    assert (code, summary["promoted"], summary["checks"], alias(model)) == (OK, False, [], "1")


def test_first_champion_needs_no_comparison(spark, model, golden, tmp_path):
    mlflow.MlflowClient().delete_registered_model_alias(model, "champion")
    rows = f"delta.`{tmp_path}/rows`"
    write_rows(spark, small_rows(4, golden), rows)
    settings = PromoteSettings(name=model, challenger="1", rows=rows, max_rows=3)
    checks = by_name(check(settings, resolve(f"models:/{model}/1"), None, in_this_process))
    assert list(checks) == ["parity", "rows"] and all(each.passed for each in checks.values())
    assert checks["rows"].message == "3 of 3 rows succeed as before"


def test_plan_moves_no_alias(model):
    mlflow.MlflowClient().delete_registered_model_alias(model, "champion")
    result = promote(PromoteSettings(name=model, challenger="1", plan=True), in_this_process)
    assert (result.exit_code, result.promoted, result.refused, result.previous) == (OK, False, [], None)
    assert alias(model) is None


def drifted(golden, folder):
    """A checkpoint whose gene vectors and last layer are somewhat different."""
    shutil.copytree(golden / "checkpoint_flash", folder)
    state = torch.load(folder / "best_model.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("encoder.embedding.weight", "transformer_encoder.layers.2.linear2.weight"):
        state[name] += state[name].std() * torch.randn(state[name].shape, generator=generator)
    torch.save(state, folder / "best_model.pt")
    return folder


def test_drifted_or_slow_challenger_is_refused(model, golden, tmp_path, caplog):
    version = register(str(drifted(golden, tmp_path / "drifted")), model, alias="challenger").version
    rows = list(small_rows(3, golden))
    rows[1]["adata_obs"] = "{"  # a row that the champion fails too is no fault of the challenger
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    settings = PromoteSettings(name=model, rows=str(tmp_path / "rows.parquet"), max_slowdown=0.001)
    with caplog.at_level("WARNING"):
        result = promote(settings, in_this_process)
    assert (result.exit_code, result.promoted, alias(model)) == (FAILED, False, "1")
    assert result.refused == ["latency", "gene_drift", "cell_drift"]
    assert f"version {version} is not promoted: latency, gene_drift, cell_drift" in caplog.text
    checks = by_name(result.checks)
    assert 0.5 < checks["gene_drift"].value < 0.95 and "moved most" in checks["gene_drift"].message
    assert "times the champion's" in checks["latency"].message
    assert checks["cell_drift"].message.startswith("mean cosine of 6 cells")


@pytest.mark.parametrize(("failing", "passed"), [("2", False), ("12", True)], ids=["challenger", "both"])
def test_row_that_fails_with_the_challenger_alone_is_counted(model, failing, passed):
    def run_with_failure(version, requests):
        *stored, found = in_this_process(version, requests)
        if version.version in failing:
            found["answers"][0]["error"] = "PayloadError: x"
        return [*stored, found]

    new, old = (resolve(f"models:/{model}/{version}") for version in "21")
    assert by_name(check(PromoteSettings(name=model), new, old, run_with_failure))["rows"].passed == passed


def changed_challenger(model, tmp_path, change):
    """Register a copy of the model's version 2 as challenger, after `change` of its folder."""
    folder = tmp_path / "changed"
    shutil.copytree(resolve(f"models:/{model}/2").folder, folder)
    change(folder)
    made = mlflow.MlflowClient().create_model_version(model, str(folder))
    mlflow.MlflowClient().set_registered_model_alias(model, "challenger", made.version)


def test_version_runs_with_the_code_stored_with_it(run, model, tmp_path):
    def rename_a_function(folder):
        file = folder / "code/scgpt_batch/registry/signature.py"
        text = file.read_text()
        assert "answer.base64(" in text
        file.write_text(text.replace("answer.base64(", "answer.base64and_more("))

    changed_challenger(model, tmp_path, rename_a_function)
    code, summary, _ = run("promote", "--name", model)
    assert (code, summary["refused"], alias(model)) == (FAILED, ["parity"], "1")
    assert "base64and_more" in summary["checks"][0]["message"]


def test_other_numbers_than_at_registration_are_refused(model, tmp_path):
    def change_stored_answers(folder):
        path = sample_path(resolve(str(folder)))
        sample = json.loads(path.read_text())
        for case in sample["cases"]:
            (answer,) = case["answers"]
            vectors = np.frombuffer(base64.b64decode(answer["embeddings_base64"]), "<f4") + np.float32(0.01)
            answer["embeddings_base64"] = base64.b64encode(vectors.tobytes()).decode()
        path.write_text(json.dumps(sample))

    changed_challenger(model, tmp_path, change_stored_answers)
    result = promote(PromoteSettings(name=model, max_slowdown=ANY_SPEED), in_this_process)
    assert (result.exit_code, result.refused, alias(model)) == (FAILED, ["parity"], "1")
    assert by_name(result.checks)["parity"].value == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("flags", "wanted"), [
    (["--challenger", "nobody"], "'nobody'"),
    (["--challenger", "99"], "99"),
    (["--name", "nothing"], "'nothing'"),
    (["--rows", "/nowhere.parquet"], "/nowhere.parquet"),
    (["--rows", "s3://lab/rows.parquet"], "rows s3://lab/rows.parquet is not a path on this machine"),
])  # fmt: skip
def test_wrong_usage_is_one_line(run, model, flags, wanted):
    given = flags if "--name" in flags else ["--name", model, *flags]
    code, _, err = run("promote", *given)
    assert code == WRONG_USAGE and wanted in err.strip().splitlines()[-1] and "Traceback" not in err


def test_registration_stores_answers_in_every_mode(model):
    stored = json.loads(sample_path(resolve(f"models:/{model}/1")).read_text())
    assert [case["params"]["mode"] for case in stored["cases"]] == ["static", "contextual", "cell", "cell"]
    for case in stored["cases"]:
        (answer,) = case["answers"]
        assert answer["error"] is None and len(answer["embeddings_base64"]) > 3 * 64 * 4
    assert np.asarray(stored["rows"][0]["adata_sparsematrix"]).shape == (3, 32)
