"""The Databricks bundle, as far as it can be checked without a workspace: types, references, files, entry points."""

import copy
import tomllib

import pytest
import yaml
from databricks.bundles.alerts import Alert
from databricks.bundles.dashboards import Dashboard
from databricks.bundles.experiments import MlflowExperiment
from databricks.bundles.jobs import Job
from databricks.bundles.model_serving_endpoints import ModelServingEndpoint
from databricks.bundles.registered_models import RegisteredModel
from databricks.bundles.schemas import Schema
from databricks.bundles.volumes import Volume

from scgpt_batch.cli.main import parse, read_settings
from scgpt_batch.databricks import bundle as generator
from tests import databricks_bundle as bundles
from tests.paths import REPO

CLASSES = {
    "alerts": Alert,
    "dashboards": Dashboard,
    "experiments": MlflowExperiment,
    "jobs": Job,
    "model_serving_endpoints": ModelServingEndpoint,
    "registered_models": RegisteredModel,
    "schemas": Schema,
    "volumes": Volume,
}
AS_WRITTEN = bundles.read()
RESOURCES = [(kind, key) for kind, found in AS_WRITTEN["resources"].items() for key in found]
TASKS = [(name, task["task_key"]) for name, job in AS_WRITTEN["resources"]["jobs"].items() for task in job["tasks"]]


@pytest.mark.parametrize("form", ["written", "dev", "prod"])
@pytest.mark.parametrize(("kind", "key"), RESOURCES)
def test_resource_matches_databricks_class(kind, key, form):
    found = AS_WRITTEN["resources"] if form == "written" else bundles.resolved(form)
    assert CLASSES[kind].from_dict(found[kind][key]).as_dict() == found[kind][key]


def test_misspelt_resource_field_is_rejected():
    job = copy.deepcopy(AS_WRITTEN["resources"]["jobs"]["nightly"])
    job["tasks"][0]["python_whel_task"] = job["tasks"][0].pop("python_wheel_task")
    with pytest.raises(ValueError, match="python_whel_task"):
        Job.from_dict(job)


@pytest.mark.parametrize("target", AS_WRITTEN["targets"])
def test_references_are_resolved(target):
    assert "${" not in yaml.safe_dump(bundles.resolved(target))


def test_unknown_reference_is_named(monkeypatch):
    monkeypatch.delitem(bundles.GIVEN, "notify")
    with pytest.raises(KeyError, match=r"var\.notify"):
        bundles.resolved("prod")


def test_variables_are_described_and_used():
    text = "".join(path.read_text() for path in bundles.BUNDLE.rglob("*.yml"))
    for name, variable in AS_WRITTEN["variables"].items():
        assert variable["description"] and f"${{var.{name}}}" in text, name


def test_referenced_files_exist():
    (dashboard,) = AS_WRITTEN["resources"]["dashboards"].values()
    assert (bundles.BUNDLE / "resources" / dashboard["file_path"]).is_file()
    artifact = AS_WRITTEN["artifacts"]["wheel"]
    folder = (bundles.BUNDLE / artifact["path"]).resolve()
    assert folder == REPO and "--wheel-dir dist " in artifact["build"]
    for job in AS_WRITTEN["resources"]["jobs"].values():
        for task in job["tasks"]:
            (wheel,) = (library["whl"] for library in task["libraries"] if "whl" in library)
            assert (bundles.BUNDLE / "resources" / wheel).parent.resolve() == folder / "dist"


@pytest.mark.parametrize(("job", "task"), TASKS)
def test_task_parameters_are_valid_for_its_command(job, task):
    found = bundles.resolved("prod")["jobs"][job]
    (task,) = (one for one in found["tasks"] if one["task_key"] == task)
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert task["python_wheel_task"]["package_name"] == project["name"]
    assert project["scripts"][task["python_wheel_task"]["entry_point"]] == "scgpt_batch.cli:entry_point"
    assert task["job_cluster_key"] in {cluster["job_cluster_key"] for cluster in found["job_clusters"]}
    given = vars(parse(bundles.task_words(found, task)))
    name = given.pop("command")
    flags = {key: value for key, value in given.items() if key not in ("config", "debug", "json")}
    settings, *_ = read_settings(name, flags, None)
    tables = {value for key, value in settings if key.endswith(("table", "view")) and value}
    assert tables and all(table.startswith("main.scgpt.") for table in tables)


def test_nightly_tasks_run_in_order():
    tasks = bundles.in_order(AS_WRITTEN["resources"]["jobs"]["nightly"])
    wanted = ["ingest", "embed_static", "embed_contextual", "maintain", "monitor"]
    assert [task["task_key"] for task in tasks] == wanted


def test_generated_files_are_up_to_date():
    made = generator.files(bundles.CONF)
    assert [str(path) for path, text in made.items() if path.read_text() != text] == []  # else: make bundle
    assert {path for path in made if path.suffix == ".yml"} == set(bundles.BUNDLE.glob("resources/*.alert.yml"))


def test_threshold_is_written_to_its_alert(tmp_path):
    (tmp_path / "monitor.yml").write_text("monitor: {max_error_rate: 0.25, hours: 2}")
    made = {path.name: text for path, text in generator.files(tmp_path).items()}
    assert "double_value: 0.25" in made["error_rate.alert.yml"] and "120 minutes" in made["error_rate.alert.yml"]


@pytest.mark.parametrize("target", AS_WRITTEN["targets"])
def test_account_users_is_not_a_workspace_group(target):
    permissions = [
        p for kind in bundles.resolved(target).values() for r in kind.values() for p in r.get("permissions", [])
    ]
    groups = {permission.get("group_name") for permission in permissions}
    assert "users" in groups and "account users" not in groups


def test_curators_can_register_models():
    grants = bundles.resolved("prod")["schemas"]["scgpt"]["grants"]
    assert "CREATE_MODEL" in next(grant["privileges"] for grant in grants if grant["principal"] == "curators")
