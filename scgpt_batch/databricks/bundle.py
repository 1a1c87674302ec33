"""What the Databricks bundle holds of monitoring: the dashboard, and an SQL alert for each rule of health.

Both are written from the files of `sql/` and the thresholds of `conf/monitor.yml`, so that dashboard, alerts and
`scgpt-batch monitor` ask and judge alike:  python -m scgpt_batch.databricks.bundle conf
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scgpt_batch.monitoring import queries
from scgpt_batch.monitoring.monitor import SAMPLE, SHOWN
from scgpt_batch.monitoring.page import CATEGORIES, SECTIONS
from scgpt_batch.settings import MonitorSettings

Json = dict[str, Any]

# What the parameters that name a table stand for: the tables of the bundle's jobs, in its schema.
TABLES = {
    "requests": "requests",
    "runs": "gene_embeddings_runs",
    "ledger": "gene_embeddings_ledger",
    "rows": "adata_rows",
    "embeddings": "gene_embeddings",
}
HERE = "${var.catalog}.${resources.schemas.scgpt.name}."
HOURLY, DAILY = "0 40 * * * ?", "0 0 7 * * ?"  # after the hourly job has made the view; after the night


# --- alerts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A rule of health as SQL: which question it judges, the value in its answer, and when that is too much.

    Attributes
    ----------
    select
        From `answer`, the question's answer: a column `value`, of several rows the one that counts.
    empty
        The state when there is no value: what the rule in `health` says then.
    """

    question: str
    title: str
    select: str
    operator: str
    threshold: float | str
    empty: str = "OK"


def rules(limits: MonitorSettings) -> dict[str, Rule]:
    """Return the rules of `health` by name."""
    late = _ago(limits.max_run_age_hours)
    return {
        "error_rate": Rule(
            "endpoint_health", "server errors", _share("server_errors", limits),
            "GREATER_THAN", limits.max_error_rate,
        ),
        "client_error_rate": Rule(
            "endpoint_health", "client errors", _share("client_errors", limits),
            "GREATER_THAN", limits.max_client_error_rate,
        ),
        "no_requests": Rule(
            "endpoint_health", "nobody asks", "select requests as value from answer",
            "EQUAL", 0, empty="TRIGGERED",
        ),
        "p95": Rule(
            "endpoint_health", "requests are slow", "select p95_ms as value from answer where p95_ms is not null",
            "GREATER_THAN", limits.max_p95_ms,
        ),
        "versions": Rule(
            "endpoint_health", "several versions answer", "select size(versions) as value from answer",
            "GREATER_THAN", 1,
        ),
        "volume": Rule(
            "traffic", "requests stay away",
            "select share_of_usual as value from (select * from answer order by hour desc limit 1)\n"
            f"where usual >= {limits.min_usual_requests:g}",
            "LESS_THAN", limits.min_volume,
        ),
        "run_failed": Rule(
            "last_runs", "the last run failed",
            f"select status as value from answer where status <> 'running' or started_at < {late}\n"
            "order by started_at desc limit 1",
            "NOT_EQUAL", "finished",
        ),
        "run_late": Rule(
            "last_runs", "no run has finished in time",
            "select timestampdiff(minute, max(finished_at), current_timestamp()) / 60 as value from answer\n"
            "where status = 'finished' having max(finished_at) is not null",
            "GREATER_THAN", limits.max_run_age_hours, empty="TRIGGERED",
        ),
        "rows_failed": Rule(
            "last_runs", "many rows failed",
            "select max(failed_fraction) as value from (\n"
            "    select\n"
            "        finished_at,\n"
            "        rows_failed / (rows_ok + rows_failed) as failed_fraction,\n"
            "        row_number() over (partition by mode order by started_at desc) as age\n"
            "    from answer where status = 'finished' and rows_ok + rows_failed > 0\n"
            f") where age = 1 and finished_at >= {late} having max(failed_fraction) is not null",
            "GREATER_THAN", limits.max_failed_fraction,
        ),
        "collapse": Rule(
            "collapse_genes", "the vectors of a run are all alike",
            "select max(if(distinct_vectors = 1, 1.0, mean_cosine)) as value from answer\n"
            "where sampled >= 2 and mean_cosine is not null having count(*) > 0",
            "GREATER_THAN", limits.max_cosine,
        ),
    }  # fmt: skip


def _share(errors: str, limits: MonitorSettings) -> str:
    return f"select {errors} / requests as value from answer where {errors} >= {limits.min_errors}"


def alert(name: str, rule: Rule, limits: MonitorSettings) -> Json:
    """Return the bundle's resource of a rule."""
    kind = "string_value" if isinstance(rule.threshold, str) else "double_value"
    return {
        "display_name": f"scGPT {name}: {rule.title}",
        "warehouse_id": "${var.warehouse_id}",
        "run_as": "${var.run_as}",
        "schedule": {
            "quartz_cron_schedule": HOURLY if "requests" in queries.parameters(rule.question) else DAILY,
            "timezone_id": "UTC",
        },
        "evaluation": {
            "source": {"name": "value"},
            "comparison_operator": rule.operator,
            "threshold": {"value": {kind: rule.threshold}},
            "empty_result_state": rule.empty,
            "notification": {"notify_on_ok": True, "subscriptions": [{"user_email": "${var.notify}"}]},
        },
        "query_text": _query(rule, limits),
    }


def _query(rule: Rule, limits: MonitorSettings) -> str:
    """Spell the question out, since an alert takes no parameters, and judge its answer."""
    since = limits.hours if rule.question == "endpoint_health" else 24 * limits.days
    values = {name: HERE + table for name, table in TABLES.items()} | {
        "since": _ago(since),
        "until": _ago(limits.delay_minutes / 60),
        "limit": str(SHOWN),
        "sample": str(SAMPLE),
    }
    return f"with answer as (\n{queries.filled(rule.question, **values)})\n{rule.select}\n"


def _ago(hours: float) -> str:
    return f"current_timestamp() - interval {round(60 * hours)} minutes"


# --- the dashboard --------------------------------------------------------------------------------

PAGES = {
    "Endpoint": (
        "endpoint_health", "traffic", "daily_performance", "errors", "versions", "requesters", "payloads",
        "slow_requests", "recent_requests",
    ),
    "Batch job": ("last_runs", "cells_per_second", "failed_rows", "coverage", "collapse_genes", "gene_drift"),
}  # fmt: skip
HEADINGS = {name: heading for name, (heading, _) in SECTIONS.items()} | {
    "gene_drift": "Genes that moved between the versions :old_version and :new_version"
}
CHARTS = {name: chart for name, (_, chart) in SECTIONS.items() if chart}
COUNTERS = {"requests": "Requests", "error_rate": "Share that failed", "p95_ms": "95th percentile, ms"}
COLUMNS = {
    "errors": ("status_code", "errors", "first_seen", "last_seen", "sample_request_id", "sample_response"),
    "versions": ("served_entity", "requests", "error_rate", "p95_ms", "first_seen", "last_seen"),
    "requesters": ("requester", "requests", "error_rate", "p95_ms", "first_seen", "last_seen"),
    "payloads": (
        "day", "requests", "avg_request_bytes", "max_request_bytes", "avg_response_bytes", "max_response_bytes",
        "requests_too_large", "responses_too_large",
    ),
    "slow_requests": ("duration_ms", "request_time", "request_id", "status_code", "request_bytes", "requester"),
    "recent_requests": ("request_time", "request_id", "status_code", "duration_ms", "served_entity", "requester"),
    "last_runs": (
        "started_at", "status", "mode", "model_uri", "rows_in", "rows_ok", "rows_failed", "rows_skipped", "embeddings",
        "seconds", "run_id",
    ),
    "failed_rows": ("error_class", "mode", "model_version", "failed_rows", "last_seen", "sample_adata_id",
                    "sample_message"),
    "coverage": ("sample_id", "model_version", "rows", "mean_coverage", "least_coverage", "least_genes_matched"),
    "collapse_genes": ("run_id", "vectors", "sampled", "distinct_vectors", "mean_cosine"),
    "gene_drift": ("gene", "mode", "pairs", "mean_cosine", "least_cosine"),
}  # fmt: skip

WIDTH, HEIGHT = 12, 6  # of the grid, and of a chart or table in it
# Each kind of widget has a version of its own; another one does not show.
VERSIONS = {"counter": 2, "table": 2, "line": 3, "bar": 3, "filter-date-picker": 2}


def dashboard(limits: MonitorSettings) -> Json:
    """Return the Lakeview dashboard, as an .lvdash.json file holds it."""
    asked = [name for names in PAGES.values() for name in names]
    pages = [_page(title, list(_rows(names))) for title, names in PAGES.items()]
    return {
        "datasets": [_dataset(name, limits) for name in asked],
        "pages": [*pages, _page("Filters", [[_since_filter(asked)]], "PAGE_TYPE_GLOBAL_FILTERS")],
    }


def _dataset(name: str, limits: MonitorSettings) -> Json:
    """Return a question as a data set: its file, line by line, and its parameters with defaults."""
    text = queries.text(name)
    defaults = {
        **{table: ("STRING", value) for table, value in TABLES.items()},
        "since": ("DATE", f"now-{limits.days}d/d"),
        "until": ("DATE", "now/d"),
        "limit": ("INTEGER", str(SHOWN)),
        "slow_ms": ("INTEGER", str(limits.slow_ms)),
        "sample": ("INTEGER", str(SAMPLE)),
        "old_version": ("STRING", "1"),
        "new_version": ("STRING", "2"),
    }
    parameters = [_parameter(key, *defaults[key]) for key in queries.parameters(name)]
    return {
        "name": name,
        "displayName": queries.question(name),
        "queryLines": text.splitlines(keepends=True),
        "parameters": parameters,
    }


def _parameter(name: str, kind: str, value: str) -> Json:
    default = {"values": {"dataType": kind, "values": [{"value": value}]}}
    return {"displayName": name, "keyword": name, "dataType": kind, "defaultSelection": default}


def _page(title: str, rows: Sequence[Sequence[Json]], kind: str = "PAGE_TYPE_CANVAS") -> Json:
    """Lay rows of widgets out, those of a row beside each other."""
    layout = []
    for y, row in enumerate(rows):
        width = WIDTH // len(row)
        for x, widget in enumerate(row):
            position = {"x": x * width, "y": y * HEIGHT, "width": width, "height": HEIGHT}
            layout.append({"widget": widget, "position": position})
    name = title.lower().replace(" ", "_")
    return {"name": name, "displayName": title, "pageType": kind, "layoutVersion": "GRID_V1", "layout": layout}


def _rows(names: Sequence[str]) -> Iterator[list[Json]]:
    """Give each question a row: its chart, its table, or both."""
    for name in names:
        if name == "endpoint_health":
            yield [_counter(name, column, title) for column, title in COUNTERS.items()]
            continue
        row = [_chart(name, *CHARTS[name])] if name in CHARTS else []
        yield [*row, _table(name)] if name in COLUMNS else row


def _counter(name: str, column: str, title: str) -> Json:
    return _widget(f"{name}_{column}", name, "counter", title, {"value": {"fieldName": column}}, [column])


def _chart(name: str, x: str, *ys: str) -> Json:
    scale = "categorical" if name in CATEGORIES else "temporal"
    encodings = {
        "x": {"fieldName": x, "scale": {"type": scale}, "displayName": x},
        "y": {"scale": {"type": "quantitative"}, "fields": [{"fieldName": y, "displayName": y} for y in ys]},
    }
    return _widget(f"{name}_chart", name, "bar" if name in CATEGORIES else "line", HEADINGS[name], encodings, [x, *ys])


def _table(name: str) -> Json:
    columns = [{"fieldName": column, "displayName": column} for column in COLUMNS[name]]
    return _widget(f"{name}_table", name, "table", HEADINGS[name], {"columns": columns}, COLUMNS[name])


def _widget(key: str, dataset: str, kind: str, title: str, encodings: Json, columns: Sequence[str]) -> Json:
    fields = [{"name": column, "expression": f"`{column}`"} for column in columns]
    query = {"datasetName": dataset, "fields": fields, "disaggregated": True}
    return {"name": key, "queries": [{"name": "main_query", "query": query}], "spec": _spec(kind, title, encodings)}


def _since_filter(names: Sequence[str]) -> Json:
    """Return one date picker for the `:since` of every question that has one."""
    dated = [name for name in names if "since" in queries.parameters(name)]
    keyword = {"name": "since", "keyword": "since"}
    return {
        "name": "since",
        "queries": [
            {"name": name, "query": {"datasetName": name, "parameters": [keyword], "disaggregated": False}}
            for name in dated
        ],
        "spec": _spec(
            "filter-date-picker",
            "Since (UTC)",
            {"fields": [{"parameterName": "since", "queryName": name} for name in dated]},
        ),
    }


def _spec(kind: str, title: str, encodings: Json) -> Json:
    frame = {"showTitle": True, "title": title}
    return {"version": VERSIONS[kind], "widgetType": kind, "encodings": encodings, "frame": frame}


# --- files ----------------------------------------------------------------------------------------


def files(conf: Path) -> dict[Path, str]:
    """Return what the bundle's generated files should hold, thresholds being those of `conf/monitor.yml`."""
    limits = MonitorSettings(**yaml.safe_load((conf / "monitor.yml").read_text(encoding="utf-8"))["monitor"])
    bundle = conf / "databricks"
    found = {bundle / "health.lvdash.json": json.dumps(dashboard(limits), indent=2, ensure_ascii=False) + "\n"}
    for name, rule in rules(limits).items():
        resource = {"resources": {"alerts": {name: alert(name, rule, limits)}}}
        told = "# Made by `make bundle` from conf/monitor.yml and scgpt_batch/monitoring: not to be edited here.\n"
        text = yaml.dump(resource, Dumper=_Blocks, sort_keys=False, allow_unicode=True, width=1_000)
        found[bundle / "resources" / f"{name}.alert.yml"] = told + text
    return found


class _Blocks(yaml.SafeDumper):
    """Writes text of several lines as it stands."""


_Blocks.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)

if __name__ == "__main__":
    for path, content in files(Path(sys.argv[1])).items():
        path.write_text(content, encoding="utf-8")
