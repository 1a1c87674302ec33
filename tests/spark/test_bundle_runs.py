"""The bundle's jobs, dashboard queries and alerts, run from its own files as Workflows and a SQL warehouse would.

Unity Catalog is replaced by Spark's own catalog (`spark_catalog.schema.table`) and MLflow on sqlite.
"""

import importlib
import json
import operator
import sys
import tomllib
from datetime import UTC, date, datetime, timedelta

import mlflow
import pytest
from pyspark.sql import functions as F

from scgpt_batch.monitoring import queries, rules
from scgpt_batch.monitoring.monitor import SAMPLE, TABLE_ROWS, HealthCheck
from scgpt_batch.settings import MonitorSettings
from tests import billing_tables, inference_tables
from tests import databricks_bundle as bundles
from tests.helpers import name_version
from tests.paths import REPO

CATALOG = "spark_catalog"


def run_job(job, **parameters):
    """Run a job's wheel tasks in order, each through its entry point; return each task's summary."""
    scripts = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]
    summaries = {}
    for task in bundles.in_order(job):
        module, _, function = scripts[task["python_wheel_task"]["entry_point"]].partition(":")
        entry_point = getattr(importlib.import_module(module), function)
        with pytest.MonkeyPatch.context() as patch:
            said = []
            patch.setattr(sys, "argv", ["scgpt-batch", *bundles.task_words(job, task, **parameters)])
            patch.setattr("builtins.print", lambda text="", said=said, **_: said.append(text))
            entry_point()  # a failure is a SystemExit
        summaries[task["task_key"]] = json.loads(said[-1])
    return summaries


@pytest.fixture(scope="module")
def workspace(spark, home, pbmc3k):
    """The bundle in prod, with a model in its registry, cells in its volume, and a week of the endpoint's requests."""
    resources = bundles.resolved("prod", catalog=CATALOG, schema="scgpt")
    spark.sql("create schema scgpt")
    mlflow.create_experiment(resources["experiments"]["runs"]["name"], artifact_location=str(home / "artifacts"))
    name_version(f"{CATALOG}.scgpt.scgpt", "1", "champion")
    for name, cells in (("one", pbmc3k[:200]), ("two", pbmc3k[200:400])):
        cells.write_h5ad(home / f"{name}.h5ad")
    now, minutes = datetime.now(UTC), range(0, 8 * 24 * 60, 2)
    lines = inference_tables.requests(len(minutes), until=now).assign(sampling_fraction=1.0)
    lines["request_time"] = [now - timedelta(minutes=one) for one in minutes]
    lines["request_date"] = [time.date() for time in lines["request_time"]]
    lines.loc[:1, "request_date"] = now.date() - timedelta(days=91)
    lines["status_code"], lines["execution_duration_ms"], lines["served_entity_id"] = 200, 100, "scgpt-1"
    inference_tables.write(spark, lines, "scgpt.scgpt_payload")
    billing_tables.write(spark, "scgpt", now.replace(hour=1))
    return resources


@pytest.fixture(scope="module")
def night(workspace, home):
    """The summaries of the nightly job's tasks."""
    return run_job(workspace["jobs"]["nightly"], input=str(home / "*.h5ad"))


@pytest.fixture(scope="module")
def week(workspace, night):
    """The summaries of the retention job, run after the nightly job."""
    return run_job(workspace["jobs"]["retention"])


def test_nightly_job_embeds_and_monitors(spark, night):
    assert (night["ingest"]["rows"], night["ingest"]["cells"]) == (2, 400)
    for mode in ("static", "contextual"):
        summary = night[f"embed_{mode}"]
        assert (summary["mode"], summary["rows_ok"], summary["rows_failed"], summary["model_version"]) == (
            mode,
            2,
            0,
            "1",
        )
        lines = spark.table("scgpt.gene_embeddings").where(F.col("mode") == mode)
        assert lines.count() == summary["embeddings"] > 500
    cells = night["embed_cells"]
    assert (cells["mode"], cells["rows_ok"], cells["embeddings"]) == ("cell", 2, 400)
    assert spark.table("scgpt.cell_embeddings").count() == spark.table("scgpt.cell_search").count() == 400
    static = spark.table("scgpt.gene_embeddings").where("mode = 'static'").select("gene")
    assert spark.table("scgpt.gene_search").count() == static.distinct().count()
    assert spark.table("scgpt.gene_embeddings_runs").count() == 3
    assert night["maintain"]["tables"] == [f"{CATALOG}.scgpt.gene_embeddings{end}" for end in ("", "_ledger", "_runs")]
    assert (night["monitor"]["status"], night["monitor"]["last_run"]) == ("ok", night["embed_contextual"]["run_id"])
    assert night["monitor_cells"]["status"] == "ok"
    (detail,) = spark.sql("describe detail scgpt.gene_embeddings").collect()
    assert detail["clusteringColumns"] == ["gene"]


def test_retention_job_deletes_old_requests(spark, week):
    """The oldest of the fixture's requests are eight days old; two more are older than the retention."""
    assert week["requests"]["rows_deleted"] == 2
    assert spark.table("scgpt.scgpt_payload").where("request_date < date_sub(current_date(), 90)").isEmpty()


# The dashboard

DASHBOARD = json.loads((bundles.BUNDLE / "health.lvdash.json").read_text(encoding="utf-8"))
WIDGETS = [placed["widget"] for page in DASHBOARD["pages"] for placed in page["layout"]]


def chosen(parameter):
    """The value that the dashboard passes by default."""
    (one,) = parameter["defaultSelection"]["values"]["values"]
    if parameter["dataType"] == "INTEGER":
        return int(one["value"])
    if parameter["dataType"] == "DATE":
        days = one["value"].removeprefix("now").removesuffix("/d").removesuffix("d")
        return date.today() + timedelta(days=int(days or 0))
    return one["value"]


@pytest.fixture
def in_schema(spark):
    """Make the dashboard's schema the current one."""
    spark.sql("use scgpt")
    yield
    spark.sql("use default")


@pytest.mark.parametrize("dataset", DASHBOARD["datasets"], ids=lambda one: one["name"])
def test_data_set_has_the_columns_of_its_widgets(spark, week, in_schema, dataset):
    values = {one["keyword"]: chosen(one) for one in dataset["parameters"]}
    billing = {"usage": "usage", "prices": "list_prices"}
    assert all(values[name] == f"system.billing.{table}" for name, table in billing.items() if name in values)
    values |= {name: table for name, table in billing.items() if name in values}
    answer = spark.sql("".join(dataset["queryLines"]), args=values)
    queries = [query["query"] for widget in WIDGETS for query in widget["queries"]]
    fields = [
        field for query in queries if query["datasetName"] == dataset["name"] for field in query.get("fields", [])
    ]
    assert fields and {field["name"] for field in fields} <= set(answer.columns)
    assert all(field["expression"] == f"`{field['name']}`" for field in fields)
    empty = {"errors", "slow_requests", "failed_rows", "gene_drift"}  # nothing failed, and there is one version
    assert answer.isEmpty() == (dataset["name"] in empty)


@pytest.mark.parametrize("widget", WIDGETS, ids=lambda one: one["name"])
def test_widget_shows_the_fields_it_queries(widget):
    """Each field of its encodings is in its query, or is a parameter of the data set."""
    parameters = {one["name"]: {p["keyword"] for p in one["parameters"]} for one in DASHBOARD["datasets"]}
    shown = set(names_of("fieldName", widget["spec"]["encodings"]))
    queries = [query["query"] for query in widget["queries"]]
    assert shown == {field["name"] for query in queries for field in query.get("fields", [])}
    for query in queries:
        assert {one["keyword"] for one in query.get("parameters", [])} <= parameters[query["datasetName"]]
    assert shown or set(names_of("parameterName", widget["spec"]["encodings"])) == {"since"}


def names_of(key, node):
    """Every value of a key, at any depth."""
    if isinstance(node, list):
        return [name for one in node for name in names_of(key, one)]
    if not isinstance(node, dict):
        return []
    here = [node[key]] if key in node else []
    return here + [name for one in node.values() for name in names_of(key, one)]


def test_cost_counts_the_projects_tags_at_the_price_of_the_time(spark, week):
    tables = {"usage": "scgpt.usage", "prices": "scgpt.list_prices"}
    given = {**tables, "since": datetime.now(UTC).date(), "project": "scgpt"}
    cost = {row["component"]: row for row in queries.run(spark, "cost", **given).collect()}
    assert {name: (row["product"], float(row["dbus"]), float(row["list_cost"])) for name, row in cost.items()} == {
        "nightly": ("JOBS", 20.0, 10.0), "endpoint": ("MODEL_SERVING", 3.0, pytest.approx(0.3)),
    }  # fmt: skip
    (line,) = queries.run(spark, "cells_per_dollar", **given, runs="scgpt.gene_embeddings_runs").collect()
    assert (line["cells"], float(line["cells_per_dollar"])) == (1200, 120.0)  # 400 cells in three modes


# The alerts

COMPARE = {"GREATER_THAN": operator.gt, "LESS_THAN": operator.lt, "EQUAL": operator.eq, "NOT_EQUAL": operator.ne}


def firing(spark, schema):
    """The names of the bundle's alerts that a warehouse would trigger."""
    fired = set()
    for name, alert in bundles.resolved("prod", catalog=CATALOG, schema=schema)["alerts"].items():
        judged = alert["evaluation"]
        rows = spark.sql(alert["query_text"]).select(judged["source"]["name"]).collect()
        assert len(rows) <= 1 and (not rows or rows[0][0] is not None), name
        (threshold,) = judged["threshold"]["value"].values()
        if rows and COMPARE[judged["comparison_operator"]](rows[0][0], threshold):
            fired.add(name)
        if not rows and judged["empty_result_state"] == "TRIGGERED":
            fired.add(name)
    return fired


def fired_rules(spark, schema):
    """The names of the rules that fire in `monitor`."""
    settings, now = MonitorSettings(), datetime.now(UTC)
    health = HealthCheck(spark, settings, now)
    requests = queries.requests_view(spark, f"{schema}.scgpt_payload")
    health.run("endpoint_health", requests=requests, since=health.window)
    arrived = now - timedelta(minutes=settings.delay_minutes)
    health.run("traffic", requests=requests, since=health.history, until=arrived)
    health.run("version_days", requests=requests, since=health.history)
    health.run("last_runs", runs=f"{schema}.gene_embeddings_runs", limit=TABLE_ROWS)
    health.run("collapse_genes", embeddings=f"{schema}.gene_embeddings", since=health.history, sample=SAMPLE)
    found = {alert.rule for alert in rules.check(health.results, settings, now) if alert.severity != "info"}
    cells = HealthCheck(spark, settings, now)
    cells.run("collapse_cells", embeddings=f"{schema}.cell_embeddings", since=cells.history, sample=SAMPLE)
    return found | ({"collapse_cells"} if rules.check(cells.results, settings, now) else set())


IN_NINE = "pmod(xxhash64(databricks_request_id), 9) = 0"
EARLIER = f"request_time < timestamp '{datetime.now(UTC) - timedelta(hours=3):%Y-%m-%d %H:%M:%S}'"
RUNS = "from scgpt.gene_embeddings_runs"
# Changes to the healthy tables, and the rules that then fire.
STATES = {
    "healthy": (  # while a run is going on
        {"gene_embeddings_runs": f"select * except (status), if(mode = 'static', status, 'running') as status {RUNS}"},
        set(),
    ),
    "sick": (
        {
            "scgpt_payload": f"""select * except (status_code, execution_duration_ms, served_entity_id),
                if({IN_NINE}, 500, 200) as status_code, 20000L as execution_duration_ms,
                if(pmod(xxhash64(databricks_request_id), 2) = 0, 'scgpt-1', 'scgpt-2') as served_entity_id
                from scgpt.scgpt_payload where {EARLIER} or {IN_NINE}""",
            "gene_embeddings_runs": f"""select * except (rows_failed, status), 1 as rows_failed,
                if(mode = 'static', status, 'failed') as status {RUNS}""",
            **{
                f"{kind}_embeddings": f"""select * except (embedding), array(1f, 2f) as embedding
                from scgpt.{kind}_embeddings"""
                for kind in ("gene", "cell")
            },
        },
        {"error_rate", "p95", "versions", "volume", "run_failed", "rows_failed", "collapse", "collapse_cells"},
    ),
    "dead": (
        {
            "scgpt_payload": f"select * from scgpt.scgpt_payload where {EARLIER}",
            "gene_embeddings_runs": f"""select * except (started_at, finished_at),
                started_at - interval 3 days as started_at, finished_at - interval 3 days as finished_at {RUNS}""",
        },
        {"volume", "run_late"},
    ),
    "new": (
        {
            "scgpt_payload": "select * from scgpt.scgpt_payload where false",
            "gene_embeddings_runs": f"select * {RUNS} where false",
            "gene_embeddings": "select * from scgpt.gene_embeddings where false",
        },
        {"run_late"},
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_sql_alerts_fire_like_monitor(spark, week, state):
    changes, broken = STATES[state]
    spark.sql(f"create schema {state}")
    for table in ("scgpt_payload", "gene_embeddings_runs", "gene_embeddings", "cell_embeddings"):
        spark.sql(f"create view {state}.{table} as {changes.get(table, f'select * from scgpt.{table}')}")
    assert firing(spark, state) == broken
    assert fired_rules(spark, state) == broken
