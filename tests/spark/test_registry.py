"""What registration stores in MLflow, and how model URIs are resolved."""

import base64
import json
import shutil
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

import scgpt_batch
from scgpt_batch.errors import CheckpointError, ConfigError
from scgpt_batch.models.scgpt.checkpoint import checkpoint_digest, load_checkpoint
from scgpt_batch.registry.experiment import use_experiment
from scgpt_batch.registry.register import REQUIREMENTS, register
from scgpt_batch.registry.resolve import load, resolve
from scgpt_batch.registry.sample_answers import code_difference, public_version, registered_by, sample_path
from scgpt_batch.spark.worker import ModelRef
from tests.helpers import name_version
from tests.paths import GOLDEN

DIGEST = checkpoint_digest(GOLDEN / "checkpoint_flash")


def runs():
    return mlflow.search_runs(experiment_names=["tests"], output_format="list")


# Whether the installed code is what registered a version


@pytest.fixture
def of_other_code(registered, tmp_path):
    """A copy of the version whose source differs from the installed one."""
    folder = tmp_path / "model"
    shutil.copytree(registered.folder, folder)
    (folder / "code" / "scgpt_batch" / "errors.py").write_text("# older")
    return replace(registered, folder=folder)


def change_stored_answers(model, change):
    path = sample_path(model)
    sample = json.loads(path.read_text())
    for case in sample["cases"]:
        change(case["answers"][0])
    path.write_text(json.dumps(sample))


def test_same_code_is_not_compared(registered, monkeypatch):
    monkeypatch.setattr("scgpt_batch.inference.engine.load_embedder", None)
    assert code_difference(registered) is None


def test_other_code_with_the_same_numbers_is_accepted(of_other_code):
    assert code_difference(of_other_code) is None


def test_other_numbers_of_other_code_are_reported(of_other_code):
    def other_numbers(answer):
        vectors = np.frombuffer(base64.b64decode(answer["embeddings_base64"]), "<f4") + np.float32(1e-3)
        answer["embeddings_base64"] = base64.b64encode(vectors.tobytes()).decode()

    change_stored_answers(of_other_code, other_numbers)
    assert "embeddings differ by up to 0.001" in code_difference(of_other_code)
    assert registered_by(of_other_code) == scgpt_batch.__version__


def test_other_genes_of_other_code_are_reported(of_other_code):
    change_stored_answers(of_other_code, lambda answer: answer.update(error="refused"))
    assert "other genes, cells or error" in code_difference(of_other_code)


def test_other_libraries_are_compared(registered, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(registered.folder, folder)
    lines = (folder / "requirements.txt").read_text().replace("torch==", "torch==0.")
    (folder / "requirements.txt").write_text(lines)
    model = replace(registered, folder=folder)
    change_stored_answers(model, lambda answer: answer.update(error="refused"))
    assert code_difference(model) is not None


def test_workers_download_a_version_once(registered, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARK_LOCAL_DIRS", f"{tmp_path},/elsewhere")
    uris = (mlflow.get_tracking_uri(), mlflow.get_registry_uri())
    ref = ModelRef("/on/the/driver/only", registered.digest, registered.uri, *uris)
    folder = ref.downloaded()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert checkpoint_digest(folder) == DIGEST and registered.checkpoint.is_dir()
    monkeypatch.setattr("scgpt_batch.registry.resolve.resolve", None)
    assert ref.downloaded() == folder


# What registration stores


def test_version_has_tags_and_description(registered):
    version = mlflow.MlflowClient().get_model_version("scgpt", registered.version)
    tensors = len(load_checkpoint(GOLDEN / "checkpoint_flash").tensors)
    assert version.tags["checkpoint_digest"] == registered.digest == DIGEST
    assert version.tags["tensors_loaded"] == f"{tensors} of {tensors}"
    assert version.tags["package_version"] == scgpt_batch.__version__
    assert version.tags["run_id"] in {run.info.run_id for run in runs()}
    assert DIGEST in version.description


def test_run_has_a_model_card(registered):
    run_id = mlflow.MlflowClient().get_model_version("scgpt", registered.version).tags["run_id"]
    card = mlflow.artifacts.load_text(f"runs:/{run_id}/model_card.md")
    for fact in (
        DIGEST,
        "| embedding dimensions | 64 |",
        "| layers | 3 |",
        "| feed-forward width | 128 |",
        "2503 tokens",
        "static",
        "contextual",
        "cell",
    ):
        assert fact in card


def test_model_contains_no_pickle_that_runs_code(registered):
    files = [path for path in registered.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".joblib", ".pyc")]
    assert [path for path in files if path.suffix == ".pt"] == [registered.checkpoint / "best_model.pt"]
    assert torch.load(registered.checkpoint / "best_model.pt", weights_only=True)
    flavor = mlflow.models.Model.load(str(registered.folder)).flavors["python_function"]
    assert Path(flavor["model_code_path"]).name == "model_file.py" and "python_model" not in flavor


def test_model_contains_code_and_checkpoint(registered):
    assert checkpoint_digest(registered.checkpoint) == DIGEST
    shipped = registered.folder / "code" / "scgpt_batch"
    ours = Path(scgpt_batch.__file__).parent
    assert {path.relative_to(shipped) for path in shipped.rglob("*.py")} == {
        path.relative_to(ours) for path in ours.rglob("*.py")
    }


def test_requirements_are_pinned_and_without_spark(registered):
    lines = (registered.folder / "requirements.txt").read_text().split()
    names = [line.split("==")[0] for line in lines]
    assert sorted(names) == sorted(REQUIREMENTS)
    assert all("==" in line and "+" not in line for line in lines)
    assert not {"pyspark", "delta-spark", "scgpt_batch", "scgpt-batch"} & set(names)


@pytest.fixture(scope="module")
def second_version(registered, tmp_path_factory):
    """Version 2 of `moved`, with its alias, registered from a folder with links and files that are not its layout's."""
    folder = tmp_path_factory.mktemp("messy")
    checkpoint, secret = folder / "checkpoint", folder / "id_rsa"
    shutil.copytree(GOLDEN / "checkpoint_torch", checkpoint)
    secret.write_text("private")
    (checkpoint / "notes").mkdir()
    (checkpoint / "notes" / "passwords.txt").write_text("private")
    (checkpoint / "key").symlink_to(secret)
    weights = (checkpoint / "best_model.pt").rename(folder / "blob")  # as in Hugging Face's cache
    (checkpoint / "best_model.pt").symlink_to(weights)
    name_version("moved", "1", "champion")
    return register(str(checkpoint), "moved", alias="champion")


def test_new_version_takes_the_alias(registered, second_version):
    assert second_version.version == "2"
    assert resolve("models:/moved@champion") == second_version
    assert resolve("models:/moved/1") == replace(registered, name="moved", uri="models:/moved/1")


def test_only_the_files_of_the_layout_are_logged(registered_once, second_version):
    files = sorted(second_version.checkpoint.iterdir())
    assert [path.name for path in files] == ["args.json", "best_model.pt", "vocab.json"]
    assert not any(path.is_symlink() for path in files)
    assert second_version.digest == checkpoint_digest(GOLDEN / "checkpoint_torch")
    logged = [path for path in (registered_once / "artifacts").rglob("*") if path.is_file()]
    assert logged and not any(path.read_bytes() == b"private" for path in logged)


def copy_without_layer(folder):
    state = torch.load(GOLDEN / "checkpoint_flash" / "best_model.pt", weights_only=True)
    del state["transformer_encoder.layers.1.norm1.weight"]
    torch.save(state, folder / "best_model.pt")
    for name in ("args.json", "vocab.json"):
        (folder / name).write_bytes((GOLDEN / "checkpoint_flash" / name).read_bytes())
    return folder


def test_bad_checkpoint_logs_nothing(registered, tmp_path):
    before = len(runs())
    with pytest.raises(CheckpointError, match=r"layers\.1\.norm1\.weight"):
        register(str(copy_without_layer(tmp_path)), "broken")
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        register("/nowhere", "broken")
    assert len(runs()) == before
    assert not mlflow.MlflowClient().search_registered_models("name = 'broken'")


@pytest.mark.parametrize(
    ("name", "alias"),
    [("", ""), ("with/slash", ""), ("with:colon", ""), ("..", ""), ("x", "latest"), ("x", "v2"), ("x", "a b")],
)
def test_invalid_name_or_alias_logs_nothing(registered, name, alias):
    before = len(runs())
    with pytest.raises(ConfigError, match="cannot be"):
        register(str(GOLDEN / "checkpoint_flash"), name, alias=alias)
    assert len(runs()) == before


@pytest.mark.parametrize("name", ["scgpt", "lab.scgpt", "main.lab.", "main.lab.sc gpt", "a.b.c.d"])
def test_unity_catalog_needs_names_of_three_parts(registered, name, monkeypatch):
    before = len(runs())
    monkeypatch.setattr(mlflow, "get_registry_uri", lambda: "databricks-uc")
    with pytest.raises(ConfigError, match=r"catalog\.schema\.name"):
        register(str(GOLDEN / "checkpoint_flash"), name)
    assert len(runs()) == before


# Resolving


def test_alias_is_resolved_to_its_version(registered):
    found = resolve("models:/scgpt@champion")
    assert (found.uri, found.name, found.version) == (f"models:/scgpt/{registered.version}", "scgpt", "1")
    assert found == registered
    assert (found.config.embsize, found.config.nlayers) == (64, 3)


def test_files_are_downloaded_to_the_shared_folder(registered, spark, tmp_path):
    spark.conf.set("spark.mlflow.nfs.rootDir", str(tmp_path))
    try:
        shared = resolve("models:/scgpt@champion")
    finally:
        spark.conf.unset("spark.mlflow.nfs.rootDir")
    assert shared.folder.is_relative_to(tmp_path) and shared.folder.stat().st_mode & 0o055 == 0o055
    assert load_checkpoint(shared.checkpoint).digest == DIGEST
    assert not resolve("models:/scgpt@champion").folder.is_relative_to(tmp_path)


def test_path_is_resolved(registered):
    found = resolve(str(registered.folder))
    assert found.digest == DIGEST
    assert found.version == DIGEST[:12]
    assert found.name == registered.folder.name


def test_model_is_loaded_once_for_all_its_names(registered):
    assert load(registered) is load("models:/scgpt@champion")


@pytest.mark.parametrize(
    "uri",
    [
        "models:/nothing/1",
        "models:/scgpt/99",
        "models:/scgpt@nobody",
        "models:/nothing@champion",
        "models:/scgpt",
        "models:/scgpt/latest",
        "models:/",
        "models:/@",
        "models://scgpt/1",
        "/no/such/folder",
        "scgpt",
        "",
        "runs:/abc/model",
        "s3://bucket/model",
    ],
)
def test_invalid_model_uri_is_one_line(registered, uri):
    with pytest.raises(ConfigError) as refused:
        resolve(uri)
    assert "\n" not in str(refused.value)


def test_model_of_another_package_is_rejected(registered, tmp_path):
    class Theirs(mlflow.pyfunc.PythonModel):
        def predict(self, context, model_input, params=None):
            return model_input

    mlflow.pyfunc.save_model(tmp_path / "theirs", python_model=Theirs(), pip_requirements=[])
    with pytest.raises(ConfigError, match="was not registered by scgpt-batch register"):
        resolve(str(tmp_path / "theirs"))


@pytest.mark.parametrize("text", ["", "{", "flavors: {}", "just words"])
def test_broken_mlmodel_file_is_rejected(text, tmp_path):
    (tmp_path / "MLmodel").write_text(text)
    with pytest.raises(ConfigError, match="was not registered by scgpt-batch register") as refused:
        resolve(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_sqlite_experiment_stores_files_beside_it(registered_once, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    shutil.copyfile(registered_once / "mlflow.db", tmp_path / "store" / "mlflow.db")  # a new one takes seconds
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("sqlite:///store/mlflow.db")
    try:
        use_experiment("beside")
        use_experiment("beside")
        assert mlflow.get_experiment_by_name("beside").artifact_location == (tmp_path / "store/artifacts").as_uri()
    finally:
        mlflow.set_experiment(experiment_id="0")
        mlflow.set_tracking_uri(before)


@pytest.mark.parametrize(
    ("library", "extra"),
    [("boto3", "databricks-aws"), ("azure.core.credentials", "databricks-azure"), ("google.cloud", "databricks-gcp")],
)
def test_missing_storage_library_names_the_extra(home, monkeypatch, library, extra):
    def without_library(*_, **__):
        try:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        except ImportError as exc:
            raise mlflow.exceptions.MlflowException("Unable to import necessary dependencies") from exc

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", without_library)
    with pytest.raises(ConfigError, match=rf"pip install '\.\[{extra}\]'"):
        resolve("models:/scgpt/1")


def test_requirement_mlflow_has_the_version_of_mlflow_skinny(monkeypatch):
    installed = {"mlflow-skinny": "3.17.2"}

    def version(package):
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr("scgpt_batch.registry.sample_answers.installed_version", version)
    assert public_version("mlflow") == "3.17.2"
    with pytest.raises(PackageNotFoundError):
        public_version("torch")
