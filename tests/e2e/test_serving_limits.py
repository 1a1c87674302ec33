"""What the endpoint withstands from clients that nobody has let in: connections, headers, slow bodies, identities."""

import asyncio
import os
import resource
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import orjson
import pytest
import requests
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_batch.cli.main import WRONG_USAGE, main
from scgpt_batch.inference.engine import Embedder
from scgpt_batch.io.rows import to_row
from scgpt_batch.models.scgpt.checkpoint import load_checkpoint
from scgpt_batch.models.scgpt.transformer import ScGPT
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.parameters import Parameters
from scgpt_batch.serving.connections import FILES_KEPT, connections_within_files
from scgpt_batch.serving.microbatch import MicroBatcher
from tests.endpoint_process import EndpointProcess, payload, wait_until
from tests.helpers import random_adata

TOKEN = "s3cret"
CELLS = {"need_preprocess": False, "mode": "cell"}
KILOBYTE, MEGABYTE = 2**10, 2**20


@pytest.fixture(scope="module")
def genes(golden):
    return Vocabulary.from_file(golden / "checkpoint_flash" / "vocab.json").tokens[:30]


@pytest.fixture(scope="module")
def limited(model, tmp_path_factory):
    """An endpoint with a token and limits that a test can reach."""
    folder = tmp_path_factory.mktemp("limited")
    flags = ("--header-seconds", "2", "--body-seconds", "4", "--max-connections", "60", "--max-concurrent", "4")
    with EndpointProcess(model, folder, *flags, "--trusted-proxies", "127.0.0.1", token=TOKEN) as running:
        yield running


def connect(endpoint):
    host, _, port = endpoint.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def status(connection):
    """The status of the next answer on a connection; 0 when it was closed without one."""
    line = b""
    while not line.endswith(b"\r\n") and (byte := connection.recv(1)):
        line += byte
    return int(line.split()[1]) if line else 0


def document(genes, n_obs=4, **params):
    row = payload(to_row(random_adata(n_obs, len(genes), genes=genes)))
    return {"dataframe_records": [row], "params": CELLS | params}


def test_endless_header_is_cut_at_the_limit(limited):
    with connect(limited) as connection:
        connection.sendall(b"GET /ping HTTP/1.1\r\nx: ")
        sent = 0
        try:
            while sent < 64 * MEGABYTE:
                connection.sendall(b"a" * 64 * KILOBYTE)
                sent += 64 * KILOBYTE
        except OSError:
            pass
        assert sent < 16 * MEGABYTE  # what the buffers of the system hold


@pytest.mark.parametrize(
    "head",
    [b"GET /ping HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 70_000, b"GET /ping?" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: x"],
    ids=["headers", "request line"],
)
def test_large_header_is_rejected_before_authentication(limited, head):
    with connect(limited) as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert status(connection) == 431


def test_idle_connections_are_closed(limited):
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(limited)) for _ in range(90)]
        assert {status(connection) for connection in idle} == {408, 503}  # all 90 end, without having sent a byte
        assert requests.get(f"{limited.url}/ping", timeout=60).status_code == 200
    assert limited.metric('scgpt_batch_refused_connections_total{limit="connections"}') >= 30


def test_slow_bodies_do_not_block_other_requests(limited, genes):
    head = b"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n"
    head += f"authorization: Bearer {TOKEN}\r\n\r\n".encode()
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(limited)) for _ in range(20)]  # five times as many as may compute
        for connection in slow:
            connection.sendall(head + b"{")
        assert limited.post(document(genes)).status_code == 200
        assert {status(connection) for connection in slow} == {408}


def test_unauthorized_requests_are_logged_at_a_bounded_rate(limited):
    before = limited.metric("scgpt_batch_unauthorized_requests_total")
    with requests.Session() as session:
        answers = [session.get(f"{limited.url}/metrics", timeout=60).status_code for _ in range(50)]
    assert set(answers) == {401} and limited.metric("scgpt_batch_unauthorized_requests_total") == before + 50
    logged = [line for line in limited.log.read_text().splitlines() if "without a valid token" in line]
    assert 1 <= len(logged) < 10 and "from 127.0.0.1" in logged[0]


def test_disconnect_stops_the_work_and_is_logged(limited, genes):
    body = orjson.dumps(document(genes, n_obs=5000, mode="contextual"), option=orjson.OPT_SERIALIZE_NUMPY)
    head = (
        f"POST /invocations HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-type: application/json\r\n"
    )
    begun = limited.table.with_name("payload_spool") / "unanswered"
    with connect(limited) as connection:
        connection.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: list(begun.iterdir()))
    counted = 'scgpt_batch_requests_total{status="499"}'
    wait_until(lambda: counted in limited.session.get(f"{limited.url}/metrics", timeout=60).text)


HEADERS = [
    b"host: x", b"content-length: 5", b"content-length: -1", b"content-length: " + b"9" * 30, b"expect: 100-continue",
    b"transfer-encoding: chunked", b"content-encoding: gzip", b"connection: upgrade", b"upgrade: websocket", b" folded",
    b"content-type: application/json", f"authorization: Bearer {TOKEN}".encode(), b"x-forwarded-for: ,,",
]  # fmt: skip
LINES = st.lists(st.sampled_from(HEADERS) | st.binary(max_size=20), max_size=6)
STARTS = st.tuples(
    st.sampled_from([b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"TRACE", b"CONNECT", b""]) | st.binary(max_size=5),
    st.sampled_from([b"/invocations", b"/ping", b"/metrics", b"/version", b"*", b"//", b"/%00", b"/invocations?x=%ff"])
    | st.binary(max_size=9),
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b""]),
).map(b" ".join)
BYTES = st.binary(max_size=99) | st.builds(
    lambda start, lines, body: b"\r\n".join([start, *lines, b"", body]),
    STARTS,
    LINES,
    st.binary(max_size=20) | st.sampled_from([b"{}", b"5\r\n[1,2]\r\n0\r\n\r\n", b"[[[[["]),
)


def test_random_bytes_do_not_break_the_server(limited):
    @settings(max_examples=int(os.environ.get("SCGPT_BATCH_FUZZ", "200")), deadline=None)
    @given(sent=BYTES)
    def send(sent):
        with connect(limited) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            try:
                answer = status(connection)
            except ConnectionError:
                return
            assert answer in {0, 100} or 200 <= answer < 500

    send()
    assert requests.get(f"{limited.url}/ping", timeout=60).status_code == 200


# Last in this module: it stops the endpoint


def test_requester_comes_from_trusted_proxies_only(limited, genes):
    named = {
        "10.1.2.3": "10.1.2.3",
        "6.6.6.6, 10.1.2.4": "10.1.2.4",  # what the client itself sent comes first
        "2001:db8::1, 127.0.0.1": "2001:db8::1",
        "<script>": "127.0.0.1",
        "": "127.0.0.1",
    }
    sent = {}
    for forwarded in named:
        answer = limited.post(document(genes), **{"X-Forwarded-For": forwarded})
        sent[answer.headers["x-request-id"]] = named[forwarded]
    assert limited.stop()[0] == 0
    rows = DeltaTable(limited.table).to_pyarrow_table().to_pylist()
    logged = {row["databricks_request_id"]: row["requester"] for row in rows}
    assert {name: logged[name] for name in sent} == sent


# Without an endpoint


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--host", "0.0.0.0"), "no token is set: set SCGPT_BATCH_TOKEN, or use --allow-without-token"),
        (("--host", "0.0.0.0", "--allow-without-token"), "no MLflow model at '/nowhere'"),
        (("--host", "127.0.0.1"), "no MLflow model at '/nowhere'"),
        (("--trusted-proxies", "proxy.local"), "trusted_proxies"),
    ],
)
def test_open_address_needs_token_or_flag(capsys, monkeypatch, flags, message):
    monkeypatch.delenv("SCGPT_BATCH_TOKEN", raising=False)
    assert main(["serve", "--model-uri", "/nowhere", "--port", "0", *flags]) == WRONG_USAGE
    assert message in capsys.readouterr().err


def test_connection_limit_leaves_file_descriptors():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        assert connections_within_files(100) == 100
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 512
        assert connections_within_files(1000) == 1000  # the soft limit is raised
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1000 + FILES_KEPT
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_abandoned_work_ends_before_the_next_batch(golden, genes, monkeypatch):
    monkeypatch.setattr("scgpt_batch.inference.engine.CPU_TOKENS", 50)  # a few cells per batch
    embedder = Embedder(load_checkpoint(golden / "checkpoint_flash"), device="cpu")
    batches, forward = [], ScGPT.forward
    monkeypatch.setattr(ScGPT, "forward", lambda *args, **options: batches.append(1) or forward(*args, **options))
    row = to_row(random_adata(40, len(genes), genes=genes))
    parameters = Parameters(need_preprocess=False, mode="contextual")
    assert list(embedder.embed_rows([row], parameters, wanted=lambda: len(batches) < 3)) == []
    assert len(batches) == 3


def test_batch_continues_while_one_request_waits():
    wanted_by, go = [], threading.Event()

    def embed_rows(rows, parameters, wanted):
        wanted_by.append(wanted)
        go.wait()
        return list(rows)

    async def ask():
        with ThreadPoolExecutor(1) as pool:
            batcher = MicroBatcher(embed_rows, pool, wait_seconds=0.01, on_batch=lambda n: None)
            one, other = (asyncio.create_task(batcher.answers([i], Parameters())) for i in (1, 2))
            while not wanted_by:
                await asyncio.sleep(0.01)
            answers = [wanted_by[0]()]
            one.cancel()
            await asyncio.sleep(0.01)
            answers.append(wanted_by[0]())
            other.cancel()
            await asyncio.sleep(0.01)
            answers.append(wanted_by[0]())
            go.set()
            return answers

    assert asyncio.run(ask()) == [True, True, False]
