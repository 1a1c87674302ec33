"""The monitoring SQL: each query's result equals a pandas computation.

The view is made of generated tables of all three generations; what reads only the view is run on one of them, and
what counts values that a generation lacks also of the one that lacks most. e2e/test_monitoring_endpoint.py has the view
of the table that our endpoint writes.
"""

from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest

from scgpt_batch.cli.main import ALERTS, FAILED, OK, WRONG_USAGE
from scgpt_batch.errors import ConfigError
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.monitoring import queries
from tests import inference_tables
from tests.helpers import assert_close
from tests.paths import GOLDEN

UNTIL = datetime(2026, 11, 20, 12, 30, tzinfo=UTC)
SINCE = UNTIL - timedelta(days=5)
LINES = inference_tables.requests(2500, until=UNTIL)
GENERATIONS = list(inference_tables.TABLES)
GENES = Vocabulary.from_file(GOLDEN / "checkpoint_flash" / "vocab.json").tokens[:40]


@pytest.fixture(scope="module")
def views(spark, tmp_path_factory):
    """Table -> its normalised view; the generated tables have many requests twice."""
    folder, made = tmp_path_factory.mktemp("inference"), {}
    for generation in GENERATIONS:
        table = f"delta.`{folder}/{generation}`"
        inference_tables.write(spark, inference_tables.delivered(LINES), table, generation)
        queries.requests_view(spark, table)
        made[generation] = f"requests_of_{generation}"
        spark.table(queries.REQUESTS).createOrReplaceTempView(made[generation])
    return made


def run(spark, name, **parameters):
    return queries.run(spark, name, **parameters).toPandas()


def since(lines, start):
    """The rows from a time on, with their weight and whether they failed."""
    lines = lines[lines["request_time"] >= start]
    fraction = lines["sampling_fraction"].astype(float).fillna(1)
    return lines.assign(weight=1 / fraction, failed=lines["status_code"] >= 400)


def weighted_percentile(lines, q):
    """The percentile with each request repeated by its weight (in hundredths)."""
    known = lines[lines["execution_duration_ms"].notna()]
    values = known["execution_duration_ms"].astype(float)
    return np.percentile(np.repeat(values, np.round(100 * known["weight"]).astype(int)), 100 * q)


def performance(lines):
    known = lines[lines["execution_duration_ms"].notna()]
    return pd.Series(
        {
            "requests": lines["weight"].sum(),
            "avg_ms": np.average(known["execution_duration_ms"].astype(float), weights=known["weight"]),
            "p50_ms": weighted_percentile(lines, 0.5),
            "p95_ms": weighted_percentile(lines, 0.95),
            "p99_ms": weighted_percentile(lines, 0.99),
            "errors": lines.loc[lines["failed"], "weight"].sum(),
            "error_rate": lines.loc[lines["failed"], "weight"].sum() / lines["weight"].sum(),
            "versions": lines["served_entity_id"].nunique(),
            "requesters": lines["requester"].nunique(),
        }
    )


def same_numbers(found, wanted, columns):
    assert_close(found[columns].astype(float), wanted[columns].astype(float), rtol=1e-9)


def utc(times):
    return [time.replace(tzinfo=UTC) for time in times]


EVERY_GENERATION = pytest.mark.parametrize("generation", GENERATIONS)
WITH_AND_WITHOUT_NAMES = pytest.mark.parametrize("generation", ["gateway", "unity"])


@pytest.fixture
def generation():
    return "gateway"


@pytest.fixture
def view(views, generation):
    return views[generation]


@pytest.fixture
def all_lines(generation):
    return inference_tables.visible(LINES, generation)


@pytest.fixture
def lines(all_lines):
    return since(all_lines, SINCE)


@EVERY_GENERATION
def test_view_has_each_request_once(spark, view, all_lines):
    inference_tables.assert_holds(spark.table(view), all_lines)


@WITH_AND_WITHOUT_NAMES
def test_daily_performance(spark, view, lines):
    found = run(spark, "daily_performance", requests=view, since=SINCE)
    wanted = pd.DataFrame({day: performance(of_day) for day, of_day in lines.groupby("request_date")}).T
    assert found["day"].tolist() == wanted.index.tolist()
    assert len(found) == 6
    same_numbers(found, wanted, list(wanted.columns))


def test_endpoint_health(spark, view, lines):
    (found,) = run(spark, "endpoint_health", requests=view, since=SINCE).to_dict("records")
    wanted = performance(lines)
    assert_close([found[k] for k in ("requests", "error_rate", "p95_ms")],
                 [wanted[k] for k in ("requests", "error_rate", "p95_ms")], rtol=1e-9)  # fmt: skip
    failing = lines.loc[lines["failed"]]
    of_client = failing["status_code"].between(400, 499)
    wanted = [failing.loc[of_client, "weight"].sum(), failing.loc[~of_client, "weight"].sum()]
    assert_close([found["client_errors"], found["server_errors"]], wanted, rtol=1e-9)
    assert list(found["versions"]) == sorted(lines["served_entity_id"].dropna().unique())


def test_recent_requests(spark, view, lines):
    found = run(spark, "recent_requests", requests=view, since=SINCE, limit=300)
    wanted = lines.sort_values(["request_time", "databricks_request_id"], ascending=[False, True]).head(300)
    assert found["request_id"].tolist() == wanted["databricks_request_id"].tolist()
    sizes = [None if request is None else len(request.encode()) for request in wanted["request"]]
    assert_close(found["request_bytes"].astype(float), np.array(sizes, float))


def test_slow_requests(spark, view, lines):
    found = run(spark, "slow_requests", requests=view, since=SINCE, slow_ms=1000, limit=50)
    slow = lines[lines["execution_duration_ms"].astype(float) >= 1000]
    assert len(slow) > 50
    wanted = slow.sort_values(
        ["execution_duration_ms", "request_time", "databricks_request_id"], ascending=[False, False, True]
    ).head(50)
    assert found["request_id"].tolist() == wanted["databricks_request_id"].tolist()


def test_errors(spark, view, lines):
    found = run(spark, "errors", requests=view, since=SINCE).set_index("status_code")
    failed = lines[lines["failed"]].sort_values(["request_time", "databricks_request_id"])
    assert sorted(found.index) == [400, 404, 429, 500, 504]
    assert found["errors"].is_monotonic_decreasing
    for status, of_status in failed.groupby("status_code"):
        newest, line = of_status.iloc[-1], found.loc[status]
        assert_close(line["errors"], of_status["weight"].sum(), rtol=1e-9)
        assert utc([line["first_seen"], line["last_seen"]]) == [
            of_status.iloc[0]["request_time"],
            newest["request_time"],
        ]
        assert line["requesters"] == of_status["requester"].nunique()
        assert (line["sample_request_id"], line["sample_response"]) == (
            newest["databricks_request_id"], newest["response"])  # fmt: skip


def test_traffic_is_compared_with_earlier_days(spark, view, all_lines):
    found = run(spark, "traffic", requests=view, since=SINCE, until=UNTIL)
    start = SINCE.replace(minute=0, second=0, microsecond=0)
    counted = since(all_lines, start)
    hours = pd.date_range(start, UNTIL.replace(minute=0, second=0, microsecond=0), freq="h", inclusive="left")
    assert utc(found["hour"]) == hours.tolist() and len(found) == 120
    times = pd.to_datetime(counted["request_time"], utc=True).dt.floor("h")
    requests = counted.groupby(times)["weight"].sum().reindex(hours, fill_value=0.0)
    usual = requests.groupby(hours.hour).transform(lambda day: day.expanding().mean().shift())
    assert_close(found["requests"], requests, rtol=1e-9)
    errors = counted[counted["failed"]].groupby(times)["weight"].sum().reindex(hours, fill_value=0.0)
    assert_close(found["errors"], errors, rtol=1e-9)
    assert_close(found["usual"].astype(float), usual, rtol=1e-9)
    assert_close(found["share_of_usual"].astype(float), (requests / usual).replace(np.inf, np.nan), rtol=1e-9)


def test_payload_sizes_and_logging_errors(spark, view, lines):
    found = run(spark, "payloads", requests=view, since=SINCE)
    for (day, of_day), line in zip(lines.groupby("request_date"), found.to_dict("records"), strict=True):
        assert line["day"] == day
        for column, code in inference_tables.TOO_LARGE.items():
            sizes = [len(payload.encode()) for payload in of_day[column] if payload is not None]
            gone = [code in codes for codes in of_day["logging_error_codes"]]
            assert_close(
                [line[f"avg_{column}_bytes"], line[f"max_{column}_bytes"], line[f"{column}s_not_logged"],
                 line[f"{column}s_too_large"]],
                [np.mean(sizes), max(sizes), of_day.loc[of_day[column].isna(), "weight"].sum(),
                 of_day.loc[gone, "weight"].sum()],
                rtol=1e-9,
            )  # fmt: skip


@WITH_AND_WITHOUT_NAMES
@pytest.mark.parametrize(("name", "key", "column"), [("versions", "served_entity", "served_entity_id"),
                                                     ("requesters", "requester", "requester")])  # fmt: skip
def test_versions_and_requesters(spark, view, lines, name, key, column):
    found = run(spark, name, requests=view, since=SINCE).set_index(key)
    groups = dict(list(lines.groupby(lines[column].fillna("nobody"))))
    assert set(found.index.fillna("nobody")) == set(groups)
    for who, line in zip(found.index.fillna("nobody"), found.to_dict("records"), strict=True):
        numbers = ["requests", "error_rate", "p95_ms"]
        assert_close([line[number] for number in numbers], performance(groups[who])[numbers], rtol=1e-9)
        assert utc([line["first_seen"], line["last_seen"]]) == [
            groups[who]["request_time"].min(), groups[who]["request_time"].max()]  # fmt: skip


def test_times_can_be_text(spark, views):
    by_time = run(spark, "daily_performance", requests=views["gateway"], since=SINCE)
    by_text = run(spark, "daily_performance", requests=views["gateway"], since="2026-11-15 12:30:00")
    pd.testing.assert_frame_equal(by_time, by_text)


def test_only_files_of_the_days_are_read(spark, views, capsys):
    queries.run(spark, "recent_requests", requests=views["gateway"], since=SINCE, limit=5).explain()
    plan = capsys.readouterr().out
    assert "GreaterThanOrEqual(request_date,2026-11-14)" in plan
    assert "client_request_id" not in plan.split("ReadSchema")[-1]


def test_other_tables_are_rejected(spark, tmp_path):
    spark.range(3).write.format("delta").save(str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="request_time"):
        queries.requests_view(spark, f"delta.`{tmp_path}/other`")
    with pytest.raises(ConfigError, match="no Delta table"):
        queries.requests_view(spark, f"delta.`{tmp_path}/nothing`")


def test_view_can_be_created_with_sql_alone(spark, views, tmp_path):
    table = inference_tables.write(spark, LINES.head(50), "payload_by_name")
    body = queries.text("requests_gateway").replace("identifier(:inference_table)", table)
    spark.sql(f"create or replace view my_requests as {body}")
    assert len(run(spark, "recent_requests", requests="my_requests", since="2026-01-01", limit=100)) == 50


@pytest.mark.parametrize("name", queries.names())
def test_first_line_is_a_question(name):
    first = queries.text(name).splitlines()[0]
    assert first.startswith("-- ") and "?" in first


def test_table_path_may_contain_any_characters(spark, run, tmp_path):
    folder = f'{tmp_path}/o\'dd "x" y\\z $w ;-- é'
    table = inference_tables.write(spark, LINES.head(20), f"delta.`{folder}`")
    code, summary, err = run("monitor", "--inference-table", table, "--hours", "100000")
    assert code in (OK, ALERTS) and summary["requests"] > 0, err


@pytest.mark.parametrize(
    ("view", "wanted"),
    [
        ("v'; DROP TABLE t", "is not a table name: use catalog.schema.table"),
        ("`a``b`", "is not a table name: use catalog.schema.table"),
        ("`${env:HOME}`", "which Spark replaces in SQL"),
        ("`o'dd \"x\\`", "INVALID_SCHEMA_OR_RELATION_NAME"),  # of local Spark; Unity Catalog takes such names
    ],
)
def test_invalid_view_name_is_rejected_in_one_line(spark, run, tmp_path, view, wanted):
    table = inference_tables.write(spark, LINES.head(3), f"delta.`{tmp_path}/t`")
    code, _, err = run("monitor", "--inference-table", table, "--requests-view", view)
    assert code in (FAILED, WRONG_USAGE) and wanted in err.strip().splitlines()[-1]
