"""The monitoring SQL on the inference table that our endpoint writes under load."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from deltalake import DeltaTable

from scgpt_batch.io.rows import to_row
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.monitoring import queries
from tests import inference_tables
from tests.endpoint_process import EndpointProcess, payload
from tests.helpers import random_adata
from tests.paths import GOLDEN

GENES = Vocabulary.from_file(GOLDEN / "checkpoint_flash" / "vocab.json").tokens[:40]


@pytest.fixture(scope="module")
def table(model, tmp_path_factory):
    """The folder of the table: eight clients, answers, refusals, large requests."""
    folder = tmp_path_factory.mktemp("load")
    one = payload(to_row(random_adata(3, len(GENES), genes=GENES)))
    large = {**one, "adata_obs": one["adata_obs"] + " " * 1_100_000}
    requests = [(one, "cell"), (one, "static"), (one, "no such mode"), ({}, "cell")] * 10 + [(large, "cell")]
    bodies = [
        {"dataframe_records": [row], "params": {"mode": mode, "need_preprocess": False}} for row, mode in requests
    ]
    with EndpointProcess(model, folder) as endpoint, ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(endpoint.post, bodies * 4))
        assert {answer.status_code for answer in answers} == {200, 400}
        assert endpoint.stop()[0] == 0
    return folder / "payload"


@pytest.fixture(scope="module")
def lines(table):
    """What the table holds, read by another reader."""
    lines = DeltaTable(table).to_pandas().sort_values("databricks_request_id", ignore_index=True)
    lines["logging_error_codes"] = [list(codes) for codes in lines["logging_error_codes"]]
    return lines.astype(object).where(lines.notna(), None)


@pytest.fixture(scope="module")
def view(spark, table):
    queries.requests_view(spark, f"delta.`{table}`")
    return queries.REQUESTS


def test_each_request_is_there_once_with_all_its_columns(spark, view, lines):
    inference_tables.assert_holds(spark.table(view), lines)


def test_health_counts_what_was_refused(spark, view, lines):
    start = min(lines["request_time"])
    (found,) = queries.run(spark, "endpoint_health", requests=view, since=start).toPandas().to_dict("records")
    refused = (lines["status_code"] == 400).sum()
    assert (found["requests"], found["client_errors"], found["server_errors"]) == (164, refused, 0)
    assert list(found["versions"]) == sorted(set(lines["served_entity_id"]))
