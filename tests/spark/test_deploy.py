"""`deploy` and `status` with the real SDK over HTTP, against a simulated workspace."""

import json
import re
import shlex
import subprocess
import time
from copy import deepcopy
from datetime import UTC, datetime, timedelta

import mlflow
import numpy as np
import pytest
from mlflow.pyfunc import scoring_server

from scgpt_batch.cli.main import FAILED, OK, WRONG_USAGE
from scgpt_batch.errors import GPU_UNUSABLE
from scgpt_batch.io.rows import from_row
from tests import databricks_workspace, inference_tables
from tests.databricks_workspace import Fault, Workspace, served
from tests.helpers import assert_close, small_rows
from tests.paths import REPO

MODEL = "main.lab.scgpt"
TABLE = "main.lab.scgpt_payload"
ENDPOINTS = "/api/2.0/serving-endpoints"


@pytest.fixture
def workspace(monkeypatch, tmp_path):
    """A workspace with versions 2 to 5 of a model (champion 3, challenger 4); the environment has its credentials."""
    stand_in = Workspace()
    stand_in.add_model(MODEL, 2, 3, 4, 5, champion=3, challenger=4)
    with served(stand_in, monkeypatch, tmp_path):
        yield stand_in


@pytest.fixture
def deploy(run, workspace):
    """Deploy; return exit code, summary and the last line of standard error."""

    def call(model="@champion", *flags):
        given = ["--model-uri", f"models:/{MODEL}{model}"] if model else []
        code, summary, err = run(
            "deploy", "--endpoint", "scgpt", "--poll-seconds", "0.01", "--retry-seconds", "20", *given, *flags
        )
        assert "Traceback" not in err
        return code, summary, err.strip().splitlines()[-1] if err else ""

    return call


@pytest.fixture
def deployed(deploy, workspace):
    """An endpoint that serves version 3."""
    assert deploy("/3")[0] == OK
    workspace.requests.clear()
    return workspace.endpoints["scgpt"]


def serving(workspace):
    """Version -> percent of what is served now."""
    config = workspace.endpoints["scgpt"]["config"]
    shares = {r["served_entity_name"]: r["traffic_percentage"] for r in config["traffic_config"]["routes"]}
    return {entity["entity_version"]: shares[entity["name"]] for entity in config["served_entities"]}


def entity(workspace, version):
    config = workspace.endpoints["scgpt"]["config"]
    return next(e for e in config["served_entities"] if e["entity_version"] == version)


# What it does


def test_new_endpoint_serves_the_version_of_the_alias(deploy, workspace):
    code, summary, _ = deploy()
    assert (code, summary["endpoint"], summary["state"], summary["version"]) == (OK, "scgpt", "READY", "3")
    assert (summary["traffic"], summary["inference_table"]) == ({"scgpt-3": 100}, TABLE)
    assert summary["url"] == f"{workspace.url}/serving-endpoints/scgpt/invocations"
    assert workspace.last_body("POST", ENDPOINTS) == {
        "name": "scgpt",
        "config": {
            "name": "scgpt",
            "served_entities": [
                {"name": "scgpt-3", "entity_name": MODEL, "entity_version": "3", "workload_type": "GPU_SMALL",
                 "workload_size": "Small", "scale_to_zero_enabled": True}
            ],
            "traffic_config": {"routes": [{"served_entity_name": "scgpt-3", "traffic_percentage": 100}]},
        },
        "ai_gateway": {
            "inference_table_config": {
                "catalog_name": "main", "schema_name": "lab", "table_name_prefix": "scgpt", "enabled": True}
        },
    }  # fmt: skip


@pytest.mark.parametrize("flags", [(), ("--plan",)])
def test_person_does_not_create_an_endpoint(deploy, workspace, flags):
    workspace.user = "ann@lab.org"
    code, _, err = deploy("/3", *flags)
    assert (code, workspace.endpoints) == (WRONG_USAGE, {})
    assert "would run as ann@lab.org for ever" in err and "log in as a service principal" in err


def test_person_may_create_an_endpoint_of_their_own(deploy, workspace):
    workspace.user = "ann@lab.org"
    assert deploy("/3", "--allow-user")[0] == OK and serving(workspace) == {"3": 100}


def test_person_may_change_an_endpoint_of_a_service_principal(deploy, deployed, workspace):
    workspace.user = "ann@lab.org"
    assert deploy("/4")[0] == OK and serving(workspace) == {"4": 100}


def test_second_run_changes_nothing(deploy, deployed, workspace):
    code, summary, _ = deploy()
    assert (code, summary["state"], summary["changes"]) == (OK, "READY", [])
    assert workspace.changes == []


def test_plan_lists_changes_and_applies_none(deploy, workspace):
    code, summary, _ = deploy("@champion", "--plan")
    assert (code, summary["state"], workspace.endpoints, workspace.changes) == (OK, "NOT_THERE", {}, [])
    assert "create endpoint scgpt" in summary["changes"][0] and TABLE in summary["changes"][0]
    deploy()
    workspace.requests.clear()
    _, summary, _ = deploy("@challenger", "--plan", "--workload-type", "CPU")
    assert workspace.changes == [] and serving(workspace) == {"3": 100}
    for said in ("serve scgpt-4: version 4", "on CPU Small", "stop serving scgpt-3", "traffic scgpt-4 100 %"):
        assert said in summary["changes"][0]


def test_old_version_serves_until_the_new_one_is_ready(deploy, deployed, workspace, caplog):
    workspace.polls = 5
    with caplog.at_level("INFO"):
        code, summary, _ = deploy("@challenger")
    assert (code, summary["traffic"], serving(workspace)) == (OK, {"scgpt-4": 100}, {"4": 100})
    body = workspace.last_body("PUT", "/config")  # one call: the service itself swaps without a gap
    assert [e["entity_version"] for e in body["served_entities"]] == ["4"]
    assert workspace.changes == [("PATCH", f"{ENDPOINTS}/scgpt/tags"), ("PUT", f"{ENDPOINTS}/scgpt/config")]
    assert "IN_PROGRESS, scgpt-4 creating (Creating container)" in caplog.text


def test_settings_of_others_survive_a_swap(deploy, deployed, workspace):
    kept = {"environment_vars": {"SCGPT_BATCH_ATTENTION": "sdpa"}, "instance_profile_arn": "arn:x"}
    deployed["config"]["served_entities"][0] |= kept
    deployed["ai_gateway"]["rate_limits"] = [{"calls": 5, "renewal_period": "minute"}]
    deploy("@challenger", "--inference-table", "main.lab.other_payload")
    assert {key: entity(workspace, "4")[key] for key in kept} == kept
    assert deployed["ai_gateway"]["rate_limits"] == [{"calls": 5, "renewal_period": "minute"}]


def test_canary_gets_its_share_then_all_traffic(deploy, deployed, workspace):
    canary = ("@challenger", "--traffic", "old=90,new=10")
    assert deploy(*canary)[1]["traffic"] == {"scgpt-3": 90, "scgpt-4": 10}
    assert serving(workspace) == {"3": 90, "4": 10}
    assert deploy(*canary)[1]["changes"] == []
    assert deploy("@challenger", "--traffic", "new=50,old=50")[0] == OK and serving(workspace) == {"3": 50, "4": 50}
    assert deploy("@challenger")[0] == OK and serving(workspace) == {"4": 100}


@pytest.mark.parametrize("before", [("@challenger", "--traffic", "old=90,new=10"), ("@challenger",)],
                         ids=["of a canary", "of a swap"])  # fmt: skip
def test_rollback_restores_version_and_compute(deploy, deployed, workspace, before):
    deploy(*before, "--workload-size", "Medium")
    size = entity(workspace, "3" if "--traffic" in before else "4")["workload_size"]
    code, summary, _ = deploy("", "--rollback")
    assert (code, summary["version"], serving(workspace)) == (OK, "3", {"3": 100})
    assert entity(workspace, "3")["workload_size"] == size
    assert deploy("", "--rollback")[1]["changes"] == []


def test_rollback_and_canary_need_an_earlier_version(deploy, deployed, workspace):
    code, _, err = deploy("", "--rollback")
    assert code == WRONG_USAGE and "no record of an earlier version" in err
    code, _, err = deploy("@champion", "--traffic", "old=90,new=10")
    assert code == WRONG_USAGE and "serves no other version than 3" in err
    assert workspace.changes == []


def test_inference_table_can_be_changed_and_disabled(deploy, deployed, workspace):
    code, summary, _ = deploy("@champion", "--inference-table", "main.logs.requested_payload")
    assert (code, summary["inference_table"]) == (OK, "main.logs.requested_payload")
    assert deployed["ai_gateway"]["inference_table_config"]["table_name_prefix"] == "requested"
    assert deploy()[1]["inference_table"] == "main.logs.requested_payload"  # kept where none is named
    assert deploy("@champion", "--inference-table", "none")[1]["inference_table"] is None
    assert deployed["ai_gateway"]["inference_table_config"]["enabled"] is False
    assert deploy("@champion", "--inference-table", "none")[1]["changes"] == []


def test_usage_tracking_is_optional(deploy, deployed):
    assert "usage_tracking_config" not in deployed["ai_gateway"]
    assert deploy("@champion", "--usage-tracking")[1]["changes"] == ["track usage"]
    assert deployed["ai_gateway"]["usage_tracking_config"] == {"enabled": True}
    assert deploy("@champion", "--usage-tracking")[1]["changes"] == []


def test_existing_table_is_rejected(deploy, workspace):
    workspace.tables = {"main.lab.mine_payload"}
    code, _, err = deploy("@champion", "--inference-table", "main.lab.mine_payload")
    assert code == WRONG_USAGE and "main.lab.mine_payload exists" in err and workspace.endpoints == {}


def test_legacy_inference_table_is_replaced(deploy, deployed, workspace):
    legacy = {"catalog_name": "main", "schema_name": "lab", "table_name_prefix": "scgpt", "enabled": True}
    deployed["config"]["auto_capture_config"] = legacy
    del deployed["ai_gateway"]
    _, summary, _ = deploy("@champion", "--plan")
    assert "switch off the legacy inference table main.lab.scgpt_payload" in summary["changes"][0]
    assert "it stays" in summary["changes"][0] and summary["inference_table"] == "main.lab.scgpt_gateway_payload"
    code, summary, _ = deploy()
    assert code == OK and deployed["config"]["auto_capture_config"]["enabled"] is False
    assert deployed["ai_gateway"]["inference_table_config"]["table_name_prefix"] == "scgpt_gateway"
    assert serving(workspace) == {"3": 100}
    assert deploy()[1]["changes"] == []


def test_query_permission_is_granted(deploy, workspace):
    who = ("--can-query", "analysts", "ann@lab.org", "01234567-89ab-cdef-0123-456789abcdef")
    assert deploy("@champion", *who)[0] == OK
    entries = workspace.permissions["id-of-scgpt"]
    assert [next(iter(line.items())) for line in entries] == [
        ("group_name", "analysts"), ("user_name", "ann@lab.org"),
        ("service_principal_name", "01234567-89ab-cdef-0123-456789abcdef")]  # fmt: skip
    assert {level["permission_level"] for line in entries for level in line["all_permissions"]} == {"CAN_QUERY"}
    assert deploy("@champion", *who)[1]["changes"] == []


def test_update_in_progress_is_waited_for(deploy, deployed, workspace):
    workspace.polls = 3
    body = {"served_entities": [{"entity_name": MODEL, "entity_version": "4", "workload_size": "Small"}]}
    body["served_entities"][0]["name"] = "scgpt-4"
    workspace.update_config("scgpt", body)
    assert deploy("/5")[0] == OK and serving(workspace) == {"5": 100}


# What goes wrong


@pytest.mark.parametrize("fault", [
    Fault("POST", f"{ENDPOINTS}$", 429, "RESOURCE_EXHAUSTED", times=2),
    Fault("POST", f"{ENDPOINTS}$", 503, "TEMPORARILY_UNAVAILABLE"),
    Fault("POST", f"{ENDPOINTS}$", 503, "TEMPORARILY_UNAVAILABLE", after=True),
    Fault("GET", f"{ENDPOINTS}/scgpt$", 429, "RESOURCE_EXHAUSTED", times=2),
], ids=["busy", "away", "answer lost", "busy while waiting"])  # fmt: skip
def test_busy_workspace_is_retried(deploy, workspace, fault):
    workspace.faults = [fault]
    assert deploy()[0] == OK and serving(workspace) == {"3": 100} and fault.times == 0
    assert deploy()[1]["changes"] == []


def test_endpoint_created_concurrently_is_updated(deploy, workspace, monkeypatch):
    def create_second(workspace, body):
        theirs = deepcopy(body)
        theirs["config"]["served_entities"][0]["entity_version"] = "2"
        workspace.create(theirs)
        return workspace.create(body)

    routes = [(m, p, create_second if h is Workspace.create else h) for m, p, h in databricks_workspace.ROUTES]
    monkeypatch.setattr(databricks_workspace, "ROUTES", routes)
    assert deploy()[0] == OK and serving(workspace) == {"3": 100}


def test_rerun_completes_after_a_busy_workspace(deploy, deployed, workspace):
    workspace.faults = [Fault("PUT", "/config$", 503, "TEMPORARILY_UNAVAILABLE", "try later", times=99)]
    code, _, err = deploy("@challenger", "--retry-seconds", "1")
    assert code == FAILED and "TEMPORARILY_UNAVAILABLE: try later" in err and "again later" in err
    assert serving(workspace) == {"3": 100}
    workspace.faults = []
    assert deploy("@challenger")[0] == OK and serving(workspace) == {"4": 100}
    assert deploy("", "--rollback")[0] == OK and serving(workspace) == {"3": 100}


def test_failed_deployment_keeps_the_old_version(deploy, deployed, workspace):
    workspace.failing = {"4"}
    code, _, err = deploy("@challenger")
    assert code == FAILED
    for said in ("version 4", "UPDATE_FAILED", "Container build failed", "no matching distribution for torch==0.0",
                 "version 3 (100 %) keeps serving"):  # fmt: skip
        assert said in err
    assert serving(workspace) == {"3": 100}
    code, summary, _ = deploy("/3")  # back to what is served: the failure is cleared
    assert (code, summary["state"]) == (OK, "READY")
    deploy("@challenger")
    workspace.failing = set()
    assert deploy("@challenger")[0] == OK and serving(workspace) == {"4": 100}


def test_failed_first_version_is_replaced(deploy, workspace):
    workspace.failing = {"3"}
    code, _, err = deploy()
    assert code == FAILED and "nothing is served" in err
    code, summary, _ = deploy("@challenger")
    assert (code, serving(workspace), summary["inference_table"]) == (OK, {"4": 100}, TABLE)


@pytest.mark.parametrize(("path", "method", "wanted"), [
    (f"{ENDPOINTS}$", "POST", "entitlement to create serving endpoints"),
    ("/unity-catalog/models/", "GET", "EXECUTE on the model"),
    ("/unity-catalog/tables/", "GET", "USE SCHEMA"),
    (f"{ENDPOINTS}/scgpt$", "GET", "CAN VIEW"),
], ids=["create", "model", "schema", "view"])  # fmt: skip
def test_missing_permission_is_named(deploy, workspace, path, method, wanted):
    workspace.faults = [Fault(method, path, 403, "PERMISSION_DENIED", "you may not")]
    code, _, err = deploy()
    assert code == WRONG_USAGE and "permission denied" in err and "you may not" in err and wanted in err
    assert workspace.endpoints == {}
    assert deploy()[0] == OK


@pytest.mark.parametrize(("path", "state"), [("/config$", {"3": 100}), ("/ai-gateway$", {"4": 100})])
def test_rerun_completes_after_a_missing_permission(deploy, deployed, workspace, path, state):
    workspace.faults = [Fault("PUT", path, 403, "PERMISSION_DENIED")]
    wanted = ("@challenger", "--inference-table", "main.logs.new_payload")
    code, _, err = deploy(*wanted)
    assert code == WRONG_USAGE and "CAN MANAGE" in err and serving(workspace) == state
    assert deploy(*wanted)[0] == OK and serving(workspace) == {"4": 100}
    assert deployed["ai_gateway"]["inference_table_config"]["schema_name"] == "logs"


def test_login_errors_say_how_to_log_in(deploy, workspace, monkeypatch):
    monkeypatch.setenv("DATABRICKS_TOKEN", "wrong")
    code, _, err = deploy()
    assert code == WRONG_USAGE and "databricks auth login" in err
    for name in ("DATABRICKS_TOKEN", "DATABRICKS_HOST"):
        monkeypatch.delenv(name)
    code, _, err = deploy()
    assert code == WRONG_USAGE and "databricks auth login" in err and "wrong" not in err


def test_slow_update_continues_after_the_timeout(deploy, deployed, workspace):
    workspace.polls = 1000
    code, _, err = deploy("@challenger", "--timeout-minutes", "0.001")
    assert code == FAILED and "still IN_PROGRESS after 0.001 min" in err and "run the same command again" in err
    deployed["left"] = 3
    workspace.requests.clear()
    assert deploy("@challenger")[1]["changes"] == [] and serving(workspace) == {"4": 100}


def test_endpoint_of_another_model_is_rejected(deploy, deployed, workspace):
    workspace.add_model("main.lab.other", 1)
    deployed["config"]["served_entities"][0]["entity_name"] = "main.lab.other"
    code, _, err = deploy()
    assert code == WRONG_USAGE and "serves main.lab.other" in err and workspace.changes == []


@pytest.mark.parametrize(("flags", "wanted"), [
    (["--model-uri", "models:/scgpt@champion"], "catalog.schema.name"),
    (["--model-uri", "models:/main.lab.scgpt"], "catalog.schema.name"),
    (["--model-uri", "models:/main.lab.nothing@champion"], "main.lab.nothing"),
    (["--model-uri", "models:/main.lab.scgpt@nobody"], "'nobody'"),
    (["--model-uri", "models:/main.lab.scgpt/99"], "version 99"),
    (["--endpoint", "no good"], "no good"),
    (["--workload-type", "GPU_TINY"], "GPU_SMALL"),
    (["--workload-size", "Huge"], "Huge"),
    (["--traffic", "old=90,new=20"], "old=90,new=10"),
    (["--inference-table", "scgpt_payload"], "catalog.schema"),
    (["--rollback"], "either"),
], ids=lambda value: value[-1] if isinstance(value, list) else "")  # fmt: skip
def test_wrong_usage_changes_nothing(run, workspace, flags, wanted):
    base = {"--endpoint": "scgpt", "--model-uri": f"models:/{MODEL}@champion"}
    words = [word for pair in base.items() if pair[0] not in flags for word in pair]
    code, _, err = run("deploy", *words, *flags)
    assert code != OK and wanted in err.strip().splitlines()[-1] and "Traceback" not in err
    assert workspace.endpoints == {}


def test_unready_version_is_rejected(deploy, workspace):
    workspace.models[MODEL]["versions"]["3"] = "FAILED_REGISTRATION"
    code, _, err = deploy()
    assert code == WRONG_USAGE and "FAILED_REGISTRATION" in err


def test_token_that_expires_during_an_update_is_reported(deploy, deployed, workspace):
    workspace.polls, workspace.expires_after = 50, 12
    code, _, err = deploy("@challenger")
    assert code == WRONG_USAGE and "rejects the access token (Invalid access token)" in err and "auth login" in err
    workspace.polls, workspace.expires_after = 1, None  # after a new login, the same command completes the update
    deployed["left"] = 1
    assert deploy("@challenger")[0] == OK and serving(workspace) == {"4": 100}


def test_throttled_request_waits_as_long_as_the_workspace_asks(deploy, workspace):
    workspace.faults = [Fault("POST", f"{ENDPOINTS}$", 429, "RESOURCE_EXHAUSTED", retry_after=2)]
    began = time.monotonic()
    assert deploy()[0] == OK
    assert time.monotonic() - began >= 2


# Status


def test_status_has_state_versions_logs_and_metrics(run, deploy, deployed, workspace):
    deploy("@challenger", "--traffic", "old=90,new=10")
    workspace.failing = {"5"}
    deploy("/5")
    workspace.requests.clear()
    code, summary, _ = run("status", "--endpoint", "scgpt")
    assert (code, summary["state"], summary["inference_table"]) == (OK, "UPDATE_FAILED", TABLE)
    assert [(line["version"], line["traffic"], line["state"]) for line in summary["served"]] == [
        ("3", 90, "ready"), ("4", 10, "ready")]  # fmt: skip
    assert [(line["version"], line["state"]) for line in summary["pending"]] == [
        ("5", "failed (Container build failed)")
    ]
    assert summary["build_log"]["scgpt-5"].startswith("ERROR") and summary["build_log"]["scgpt-3"] == "#2 done"
    assert summary["server_log"]["scgpt-3"] == "INFO model opened on cuda"
    assert summary["metrics"]["request_count_total"] == {"scgpt-3": 120}
    assert summary["metrics"]["request_latency_ms_sum"] == {"scgpt-3": 15600}
    assert not any("bucket" in name for name in summary["metrics"])
    assert workspace.changes == []


def test_status_says_if_a_gpu_is_not_used(run, deployed, workspace):
    assert run("status", "--endpoint", "scgpt")[1]["gpu_problem"] == {}
    line = f"{GPU_UNUSABLE} (torch 2.13: no driver): the model runs on the CPU"
    workspace.server_log = f"{line}\nINFO ready"
    _, summary, _ = run("status", "--endpoint", "scgpt")
    assert summary["gpu_problem"] == {"scgpt-3": line} and summary["server_log"] == {"scgpt-3": "INFO ready"}


def test_status_of_a_missing_endpoint(run, workspace):
    code, _, err = run("status", "--endpoint", "nobody")
    assert code == WRONG_USAGE and "no endpoint 'nobody'" in err


def test_status_works_without_metrics_and_logs(run, deployed, workspace):
    workspace.faults = [Fault("GET", "/metrics$", 404, "RESOURCE_DOES_NOT_EXIST"),
                        Fault("GET", "logs$", 404, "RESOURCE_DOES_NOT_EXIST", times=2)]  # fmt: skip
    code, summary, _ = run("status", "--endpoint", "scgpt")
    assert (code, summary["metrics"], summary["build_log"], summary["server_log"]) == (
        OK,
        {},
        {"scgpt-3": ""},
        {"scgpt-3": ""},
    )


def test_status_includes_health_of_the_tables(run, spark, deployed, tmp_path, monkeypatch):
    from scgpt_batch.spark import tables

    until = datetime.now(UTC) - timedelta(hours=2)
    lines = inference_tables.requests(400, until=until, days=2)
    table = inference_tables.write(spark, lines, f"delta.`{tmp_path}/payload`")
    tables.create(spark, f"delta.`{tmp_path}/runs`", tables.RUNS)
    spark.sql(f"insert into delta.`{tmp_path}/runs` (run_id, started_at, finished_at, status, output_table) "
              f"values ('run-1', now(), now(), 'failed', '')")  # fmt: skip
    monkeypatch.setenv("SCGPT_BATCH_WEBHOOK_URL", "http://127.0.0.1:9/nothing-may-be-posted")
    flags = ("--inference-table", table, "--runs-table", f"delta.`{tmp_path}/runs`")
    code, summary, _ = run("status", "--endpoint", "scgpt", *flags)
    assert (code, summary["health"]["status"], summary["health"]["last_run"]) == (OK, "critical", "run-1")
    rules = {alert["rule"] for alert in summary["health"]["alerts"]}
    assert {"error_rate", "run_failed"} <= rules and "webhook" not in rules


# docs/databricks.md


def sections(*titles):
    """Code blocks of the document's sections: (language, text), in order."""
    text = (REPO / "docs/databricks.md").read_text()
    text = re.sub(r"main\.scgpt\.", "main.lab.", text)  # the schema of these tests
    text = re.sub(r"""(schema_name"?[=:] ?)"scgpt\"""", r'\1"lab"', text)
    chosen = [part for part in re.split(r"^## ", text, flags=re.MULTILINE) if part.split("\n")[0] in titles]
    assert len(chosen) == len(titles)
    return [block for part in chosen for block in re.findall(r"^```(\w+)\n(.*?)^```", part, re.MULTILINE | re.DOTALL)]


def bash(script, folder):
    done = subprocess.run(["bash", "-ec", script], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_commands_of_the_documentation_work(run, workspace, monkeypatch):
    monkeypatch.setenv("SCGPT_BATCH_POLL_SECONDS", "0.01")
    blocks = sections("Deploy, swap, canary, roll back", "Status")
    lines = [line for _, text in blocks for line in text.splitlines()]
    runs = [run(*shlex.split(line)[1:]) for line in lines]
    assert [code for code, _, _ in runs] == [OK] * 6
    assert [list(summary["traffic"].values()) for _, summary, _ in runs[:5]] == [[100], [100], [90, 10], [100], [100]]
    assert runs[5][1]["served"][0]["version"] == "3"


@pytest.mark.parametrize(("language", "text"), sections("Other ways to create an endpoint"), ids=lambda text: text[:20])
def test_deploy_continues_from_other_tools(deploy, workspace, tmp_path, language, text):
    exec(text, {}) if language == "python" else bash(text, tmp_path)
    workspace.requests.clear()
    code, summary, _ = deploy("/3")
    assert (code, summary["state"], summary["changes"], summary["inference_table"]) == (OK, "READY", [], TABLE)


@pytest.mark.parametrize(
    ("language", "text"),
    sections("The inference table of an endpoint that exists"),
    ids=["SDK", "MLflow", "REST"],
)
def test_inference_table_is_switched_on_later(deploy, workspace, tmp_path, language, text):
    assert deploy("/3", "--inference-table", "none")[1]["inference_table"] is None
    exec(text, {}) if language == "python" else bash(text, tmp_path)
    code, summary, _ = deploy("/3")
    assert (code, summary["changes"], summary["inference_table"]) == (OK, [], TABLE)


def test_every_client_gets_the_same_embeddings(deploy, deployed, workspace, model, golden, tmp_path, monkeypatch):
    served = mlflow.pyfunc.load_model(model)
    schema = served.metadata.get_input_schema()

    def predict(body):
        return json.loads(scoring_server.invocations(json.dumps(body), "application/json", served, schema).response)

    workspace.predict = predict
    monkeypatch.chdir(tmp_path)
    names = {"adata": from_row(next(small_rows(1, golden)))}
    answers = []
    for language, text in sections("Ways to send a request"):
        if language == "python":
            exec(text, names)
            answers.append(names.pop("answer", None))
        elif language == "sh":
            answers.append(bash(text, tmp_path)["predictions"])
    given = [answer[0]["cell_embeddings"] for answer in answers if answer]
    assert len(given) == 4
    for vectors in [*given, np.stack(names["cells"]["embedding"])]:
        assert_close(vectors, given[0], atol=1e-6)
    assert np.shape(given[0]) == (3, 64)
