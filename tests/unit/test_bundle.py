"""The Databricks bundle, as far as it can be checked without a workspace: types, references, files, entry points."""

import copy
import json
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
from databricks.bundles.vector_search_endpoints import VectorSearchEndpoint
from databricks.bundles.vector_search_indexes import VectorSearchIndex
from databricks.bundles.volumes import Volume
from databricks.sdk.service import vectorsearch

from scgpt_batch.cli.main import parse, read_settings
from scgpt_batch.cli.options import COMMON_OPTIONS
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
    "vector_search_endpoints": VectorSearchEndpoint,
    "vector_search_indexes": VectorSearchIndex,
    "volumes": Volume,
}
AS_WRITTEN = bundles.read()
RESOURCES = [(kind, key) for kind, found in AS_WRITTEN["resources"].items() for key in found]
TASKS = [(name, task) for name, job in AS_WRITTEN["resources"]["jobs"].items() for task in job["tasks"]]
WHEEL_TASKS = [(name, task["task_key"]) for name, task in TASKS if "python_wheel_task" in task]
SCRIPTS = [(name, task["spark_python_task"]["python_file"]) for name, task in TASKS if "spark_python_task" in task]
FOLDERS = {"search": bundles.BUNDLE, "deployment": bundles.BUNDLE / "resources"}  # of the files with these jobs


@pytest.mark.parametrize("form", ["written", "dev", "prod"])
@pytest.mark.parametrize(("kind", "key"), RESOURCES)
def test_resource_matches_databricks_class(kind, key, form):
    found = AS_WRITTEN["resources"] if form == "written" else bundles.resolved(form)
    assert CLASSES[kind].from_dict(found[kind][key]).as_dict() == found[kind][key]


VARIANTS = bundles.documented_variants()


@pytest.mark.parametrize("variant", VARIANTS)
def test_documented_variant_matches_databricks_classes(variant):
    plain, found = bundles.resolved("prod"), bundles.resolved("prod", override=VARIANTS[variant]["targets"]["prod"])
    assert found != plain
    for kind, resources in found.items():
        for key, resource in resources.items():
            assert CLASSES[kind].from_dict(resource).as_dict() == resource, key


def test_variants_are_those_that_the_document_promises():
    subjects = [next(iter(variant.split())) for variant in VARIANTS]
    assert subjects == ["Azure,", "Google", "Run", "A", "Rate", "Logs"]


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
    for _, task in TASKS:
        if "python_wheel_task" in task:
            (wheel,) = (library["whl"] for library in task["libraries"] if "whl" in library)
            assert (bundles.BUNDLE / "resources" / wheel).parent.resolve() == folder / "dist"
    assert SCRIPTS and all((FOLDERS[job] / script).is_file() for job, script in SCRIPTS)


def test_task_that_deploys_asks_for_the_sdk_of_the_extra():
    extra = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]["databricks"]
    (sdk,) = (requirement for requirement in extra if requirement.startswith("databricks-sdk"))
    deploys = [task for _, task in TASKS if "deploy" in task.get("python_wheel_task", {}).get("parameters", ())]
    assert deploys and all({"pypi": {"package": sdk}} in task["libraries"] for task in deploys)


@pytest.mark.parametrize(("job", "task"), WHEEL_TASKS)
def test_task_parameters_are_valid_for_its_command(job, task):
    found = bundles.resolved("prod")["jobs"][job]
    (task,) = (one for one in found["tasks"] if one["task_key"] == task)
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert task["python_wheel_task"]["package_name"] == project["name"]
    assert project["scripts"][task["python_wheel_task"]["entry_point"]] == "scgpt_batch.cli:entry_point"
    assert task["job_cluster_key"] in {cluster["job_cluster_key"] for cluster in found["job_clusters"]}
    given = vars(parse(bundles.task_words(found, task)))
    name = given.pop("command")
    flags = {key: value for key, value in given.items() if key not in COMMON_OPTIONS}
    settings, *_ = read_settings(name, flags, None)
    named = {value for key, value in settings if key.endswith(("table", "view", "_uri")) and key != "registry_uri"}
    named = {name for name in named if name} or {settings.rows}
    assert named and all(name.removeprefix("models:/").startswith("main.scgpt.") for name in named)


def test_nightly_tasks_run_in_order():
    tasks = bundles.in_order(AS_WRITTEN["resources"]["jobs"]["nightly"])
    assert [task["task_key"] for task in tasks] == [
        "ingest", "embed_static", "embed_cells", "embed_contextual", "maintain", "maintain_cells", "monitor",
        "monitor_cells",
    ]  # fmt: skip


def test_deployment_tasks_run_in_order():
    tasks = bundles.in_order(AS_WRITTEN["resources"]["jobs"]["deployment"])
    assert [task["task_key"] for task in tasks] == ["evaluate", "approval", "promote", "deploy"]


def test_deployment_job_can_be_connected_to_a_model():
    """Unity Catalog passes these two parameters; its page shows Approve for a task whose name begins with approval."""
    job = AS_WRITTEN["resources"]["jobs"]["deployment"]
    assert {"model_name", "model_version"} <= {one["name"] for one in job["parameters"]}
    (approval,) = (task for task in job["tasks"] if task["task_key"].startswith("approval"))
    assert approval["max_retries"] == 0 and approval["spark_python_task"]["parameters"][-1] == "{{task.name}}"


def test_deployment_job_promotes_what_it_evaluated():
    evaluate, _, promote, _ = bundles.in_order(AS_WRITTEN["resources"]["jobs"]["deployment"])
    words = [task["python_wheel_task"]["parameters"] for task in (evaluate, promote)]
    assert [word for word in words[0] if word != "--plan"] == words[1]


def test_jobs_principal_can_promote_and_deploy():
    found = bundles.resolved("prod")
    grants = found["registered_models"]["model"]["grants"]
    assert {"principal": "app-id", "privileges": ["MANAGE"]} in grants
    permissions = found["model_serving_endpoints"]["endpoint"]["permissions"]
    assert {"level": "CAN_MANAGE", "service_principal_name": "app-id"} in permissions


def test_only_the_transformer_runs_on_gpus():
    jobs = AS_WRITTEN["resources"]["jobs"].values()
    on_gpus = {t["task_key"] for job in jobs for t in job["tasks"] if t.get("job_cluster_key") == "gpu"}
    assert on_gpus == {"embed_cells", "embed_contextual"}


def test_gpu_task_gets_the_cores_of_its_node():
    (gpu,) = (c["new_cluster"] for c in nightly(gpu_node_cpus="16")["job_clusters"] if c["job_cluster_key"] == "gpu")
    assert (gpu["spark_conf"]["spark.task.cpus"], gpu["spark_conf"]["spark.task.resource.gpu.amount"]) == ("16", "1")


def nightly(target="prod", **given):
    return bundles.resolved(target, **given)["jobs"]["nightly"]


def test_spot_nodes_of_the_target_are_merged_into_both_clusters():
    clusters = {c["job_cluster_key"]: c["new_cluster"] for c in nightly()["job_clusters"]}
    assert clusters.keys() == {"cpu", "gpu"}
    assert all(c["aws_attributes"]["availability"] == "SPOT_WITH_FALLBACK" for c in clusters.values())
    assert all(c["spark_version"].startswith("18.x-") for c in clusters.values())


def test_old_requests_runs_and_versions_are_deleted_by_default():
    tasks = [task for job in bundles.resolved("prod")["jobs"].values() for task in job["tasks"]]
    words = {t["task_key"]: t["python_wheel_task"]["parameters"] for t in tasks if "python_wheel_task" in t}
    assert words["requests"][-4:] == ["--date-column", "request_date", "--retain-days", "90"]
    assert words["maintain"][-2:] == ["--runs-days", "365"]
    for mode in ("static", "cells", "contextual"):
        task = words[f"embed_{mode}"]
        assert task[task.index("--prune") + 1] == "5", mode


def test_keys_are_unique_among_all_kinds():
    """`bundle validate` rejects a key that two resources have, also of different kinds."""
    keys = [key for _, key in RESOURCES]
    assert sorted(keys) == sorted(set(keys))


# The earlier bundle had the key `scgpt` three times, so `bundle validate` rejected it until somebody renamed two.
RENAMED = {"registered_models": "model", "model_serving_endpoints": "endpoint"}


def test_upgrade_deletes_and_recreates_nothing_that_holds_data():
    before = json.loads((REPO / "tests/data/bundle_before.json").read_text())
    before |= {kind: {key: before[kind]["scgpt"]} for kind, key in RENAMED.items()}
    steps = bundles.plan(before, bundles.resolved("prod"))
    print("\n".join(steps))
    lost = [step for step in steps if step.startswith(("delete", "recreate"))]
    assert [step for step in lost if not step.startswith(("delete jobs.", "delete alerts."))] == []
    assert "create jobs.retention" in steps


def test_search_indexes_are_optional():
    included = {path for pattern in AS_WRITTEN["include"] for path in bundles.BUNDLE.glob(pattern)}
    assert bundles.BUNDLE / bundles.OPTIONAL not in included
    assert f"# - {bundles.OPTIONAL} " in (bundles.BUNDLE / "databricks.yml").read_text()


@pytest.mark.parametrize(("index", "task"), [("cell_index", "embed_cells"), ("gene_index", "embed_static")])
def test_index_follows_the_table_of_its_task(index, task):
    found = bundles.resolved("prod")
    (words,) = (t["python_wheel_task"]["parameters"] for t in nightly()["tasks"] if t["task_key"] == task)
    table = words[words.index("--search-table") + 1]
    spec = found["vector_search_indexes"][index]["delta_sync_index_spec"]
    assert spec["source_table"] == table and table in found["jobs"]["search"]["trigger"]["table_update"]["table_names"]
    assert found["vector_search_indexes"][index]["primary_key"] == "embedding_id"


def test_deployer_can_read_the_tables_of_the_indexes():
    grants = bundles.resolved("prod")["schemas"]["scgpt"]["grants"]
    assert {"principal": "deployer-id", "privileges": ["SELECT"]} in grants


@pytest.mark.parametrize("index", AS_WRITTEN["resources"]["vector_search_indexes"])
def test_index_matches_the_classes_of_the_sdk(index):
    found = bundles.resolved("prod")["vector_search_indexes"][index]
    spec = found["delta_sync_index_spec"]
    assert vectorsearch.DeltaSyncVectorIndexSpecRequest.from_dict(spec).as_dict() == spec
    assert vectorsearch.VectorIndexType(found["index_type"])


def test_plan_names_a_recreated_resource():
    before = {"volumes": {"v": {"volume_type": "MANAGED", "comment": "a"}}}
    after = {"volumes": {"v": {"volume_type": "EXTERNAL", "comment": "a"}}}
    assert bundles.plan(before, after) == ["recreate volumes.v: volume_type"]


def test_generated_files_are_up_to_date():
    made = generator.files(bundles.CONF)
    assert [str(path) for path, text in made.items() if path.read_text() != text] == []  # else: make bundle
    assert {path for path in made if path.suffix == ".yml"} == set(bundles.BUNDLE.glob("resources/*.alert.yml"))


def test_threshold_is_written_to_its_alert(tmp_path):
    (tmp_path / "monitor.yml").write_text("monitor: {max_error_rate: 0.25, hours: 2}")
    made = {path.name: text for path, text in generator.files(tmp_path).items()}
    assert "double_value: 0.25" in made["error_rate.alert.yml"] and "120 minutes" in made["error_rate.alert.yml"]


def test_idle_endpoint_gets_an_alert_only_when_it_is_severe(tmp_path):
    assert "no_requests" not in AS_WRITTEN["resources"]["alerts"]
    (tmp_path / "monitor.yml").write_text("monitor: {severity: {no_requests: critical}, ignore: [p95]}")
    made = {path.name: text for path, text in generator.files(tmp_path).items()}
    assert "scGPT critical no_requests" in made["no_requests.alert.yml"] and "p95.alert.yml" not in made


def test_alerts_send_mail_when_their_state_changes():
    for name, alert in bundles.resolved("prod")["alerts"].items():
        notification = alert["evaluation"]["notification"]
        assert notification["notify_on_ok"] and not notification.get("retrigger_seconds"), name


@pytest.mark.parametrize("target", AS_WRITTEN["targets"])
def test_nothing_is_open_to_every_user(target):
    found = bundles.resolved(target)
    lines = [line for kind in found.values() for r in kind.values() for line in r.get("permissions", [])]
    named = {line.get("group_name") for line in lines}
    named |= {grant["principal"] for kind in found.values() for r in kind.values() for grant in r.get("grants", [])}
    assert {"readers", "curators"} <= named and not named & {"users", "account users"}


def test_only_its_deployer_can_write_to_the_bundles_folder():
    prod = AS_WRITTEN["targets"]["prod"]
    assert prod["workspace"]["root_path"].startswith("/Workspace/Users/${var.deployer}/")
    names = [experiment["name"] for experiment in AS_WRITTEN["resources"]["experiments"].values()]
    assert all(name.startswith("/Users/${workspace.current_user.userName}/") for name in names)


def test_curators_run_jobs_and_readers_see_them():
    for key, job in bundles.resolved("prod")["jobs"].items():
        levels = {line["group_name"]: line["level"] for line in job["permissions"]}
        assert levels == {"curators": "CAN_MANAGE_RUN", "readers": "CAN_VIEW"}, key


def test_jobs_principal_can_log_to_the_experiment():
    permissions = bundles.resolved("prod")["experiments"]["runs"]["permissions"]
    assert {"level": "CAN_EDIT", "service_principal_name": "app-id"} in permissions


def test_bills_can_be_grouped_by_tags():
    found = bundles.resolved("prod")
    tags = {key: job["tags"] for key, job in found["jobs"].items()}
    tags["endpoint"] = {tag["key"]: tag["value"] for tag in found["model_serving_endpoints"]["endpoint"]["tags"]}
    assert tags == {key: {"project": "scgpt", "component": key} for key in tags}


def test_curators_can_register_models():
    grants = bundles.resolved("prod")["schemas"]["scgpt"]["grants"]
    assert "CREATE_MODEL" in next(grant["privileges"] for grant in grants if grant["principal"] == "curators")
