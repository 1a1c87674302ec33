"""Results of the commands: the keys of the JSON line, which users script against, and the lines for people."""

import json
from dataclasses import FrozenInstanceError

import pytest

from scgpt_batch.cli.commands import RegisterResult
from scgpt_batch.cli.demo import DemoCheckpointResult
from scgpt_batch.cli.summary import SummaryResult
from scgpt_batch.databricks.deploy import DeployResult
from scgpt_batch.databricks.status import StatusResult
from scgpt_batch.monitoring.monitor import EndpointFigures, LastRun, MonitorResult
from scgpt_batch.monitoring.rules import Alert
from scgpt_batch.promotion.promotion import Check, PromoteResult
from scgpt_batch.serving.app import ServeResult
from scgpt_batch.spark.capacity import CALCULATED, capacity
from scgpt_batch.spark.embed import EmbedResult
from scgpt_batch.spark.ingest import IngestResult
from scgpt_batch.spark.maintain import MaintainResult
from scgpt_batch.spark.plan import EmbedPlan

ALERT = Alert("error_rate", "critical", "9.0% of 100 requests ended in a server error", 0.09, 0.05)
MONITOR = MonitorResult(
    exit_code=4, status="critical", alerts=[ALERT], endpoint=EndpointFigures(100, 0.09, 1, 9, 20.0, ["scgpt-3"]),
    batch=LastRun("r1", "finished"), report="health.html",
)  # fmt: skip
SERVED = {"name": "scgpt-3", "version": "3", "workload": "CPU Small", "state": "ready", "traffic": 100}

# (result, keys of its JSON line, words of its lines)
RESULTS = {
    "demo-checkpoint": (
        DemoCheckpointResult(checkpoint="c", genes=3, genes_with_signal=2, note="NOT the published weights"),
        "checkpoint genes genes_with_signal note",
        ["c: 3 genes, 2 with", "NOT the published"],
    ),
    "ingest": (
        IngestResult(table="t", files_table="t_files", rows=1, cells=2700, rows_skipped=2, rows_removed=0, files=3,
                     files_unchanged=1, files_failed=1),
        "table files_table rows cells rows_skipped rows_removed files files_unchanged files_failed",
        ["3 files with 2,700 cells", "1 row written to t", "1 file failed", "t_files"],
    ),
    "register": (
        RegisterResult(model_uri="models:/m/1", version="1", checkpoint_digest="ab"),
        "model_uri version checkpoint_digest",
        ["models:/m/1", "ab"],
    ),
    "embed": (
        EmbedResult(run_id="r", mode="cell", model_uri="models:/m/1", model_version="1", rows_in=9, rows_ok=5,
                    rows_failed=1, rows_skipped=3, rows_removed=0, cells=50, embeddings=50, warnings={"low": 2},
                    seconds=1.0, output_table="t", ledger_table="t_ledger"),
        "run_id mode model_uri model_version rows_in rows_ok rows_failed rows_skipped rows_removed cells embeddings "
        "warnings seconds output_table ledger_table",
        ["5 rows embedded, 1 failed, 3 skipped", "50 embeddings", "t_ledger", "warning: low (2 rows)"],
    ),
    "embed --plan": (
        EmbedPlan(mode="cell", model_uri="models:/m/1", model_version="1", rows_in=9, rows=6, rows_skipped=3,
                  rows_removed=0, cells=50, waves=1, partitions=2, largest_row_cells=9, worker_memory_mb=900,
                  seconds_expected=None, output_bytes=2_000_000,
                  capacity=[capacity("8 × H100", 40_000, CALCULATED)]),
        "mode model_uri model_version rows_in rows rows_skipped rows_removed cells waves partitions largest_row_cells "
        "worker_memory_mb seconds_expected output_bytes capacity",
        ["plan only", "6 rows with 50 cells", "1 wave", "2.0 MB of output", "time expected: unknown", "8 × H100",
         "4.2 min", "calculated, not measured", "--dtype bfloat16"],
    ),
    "serve": (
        ServeResult(model_uri="models:/m/1", requests=1, logged=1),
        "model_uri requests logged",
        ["models:/m/1: 1 request, 1 in the inference table"],
    ),
    "summary": (
        SummaryResult(output_table="t", ledger_table="t_ledger", rows=1, cells=2, genes=3, embeddings=3, models=[],
                      nearest_genes={"A": [("B", 0.5)], "c": []}, similar_genes={"c": ": did you mean 'C'?"}),
        "output_table rows cells genes embeddings models nearest_genes",
        ["1 rows with 2 cells", "t_ledger", "B 0.50", "not among the genes of this table: did you mean 'C'?"],
    ),
    "monitor": (
        MONITOR,
        "status alerts requests error_rate client_errors server_errors p95_ms versions last_run last_run_status report",
        ["status: critical", "critical error_rate: 9.0%", "100 requests", "r1 (finished)", "health.html"],
    ),
    "maintain": (
        MaintainResult(table="t", tables=["t", "t_runs"], rows_deleted=1, files_compacted=12, files_written=2,
                       files_vacuumed=0),
        "table tables rows_deleted files_compacted files_written files_vacuumed",
        ["t, t_runs", "1 row deleted", "12 files compacted into 2"],
    ),
    "promote": (
        PromoteResult(exit_code=1, model="m", version="2", previous="1", promoted=False, refused=["latency"],
                      checks=[Check("latency", False, "3 times as slow")]),
        "model version previous checks refused promoted",
        ["FAILED  latency: 3 times as slow", "version 2 of m is not promoted; failed checks: latency"],
    ),
    "deploy": (
        DeployResult(endpoint="e", state="READY", model="a.b.c", version="3", traffic={"c-3": 100}, url="https://x",
                     inference_table=None, changes=[], plan=False, seconds=1.0),
        "endpoint state model version traffic inference_table url changes plan seconds",
        ["changed: nothing", "endpoint e: READY; a.b.c version 3; traffic: c-3 100 %", "inference table: none"],
    ),
    "status": (
        StatusResult(endpoint="e", state="READY", served=[SERVED], pending=[], build_log={"scgpt-3": "done"},
                     server_log={"scgpt-3": ""}, gpu_problem={"scgpt-3": "no driver"}, metrics={},
                     inference_table=None),
        "endpoint state served pending build_log server_log gpu_problem metrics inference_table",
        ["endpoint e: READY", "scgpt-3: 100 % of the traffic, CPU Small, ready",
         "build log of scgpt-3: done",
         "GPU of scgpt-3 is not used: no driver"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("result", "keys", "words"), RESULTS.values(), ids=RESULTS)
def test_json_line_has_the_keys_of_the_contract(result, keys, words):
    line = result.to_json()
    assert "\n" not in line and list(json.loads(line)) == keys.split()


@pytest.mark.parametrize(("result", "keys", "words"), RESULTS.values(), ids=RESULTS)
def test_lines_tell_people_the_main_figures(result, keys, words):
    text = "\n".join(result.lines())
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("result", [result for result, _, _ in RESULTS.values()], ids=RESULTS)
def test_results_are_frozen(result):
    with pytest.raises(FrozenInstanceError):
        result.exit_code = 1


def test_status_nests_the_health_of_the_tables():
    result, keys, _ = RESULTS["status"]
    values = {name: getattr(result, name) for name in keys.split()}
    health = json.loads(StatusResult(**values, health=MONITOR).to_json())["health"]
    assert health == json.loads(MONITOR.to_json()) and health["last_run"] == "r1"
