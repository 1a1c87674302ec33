"""The inference table: what is in it after kills, full disks and refused writes, and that Spark reads it."""

import errno
import os
import shutil
import signal
import threading
import time
import uuid
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest
import requests
from deltalake import DeltaTable, write_deltalake

from scgpt_batch.errors import ConfigError
from scgpt_batch.io.rows import to_row
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.serving.inference_log import MAX_PAYLOAD, SCHEMA, Exchange, InferenceLog, Spool, table_path
from scgpt_batch.serving.metrics import Metrics
from tests.endpoint_process import EndpointProcess, payload, wait_until
from tests.helpers import random_adata
from tests.paths import GOLDEN

GENES = Vocabulary.from_file(GOLDEN / "checkpoint_flash" / "vocab.json").tokens[:30]
NOON = datetime(2026, 11, 22, 12, 30, 15, 250_000, UTC)
NEVER = 1e6  # seconds: a log that is drained by hand


def exchange(request_id, request=b"{}", response=b"{}", **more):
    return Exchange(request_id, NOON, 200, 0.0254, request, response, **more)


def open_log(folder, metrics=None):
    return InferenceLog(f"delta.`{folder / 'payload'}`", "", flush_seconds=NEVER, metrics=metrics or Metrics())


def ids(folder):
    return sorted(DeltaTable(folder / "payload").to_pyarrow_table()["databricks_request_id"].to_pylist())


def count(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"scgpt_batch_{name}_total", labels)


# What is written


def test_table_has_databricks_columns(tmp_path, spark):
    with open_log(tmp_path) as log:
        log.append(exchange("a", client_request_id="mine", served_entity="m-1", requester="127.0.0.1"))
    table = spark.read.format("delta").load(str(tmp_path / "payload"))
    assert table.schema.simpleString() == (
        "struct<databricks_request_id:string,request_date:date,client_request_id:string,request_time:timestamp,"
        "status_code:int,sampling_fraction:double,execution_duration_ms:bigint,request:string,response:string,"
        "logging_error_codes:array<string>,served_entity_id:string,requester:string>"
    )
    record = table.selectExpr("*", "unix_micros(request_time) as micros").first().asDict()
    del record["request_time"]
    assert record == {
        "databricks_request_id": "a",
        "request_date": NOON.date(),
        "client_request_id": "mine",
        "micros": int(NOON.timestamp() * 1e6),
        "status_code": 200,
        "sampling_fraction": 1.0,
        "execution_duration_ms": 25,
        "request": "{}",
        "response": "{}",
        "logging_error_codes": [],
        "served_entity_id": "m-1",
        "requester": "127.0.0.1",
    }


@pytest.mark.parametrize(
    ("request_body", "response", "more", "codes"),
    [
        (b"x" * MAX_PAYLOAD, b"y" * MAX_PAYLOAD, {}, []),
        (b"x" * (MAX_PAYLOAD + 1), b"y", {}, ["MAX_REQUEST_SIZE_EXCEEDED"]),
        (b"x", b"y" * (MAX_PAYLOAD + 1), {}, ["MAX_RESPONSE_SIZE_EXCEEDED"]),
        (None, b"y", {"too_large_to_read": True}, ["MAX_REQUEST_SIZE_EXCEEDED"]),
        (None, b"y", {}, []),
        (b"\xff", b"y", {}, []),
    ],
    ids=["at the limit", "request over", "response over", "request unread", "no request", "no text"],
)
def test_payloads_over_one_mebibyte_are_null_with_a_code(request_body, response, more, codes):
    record = exchange("a", request_body, response, **more).record()
    assert record["logging_error_codes"] == codes
    assert (record["request"] is None) == (request_body is None or "MAX_REQUEST_SIZE_EXCEEDED" in codes)
    assert (record["response"] is None) == ("MAX_RESPONSE_SIZE_EXCEEDED" in codes)


# Exactly once


def test_kill_after_the_commit_writes_once(tmp_path, monkeypatch):
    log = open_log(tmp_path)
    log.append(exchange("a"))
    monkeypatch.setattr(log.spool, "remove", lambda number: None)  # dead before the file is dropped
    assert log.drain()
    log.spool.close()
    with open_log(tmp_path) as again:
        again.append(exchange("b"))
    assert ids(tmp_path) == ["a", "b"]


def test_kill_before_the_commit_loses_nothing(tmp_path):
    spool = Spool(tmp_path / "payload_spool")
    spool.append(b'{"databricks_request_id": "a", "request_time": 0}', request_id="a")
    spool.close()
    (written,) = (tmp_path / "payload_spool").glob("*.jsonl")
    with written.open("ab") as file:  # killed in the middle of a write: never answered
        file.write(b'{"databricks_request_id": "torn')
    open_log(tmp_path).close()
    assert ids(tmp_path) == ["a"]


def dead_process(folder, *, noted, logged):
    """Leave what a process leaves that noted requests, logged some, and died."""
    spool = Spool(folder / "payload_spool")
    for name in noted:
        spool.begin(name, orjson.dumps(exchange(name, b'{"client_request_id": "mine"}').unanswered()))
    for name, note in logged.items():
        spool.append(orjson.dumps(exchange(name).record()), request_id=note)
    spool.close()


def test_request_that_killed_the_process_is_logged_later(tmp_path):
    answered, deadly = uuid.uuid4().hex, uuid.uuid4().hex
    dead_process(tmp_path, noted=[answered, deadly], logged={answered: answered})
    open_log(tmp_path).close()
    rows = DeltaTable(tmp_path / "payload").to_pyarrow_table().to_pylist()
    (record,) = [row for row in rows if row["databricks_request_id"] == deadly]
    assert sorted(row["databricks_request_id"] for row in rows) == sorted([answered, deadly])
    assert record["logging_error_codes"] == ["REQUEST_UNANSWERED"] and record["execution_duration_ms"] is None
    assert record["client_request_id"] == "mine" and record["request"] and record["response"] is None
    assert list((tmp_path / "payload_spool" / "unanswered").iterdir()) == []


def test_kill_between_record_and_note_logs_once(tmp_path):
    name, other = uuid.uuid4().hex, uuid.uuid4().hex
    dead_process(tmp_path, noted=[name], logged={name: other})  # the note of `name` is still there
    open_log(tmp_path).close()
    assert ids(tmp_path) == [name]


def test_file_numbers_increase_across_restarts(tmp_path):
    for name in "abc":
        with open_log(tmp_path) as log:
            log.append(exchange(name))
    assert ids(tmp_path) == ["a", "b", "c"]
    assert len(list((tmp_path / "payload_spool").glob("*.jsonl"))) == 1


def test_new_spool_writes_new_records(tmp_path):
    for name in "ab":
        with open_log(tmp_path) as log:
            log.append(exchange(name))
        shutil.rmtree(tmp_path / "payload_spool")
    assert ids(tmp_path) == ["a", "b"]


def test_transactions_survive_checkpoints(tmp_path):
    with open_log(tmp_path) as log:
        log.append(exchange("a"))
        assert log.drain()
        table = DeltaTable(tmp_path / "payload")
        table.create_checkpoint()
        table.cleanup_metadata()
        log.table.write([exchange("a").record()], log.spool.app_id, version=1)
    assert ids(tmp_path) == ["a"]


# What goes wrong never fails a request


def test_unwritable_table_is_counted_and_retried(tmp_path, caplog):
    metrics = Metrics()
    with open_log(tmp_path, metrics) as log:
        commits = tmp_path / "payload" / "_delta_log"
        commits.rename(tmp_path / "hidden")
        commits.write_text("in the way")
        log.append(exchange("a"))
        assert not log.drain() and "tried again later" in caplog.text
        assert count(metrics, "log_failures", to="table") >= 1  # the log's own thread may have tried too
        commits.unlink()
        (tmp_path / "hidden").rename(commits)
        assert log.drain()
    assert ids(tmp_path) == ["a"]


def test_full_disk_is_counted_and_next_record_is_whole(tmp_path, caplog, monkeypatch):
    def write_half(file, line):
        if b"lost" not in line:
            return write(file, line)
        write(file, line[: len(line) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    metrics, write = Metrics(), os.write
    monkeypatch.setattr(os, "write", write_half)
    with open_log(tmp_path, metrics) as log:
        log.append(exchange("lost"))
        assert "request lost is not in the inference table" in caplog.text and "No space left" in caplog.text
        assert count(metrics, "log_failures", to="spool") == 1
        log.append(exchange("a"))
    assert ids(tmp_path) == ["a"]


GOOD = exchange("good").record()
BAD_RECORDS = {
    "a list": [1],
    "a number": 7,
    "no time": {"databricks_request_id": "bad"},
    "no id": {**GOOD, "databricks_request_id": None},
    "a time beyond the calendar": {**GOOD, "request_time": 2**62},
    "a status of text": {**GOOD, "status_code": "two hundred"},
    "a status beyond 32 bits": {**GOOD, "status_code": 2**40},
    "codes of numbers": {**GOOD, "logging_error_codes": [{}]},
    "a request of lists": {**GOOD, "request": [[]]},
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_bad_record_is_moved_aside(tmp_path, kind):
    spool = tmp_path / "payload_spool"
    Spool(spool).close()
    lines = [orjson.dumps(BAD_RECORDS[kind]), orjson.dumps(GOOD)]
    (spool / "000000000007.jsonl").write_bytes(b"\n".join(lines))
    metrics = Metrics()
    with open_log(tmp_path, metrics) as log:
        log.append(exchange("later"))
    assert ids(tmp_path) == ["good", "later"]
    assert count(metrics, "log_moved_aside") == 1
    (kept,) = spool.glob("*.bad-*")
    assert kept.read_bytes() == b"\n".join(lines)


def _a_link(path):
    path.with_name("elsewhere").write_bytes(orjson.dumps(GOOD))
    path.symlink_to(path.with_name("elsewhere"))


FOREIGN = {
    "link": _a_link,
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "dangling": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_file_of_another_kind_is_moved_aside(tmp_path, kind):
    spool = tmp_path / "payload_spool"
    Spool(spool).close()
    FOREIGN[kind](spool / "000000000007.jsonl")
    metrics = Metrics()
    with open_log(tmp_path, metrics) as log:
        log.append(exchange("later"))
    assert ids(tmp_path) == ["later"]
    assert count(metrics, "log_moved_aside") == 1 and len(list(spool.glob("*.bad-*"))) == 1


def test_foreign_file_names_are_ignored(tmp_path):
    spool = tmp_path / "payload_spool"
    Spool(spool).close()
    names = ["notes.jsonl", "1.jsonl", "²²²²²²²²²²²².jsonl", "unanswered/x.json"]
    for name in names:
        (spool / name).write_text("mine")
    with open_log(tmp_path) as log:
        log.append(exchange("a"))
    assert ids(tmp_path) == ["a"] and all((spool / name).read_text() == "mine" for name in names)


def test_links_are_never_written_to(tmp_path):
    spool, victim = tmp_path / "payload_spool", tmp_path / "victim"
    Spool(spool).close()
    victim.write_text("precious")
    log = open_log(tmp_path)
    newest = max(int(file.stem) for file in spool.glob("*.jsonl"))
    (spool / f"{newest + 1:012d}.jsonl").symlink_to(victim)
    log.append(exchange("a"))
    assert log.drain()
    log.append(exchange("b"))
    log.close()
    assert victim.read_text() == "precious" and ids(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_spool_writable_by_others_is_rejected(tmp_path, mode):
    spool = tmp_path / "payload_spool"
    spool.mkdir()
    spool.chmod(mode)
    with pytest.raises(ConfigError, match="other users can write"):
        open_log(tmp_path)


def test_spool_is_private_to_its_user(tmp_path):
    log = open_log(tmp_path)
    log.begin(exchange(uuid.uuid4().hex))
    log.append(exchange("a"))
    places = [log.spool.folder, *log.spool.folder.rglob("*")]
    assert [path for path in places if path.stat().st_mode & 0o077] == [] and len(places) == 6
    log.close()


def test_spool_has_one_owner(tmp_path):
    with open_log(tmp_path), pytest.raises(ConfigError, match="use another --spool for this one"):
        open_log(tmp_path)


def test_table_with_other_columns_is_rejected(tmp_path):
    write_deltalake(tmp_path / "payload", SCHEMA.empty_table().drop_columns("requester"))
    with pytest.raises(ConfigError, match="column requester differs"):
        open_log(tmp_path)


def test_table_with_unsupported_features_is_rejected(tmp_path, spark):
    columns = "databricks_request_id string, request_date date, client_request_id string, request_time timestamp, "
    columns += "status_code int, sampling_fraction double, execution_duration_ms bigint, request string, "
    columns += "response string, logging_error_codes array<string>, served_entity_id string, requester string"
    spark.sql(f"create table delta.`{tmp_path / 'payload'}` ({columns}) using delta cluster by (request_date)")
    with pytest.raises(ConfigError, match="clustering"):
        open_log(tmp_path)


@pytest.mark.parametrize("name", ["main.serving.payload", "payload"])
def test_catalog_name_is_rejected_with_advice(name):
    with pytest.raises(ConfigError, match=r"without a Spark catalog; use delta\.`path`"):
        table_path(name)


def test_remote_table_needs_a_local_spool():
    with pytest.raises(ConfigError, match="--spool"):
        InferenceLog("s3://bucket/payload", "", flush_seconds=NEVER, metrics=Metrics())


# Killed under load


class Load:
    """Threads that ask one question after the other, and remember which were answered."""

    def __init__(self, endpoint, threads=4):
        self.answered, self._endpoint, self._stop = [], endpoint, threading.Event()
        row = payload(to_row(random_adata(3, len(GENES), genes=GENES)))
        self._rows = [{name: v if isinstance(v, str) else v.tolist() for name, v in row.items()}]
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def _ask(self):
        session = requests.Session()
        while not self._stop.is_set():
            name = uuid.uuid4().hex
            document = {
                "dataframe_records": self._rows,
                "params": {"need_preprocess": False},
                "client_request_id": name,
            }
            try:
                answer = session.post(f"{self._endpoint.url}/invocations", json=document, timeout=30)
            except requests.RequestException:
                continue
            if answer.status_code == 200 and answer.json():
                self.answered.append(name)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def _ask_in_vain(endpoint, document):
    with pytest.raises(requests.RequestException):
        endpoint.post(document)


def test_request_in_flight_at_a_kill_is_logged(model, tmp_path):
    heavy = payload(to_row(random_adata(5_000, len(GENES), genes=GENES)))
    document = {"dataframe_records": [heavy], "client_request_id": "deadly"}
    document["params"] = {"need_preprocess": False, "mode": "contextual"}
    with EndpointProcess(model, tmp_path) as endpoint:
        asking = threading.Thread(target=_ask_in_vain, args=(endpoint, document))
        asking.start()
        wait_until(lambda: list((tmp_path / "payload_spool" / "unanswered").iterdir()))
        endpoint.kill()
        asking.join()
    with EndpointProcess(model, tmp_path) as endpoint:
        assert endpoint.stop()[0] == 0
    (record,) = DeltaTable(tmp_path / "payload").to_pyarrow_table().to_pylist()
    assert (record["client_request_id"], record["status_code"]) == ("deadly", 500)
    assert record["logging_error_codes"] == ["REQUEST_UNANSWERED"]


def test_answered_requests_are_logged_once_after_kills(model, tmp_path):
    answered = []
    kills = int(os.environ.get("SCGPT_BATCH_KILLS", "2"))
    for i in range(kills):
        with EndpointProcess(model, tmp_path) as endpoint, Load(endpoint) as load:
            ends = time.monotonic() + 60
            while len(load.answered) < 100 + 37 * (i % 5) and time.monotonic() < ends:
                time.sleep(0.01)
            endpoint.process.send_signal(signal.SIGKILL)
            endpoint.process.wait()
        assert len(load.answered) >= 100
        answered += load.answered
    with EndpointProcess(model, tmp_path) as endpoint:
        assert endpoint.stop()[0] == 0
    seen = Counter(DeltaTable(tmp_path / "payload").to_pyarrow_table()["client_request_id"].to_pylist())
    assert [name for name in answered if seen[name] != 1] == []
    assert max(seen.values()) == 1
