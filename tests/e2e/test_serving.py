"""The endpoint as its users meet it: a process of its own, called over HTTP by hand and by the client."""

import base64
import gzip
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import mlflow
import numpy as np
import orjson
import psutil
import pytest
import requests
from deltalake import DeltaTable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scgpt_batch import client
from scgpt_batch.errors import ConfigError, EmbeddingWarning, PartsFailed
from scgpt_batch.io.rows import to_row
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.parameters import Parameters
from scgpt_batch.registry.resolve import load
from tests.endpoint_process import EndpointProcess, payload
from tests.helpers import assert_close, random_adata
from tests.paths import GOLDEN, REPO

GENES = [*Vocabulary.from_file(GOLDEN / "checkpoint_flash" / "vocab.json").tokens[:30], "not-a-gene"]
UNPROCESSED = {"need_preprocess": False}
CELLS = {"need_preprocess": False, "mode": "cell"}
MEGABYTE = 10**6
REFUSALS = {400, 413, 415}


@pytest.fixture(scope="module")
def embedder(registered):
    return load(registered)


@pytest.fixture(scope="module")
def endpoint(registered, tmp_path_factory):
    flags = ("--shutdown-seconds", "300")
    with EndpointProcess("models:/scgpt@champion", tmp_path_factory.mktemp("endpoint"), *flags) as running:
        running.session.headers["X-Forwarded-For"] = "8.8.8.8"  # no proxy is trusted: it is not the requester
        yield running


@pytest.fixture(scope="module")
def guarded(registered, tmp_path_factory):
    """One with a token, and limits that a test can pass."""
    flags = ("--max-answer-bytes", "100000", "--max-concurrent", "2")
    with EndpointProcess(registered.uri, tmp_path_factory.mktemp("guarded"), *flags, token="s3cret") as running:
        yield running


def row(seed=0, n_obs=4, layout="csr"):
    return to_row(random_adata(n_obs, len(GENES), seed=seed, genes=GENES), layout=layout)


def ask(endpoint, *rows, packed=False, **params):
    """The answers to rows; a refusal fails the test."""
    document = {"dataframe_records": [payload(one) for one in rows], "params": params}
    answer = endpoint.post(document, packed=packed)
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"]


def refusal(answer, status):
    """The message of a refusal, which is JSON without a traceback."""
    assert answer.status_code == status, (answer.status_code, answer.text[:500])
    assert "Traceback" not in answer.text
    assert set(answer.json()) == {"error_code", "message"}
    return answer.json()["message"]


# The same numbers


@pytest.mark.parametrize("mode", ["static", "contextual", "cell"])
def test_real_rows_match_the_embedder_in_each_encoding(endpoint, embedder, pbmc3k, mode):
    parameters = {"mode": mode, "data_is_raw": True, "log1p": True, "subset_hvg": 0}
    for i in range(50):
        one = to_row(pbmc3k[i * 20 : (i + 1) * 20, :2000], layout=("csr", "dense")[i % 2])
        wanted = embedder.embed(one, Parameters(**parameters)).embeddings
        for encoding, rtol in (("list", 0.0), ("float32_base64", 0.0), ("float16_base64", 1e-3)):
            (found,) = ask(endpoint, one, packed=True, encoding=encoding, **parameters)
            assert_close(vectors(found, encoding), wanted, rtol=rtol, atol=0.0 if rtol == 0 else 1e-6)


def vectors(answer, encoding):
    if encoding == "list":
        return np.array(answer["cell_embeddings"] or answer["gene_embeddings"], np.float32)
    packed = base64.b64decode(answer["embeddings_base64"])
    return np.frombuffer(packed, "<f4" if encoding.startswith("float32") else "<f2").reshape(
        -1, answer["embedding_dim"]
    )


@pytest.mark.parametrize("spelled", ["dataframe_split", "dataframe_records", "inputs"])
def test_each_row_format_matches_mlflow(endpoint, registered, spelled):
    sent = {name: v if isinstance(v, str) else np.asarray(v).tolist() for name, v in payload(row()).items()}
    split = {"columns": list(sent), "data": [list(sent.values())]}
    document = {spelled: split if spelled == "dataframe_split" else [sent], "params": CELLS}
    found = endpoint.post(document).json()
    model = mlflow.pyfunc.load_model(registered.uri)
    response = mlflow.pyfunc.scoring_server.invocations(
        json.dumps(document), "application/json", model, model.metadata.get_input_schema()
    )
    wanted = json.loads(response.response)
    assert list(found) == ["predictions"] and list(found["predictions"][0]) == list(wanted["predictions"][0])
    for name, value in wanted["predictions"][0].items():
        if name == "cell_embeddings":
            assert_close(found["predictions"][0][name], value, atol=1e-6)
        else:
            assert found["predictions"][0][name] == value


def test_row_formats_and_parameter_columns_can_be_mixed(endpoint):
    rows = [payload(row(1)) | {"mode": "cell"}, payload(row(1, layout="dense")) | {"mode": "static"}]
    message = refusal(endpoint.post({"dataframe_records": rows}), 400)
    assert "is missing in some rows: add it there with null" in message
    rows = [{name: one.get(name) for name in rows[0] | rows[1]} for one in rows]
    cell, static = endpoint.post({"dataframe_records": rows, "params": UNPROCESSED}).json()["predictions"]
    assert len(cell["cell_ids"]) == 4 and static["genes"] == GENES[:30]


def test_on_error_record_fails_only_the_bad_row(endpoint):
    rows = [row(1), row(2) | {"adata_var": "{"}, row(3)]
    good, bad, also_good = ask(endpoint, *rows, on_error="record", **CELLS)
    assert bad["error"].startswith("PayloadError: adata_var") and bad["cell_embeddings"] == []
    assert good["error"] is None and len(also_good["cell_ids"]) == 4


def test_concurrent_requests_are_batched(endpoint):
    rows = [row(seed, n_obs=1 + seed % 5) for seed in range(24)]
    alone = [ask(endpoint, one, **CELLS)[0] for one in rows]
    calls, requests_before = (endpoint.metric(f"scgpt_batch_device_batch_requests_{name}") for name in ("count", "sum"))
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda one: ask(endpoint, one, **CELLS)[0], rows))
    for found, wanted in zip(together, alone, strict=True):
        assert found["cell_ids"] == wanted["cell_ids"]
        assert_close(found["cell_embeddings"], wanted["cell_embeddings"], atol=1e-6)
    calls = endpoint.metric("scgpt_batch_device_batch_requests_count") - calls
    assert endpoint.metric("scgpt_batch_device_batch_requests_sum") - requests_before == 24 and calls < 20


def test_mlflow_routes_respond(endpoint):
    assert [requests.get(f"{endpoint.url}/{route}", timeout=9).status_code for route in ("ping", "health")] == [200] * 2
    assert requests.get(f"{endpoint.url}/version", timeout=9).text == mlflow.__version__


# What is refused, and how


@pytest.mark.parametrize(
    ("document", "status", "message"),
    [
        ({}, 400, "exactly one of dataframe_split"),
        ([], 400, "exactly one of dataframe_split"),
        ({"dataframe_records": {"x_data": [1]}}, 400, "list of rows"),
        ({"dataframe_split": {"columns": ["x_data"], "data": [[1, 2]]}}, 400, "row 0 of data"),
        ({"dataframe_records": [], "params": {"mod": "cell"}}, 400, "unknown parameter 'mod'"),
        ({"dataframe_records": [], "params": {"seed": "one"}}, 400, "seed"),
        ({"dataframe_records": [], "client_request_id": "i" * 256}, 200, ""),
        ({"dataframe_records": [], "client_request_id": "i" * 257}, 400, "at most 256 characters"),
        ({"dataframe_records": [], "client_request_id": ["i"]}, 400, "must be a string"),
        ({"dataframe_records": [], "params": {"subset_hvg": None}}, 200, ""),
        ({"dataframe_records": [{"x_data": "1, 2"}]}, 400, "x_data"),
        ({"dataframe_records": [{"adata_obs": None}], "params": {"mode": "fast"}}, 400, "'mode'"),
        ({"dataframe_records": [{"adata_obs": None}], "params": {"nlayers": 12}}, 400, "the checkpoint has 3"),
        ({"dataframe_records": [{"adata_obs": None}], "params": UNPROCESSED}, 400, "row 0: the row is empty"),
        ({"dataframe_records": [{}, {}]}, 400, "no column is an input of the model"),
        ({"dataframe_records": [{"X_DATA": [1.0]}]}, 400, "unknown column 'X_DATA': did you mean 'x_data'"),
        ({"dataframe_records": [{"mode": "cell", "maxlength": 9}]}, 400, "did you mean 'max_length'"),
        ({"inputs": [{"counts": [1.0]}], "params": UNPROCESSED}, 400, "(columns: counts); a row needs x_data"),
        ({"dataframe_records": [], "params": {"genes": ["cd4"] * 100_001}}, 400, "at most 100,000 names"),
        ({"dataframe_records": [{"genes": ["A", "B" * 201]}]}, 400, "a name may have 200 characters, not 201"),
        ({"dataframe_records": [{"genes": ["cd4"]}], "params": UNPROCESSED}, 400, "none of the 1 names"),
        ({"dataframe_records": [{"adata_var": "{", "adata_obs": "{"}]}, 400, "row 0: adata_var is not JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_request_gets_a_message_without_traceback(endpoint, document, status, message):
    answer = endpoint.post(document)
    if status == 200:
        assert answer.status_code == 200
    else:
        assert message in refusal(answer, status)


def test_indices_out_of_range_are_named(endpoint):
    bad = payload(row()) | {"x_indices": np.asarray(row()["x_indices"]) + 1000}
    message = refusal(endpoint.post({"dataframe_records": [bad], "params": CELLS}), 400)
    assert "x_indices contains 10" in message and "are 0 to 30" in message


def names(n):
    index = ",".join(f'"{i}"' for i in range(n))
    return f'{{"columns":[],"index":[{index}],"data":[]}}'


HOSTILE = {
    "100 MB": (lambda: b" " * 100 * MEGABYTE, False, 413, "the body has 100.0 MB; the limit is 16.0 MB"),
    "gzip bomb": (lambda: b"0" * 1000 * MEGABYTE, True, 413, "the decompressed body has more than 16.0 MB"),
    "million columns": (
        lambda: {"dataframe_records": [dict.fromkeys((f"c{i}" for i in range(MEGABYTE)), 1)]},
        False,
        413,
        "a row has 1000000 columns; the limit is 1000",
    ),
    "million genes": (
        lambda: {"dataframe_records": [payload(row()) | {"adata_var": names(MEGABYTE)}]},
        False,
        413,
        "adata_var has 1000000 genes; the limit is 250000",
    ),
    "deep": (lambda: b"[" * 15 * MEGABYTE, False, 400, "not JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_body_is_rejected_by_its_limit(endpoint, name):
    make, packed, status, message = HOSTILE[name]
    body = make()
    body = body if isinstance(body, bytes) else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    body = gzip.compress(body, 1) if packed else body
    answer = endpoint.post(body, **({"Content-Encoding": "gzip"} if packed else {}))
    assert message in refusal(answer, status)  # the message is that of the limit, so nothing was read beyond it


def test_body_without_length_is_cut_at_the_limit(endpoint):
    chunks = (b" " * MEGABYTE for _ in range(40))
    answer = requests.post(
        f"{endpoint.url}/invocations", data=chunks, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert "the limit is 16.0 MB" in refusal(answer, 413)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/csv"}, 415),
        ({"Content-Encoding": "br"}, 415),
        ({"Content-Encoding": "gzip"}, 400),
    ],
    ids=str,
)
def test_other_content_types_are_rejected(endpoint, headers, status):
    refusal(endpoint.post({"dataframe_records": []}, **headers), status)


def test_truncated_gzip_is_rejected(endpoint):
    whole = gzip.compress(b'{"dataframe_records": []}')
    assert endpoint.post(whole, **{"Content-Encoding": "gzip"}).status_code == 200
    for cut in (whole[:-3], whole + b"x"):
        assert "one whole gzip stream" in refusal(endpoint.post(cut, **{"Content-Encoding": "gzip"}), 400)


def test_too_large_response_is_rejected_with_advice(guarded):
    tokens = Vocabulary.from_file(GOLDEN / "checkpoint_flash" / "vocab.json").tokens[:2000]
    document = {"dataframe_records": [payload(to_row(random_adata(3, 2000, genes=tokens)))], "params": UNPROCESSED}
    message = refusal(guarded.post(document), 413)
    assert "the response would have" in message and "restrict `genes`" in message and "batch job" in message
    answer = guarded.post(document | {"params": UNPROCESSED | {"genes": [GENES[4]]}})
    assert answer.json()["predictions"][0]["genes"] == [GENES[4]]


@pytest.mark.parametrize("hidden", ["NaN in var", "long labels", "Ensembl ids"])
def test_response_size_is_not_underestimated(guarded, hidden):
    tokens = Vocabulary.from_file(GOLDEN / "checkpoint_flash" / "vocab.json").tokens[:2000]
    adata, parameters = random_adata(3, 2000, genes=tokens), dict(UNPROCESSED)
    if hidden == "long labels":
        adata, parameters = (
            adata[:, :1000].copy(),
            parameters | {"mode": "contextual", "group_by": "donor", "genes": tokens[:60]},
        )
        adata.obs["donor"] = "x" * 1_000  # repeated for each gene: more than half of the limit
    sent = payload(to_row(adata))
    if hidden == "NaN in var":  # Python's JSON has it, others do not
        rows = ",".join(["[NaN]"] * 2000)
        sent["adata_var"] = f'{{"columns":["a"],"index":{json.dumps(list(tokens))},"data":[{rows}]}}'
    if hidden == "Ensembl ids":
        adata.var["gene_symbols"] = adata.var_names
        adata.var_names = [tokens[0], *(f"ENSG{i:011}" for i in range(1999))]
        sent = payload(to_row(adata))
    message = refusal(guarded.post({"dataframe_records": [sent], "params": parameters}), 413)
    assert "the response would have" in message


def test_row_whose_size_cannot_be_estimated_fails(endpoint):
    broken = row() | {"adata_var": '{"columns":[],"index":["A"],"data":[[]], "more":[]}'}
    assert "row 0: adata_var must be" in refusal(endpoint.post({"dataframe_records": [payload(broken)]}), 400)
    found = ask(endpoint, broken, row(1), on_error="record", **CELLS)
    assert found[0]["error"].startswith("PayloadError: adata_var") and found[1]["error"] is None


def test_response_has_coverage_and_warnings(endpoint):
    (answer,) = ask(endpoint, row(), genes=[GENES[3], "cd4"], **UNPROCESSED)
    assert answer["coverage"] > 0.9
    assert answer["warnings"] == ["1 requested gene is not in the model's vocabulary: cd4"]
    mouse = to_row(random_adata(4, 31, genes=[GENES[0], *(f"Mouse{i}" for i in range(30))]))
    message = refusal(endpoint.post({"dataframe_records": [payload(mouse)], "params": CELLS}), 400)
    assert "row 0: 1 of 31 gene names" in message


def test_slow_request_times_out_with_advice(registered, tmp_path):
    document = {"dataframe_records": [payload(row(n_obs=4000))], "params": CELLS | {"mode": "contextual"}}
    with EndpointProcess(registered.uri, tmp_path, "--timeout-seconds", "0.001") as hasty:  # no machine is that fast
        message = refusal(hasty.post(document), 408)
    assert "0.001 s" in message and "batch job" in message


def test_many_cells_are_rejected_before_computing(guarded):
    heavy = row(n_obs=4000)
    message = refusal(guarded.post({"dataframe_records": [payload(heavy)], "params": CELLS | {"genes": []}}), 413)
    assert "the response would have" in message


def test_requests_above_the_limit_get_429(guarded):
    heavy = {"dataframe_records": [payload(row(n_obs=3000))], "params": CELLS | {"mode": "contextual"}}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: guarded.post(heavy), range(12)))
    assert {answer.status_code for answer in answers} <= {200, 408, 429}
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and all(answer.headers["retry-after"] == "1" for answer in refused)


def test_only_health_routes_work_without_token(guarded):
    for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Bearer s3crét"}):
        for route in ("metrics", "version"):
            refusal(requests.get(f"{guarded.url}/{route}", headers=headers, timeout=9), 401)
        message = refusal(requests.post(f"{guarded.url}/invocations", json={}, headers=headers, timeout=9), 401)
        assert "SCGPT_BATCH_TOKEN" in message
    assert requests.get(f"{guarded.url}/ping", timeout=9).status_code == 200
    assert guarded.session.get(f"{guarded.url}/version", timeout=9).status_code == 200
    assert "s3cr" not in guarded.log.read_text()


def test_native_crash_fails_one_request(registered, tmp_path):
    crashing = str(REPO / "tests" / "faults" / "crashing_fit")  # crashes on fewer than 20 genes
    fit = {"hvg_flavor": "seurat_v3", "subset_hvg": 5, "filter_gene_by_counts": 0}
    few = to_row(random_adata(6, 12, genes=GENES[:12]))
    with EndpointProcess(registered.uri, tmp_path, path=crashing) as endpoint:
        for _ in range(2):  # one crash, and one in the process that follows it
            message = refusal(endpoint.post({"dataframe_records": [payload(few)], "params": fit}), 500)
            assert (
                message == "row 0: the process that computed only this row crashed (signal 11); check or split the row"
            )
        recorded, well = ask(endpoint, few, row(n_obs=200), on_error="record", **fit)
        assert recorded["error"].startswith("WorkerCrash") and well["error"] is None and well["genes"]
        assert endpoint.stop()[0] == 0
    logged = DeltaTable(endpoint.table).to_pyarrow_table()["status_code"].to_pylist()
    assert sorted(logged) == [200, 500, 500]


# Anything at all

SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=9)
ANY = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))
GOOD = {name: v if isinstance(v, str) else np.asarray(v).tolist() for name, v in payload(row(n_obs=2)).items()}
COLUMNS = st.sampled_from([*GOOD, "adata_sparsematrix", *Parameters.model_fields])
BROKEN = st.dictionaries(COLUMNS, ANY, max_size=3).map(lambda wrong: GOOD | wrong)
PARAMS = ANY | st.dictionaries(st.sampled_from([*Parameters.model_fields]), ANY, max_size=3)
DOCUMENTS = st.one_of(
    ANY,
    st.dictionaries(st.sampled_from(["dataframe_split", "dataframe_records", "inputs", "params"]), ANY),
    st.builds(lambda rows, params: {"dataframe_records": rows, "params": params}, st.lists(BROKEN, max_size=3), PARAMS),
    st.builds(
        lambda names, data: {"dataframe_split": {"columns": names, "data": data}},
        st.lists(COLUMNS, max_size=3),
        st.lists(st.lists(ANY, max_size=3), max_size=3),
    ),
)
BODIES = st.one_of(DOCUMENTS.map(lambda document: json.dumps(document).encode()), st.binary(max_size=200))


def test_random_bodies_cause_no_server_error(endpoint):
    sizes, process = [], psutil.Process(endpoint.process.pid)

    @settings(
        max_examples=int(os.environ.get("SCGPT_BATCH_FUZZ", "300")),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(body=BODIES, packed=st.booleans())
    def ask_anything(body, packed):
        answer = endpoint.post(body, packed=packed)
        if answer.status_code != 200:
            assert answer.status_code in REFUSALS
            refusal(answer, answer.status_code)
        json.loads(answer.content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        sizes.append(process.memory_info().rss / 1e6)

    ask_anything()
    third = len(sizes) // 3  # by then caches are full, and what earlier requests took is given back
    assert max(sizes[third:]) < sizes[third] + 50, f"MB held: {sizes[:: len(sizes) // 10]}"


# The client


def test_client_returns_cells_in_order(endpoint, embedder, monkeypatch):
    adata = random_adata(53, len(GENES), genes=GENES)
    wanted = embedder.embed(to_row(adata), Parameters(**CELLS))
    monkeypatch.setattr(client, "CELLS", 10)
    found = client.embed(adata, endpoint.url, progress=False, **CELLS)
    assert found["cell_id"].tolist() == adata.obs_names.tolist()
    assert_close(np.stack(found["embedding"]), wanted.embeddings, atol=1e-6)


def test_client_returns_genes_with_groups(endpoint, embedder):
    adata = random_adata(20, len(GENES), genes=GENES)
    parameters = {"mode": "contextual", "need_preprocess": False, "group_by": "donor", "encoding": "list"}
    found = client.embed(adata, endpoint.url, progress=False, **parameters)
    wanted = embedder.embed(to_row(adata), Parameters(**parameters))
    assert found[["group", "gene", "n_cells"]].values.tolist() == [
        list(each) for each in zip(wanted.groups, wanted.genes, wanted.n_cells, strict=True)
    ]
    assert_close(np.stack(found["embedding"]), wanted.embeddings, atol=1e-6)


def test_client_halves_too_large_requests(guarded, monkeypatch):
    monkeypatch.setenv("SCGPT_BATCH_TOKEN", "s3cret")
    adata = random_adata(600, len(GENES), genes=GENES)
    found = client.embed(adata, guarded.url, progress=False, concurrency=1, **CELLS)
    assert found["cell_id"].tolist() == adata.obs_names.tolist()


def test_client_splits_only_independent_cells(endpoint):
    adata = random_adata(50, len(GENES), genes=GENES)
    assert len(client.embed(adata, endpoint.url, progress=False, request_bytes=3000, **CELLS)) == 50
    with pytest.raises(
        PartsFailed, match=r"50 of 50 cells have no embedding.*can only be split in mode 'cell'.*batch job"
    ):
        client.embed(adata, endpoint.url, progress=False, request_bytes=3000, mode="static")


def test_client_passes_on_model_warnings(endpoint):
    adata = random_adata(6, len(GENES), genes=GENES, dtype=np.float64)
    adata.X = adata.X * 4  # counts, as float64
    with pytest.warns(EmbeddingWarning, match="X looks like counts"):
        found = client.embed(adata, endpoint.url, progress=False, **CELLS)
    assert len(found) == 6 and found.attrs["coverage"] > 0.9
    assert any("X looks like counts" in text for text in found.attrs["warnings"])


def test_client_raises_on_low_coverage(endpoint):
    adata = random_adata(6, len(GENES), genes=[GENES[0], *(f"Mouse{i}" for i in range(30))])
    with pytest.raises(PartsFailed, match=r"6 of 6 cells have no embedding.*1 of 31 gene names"):
        client.embed(adata, endpoint.url, progress=False, **CELLS)


def test_client_makes_repeated_cell_names_unique(endpoint, monkeypatch):
    adata = random_adata(6, len(GENES), genes=GENES)
    adata.obs_names = ["a", "b", "a", "c", "a", "d"]
    monkeypatch.setattr(client, "CELLS", 2)
    with pytest.warns(EmbeddingWarning, match="2 repeated cell names got a suffix"):
        found = client.embed(adata, endpoint.url, progress=False, **CELLS)
    assert found["cell_id"].tolist() == ["a", "b", "a-1", "c", "a-2", "d"]


def test_client_rejects_unknown_parameters(endpoint):
    adata = random_adata(2, len(GENES), genes=GENES)
    with pytest.raises(ConfigError, match="unknown parameter 'mod'"):
        client.embed(adata, endpoint.url, mod="cell")
    with pytest.raises(ConfigError, match="obs has no column 'plate'"):
        client.embed(adata, endpoint.url, mode="contextual", group_by="plate")
    with pytest.raises(ConfigError, match="not the URL of an endpoint"):
        client.embed(adata, "localhost:5000")


class Flaky(BaseHTTPRequestHandler):
    """Databricks as seen from outside, on a bad day: each request fails twice, and cell 3 always."""

    seen: dict[bytes, int] = {}
    headers_seen: list[dict[str, str]] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Flaky.headers_seen.append(dict(self.headers) | {"path": self.path})
        Flaky.seen[body] = Flaky.seen.get(body, 0) + 1
        row = json.loads(body)["dataframe_records"][0]
        cells = json.loads(row["adata_obs"])["index"]
        if "CELL3-1" in cells:
            return self._send(400, {"error_code": "BAD_REQUEST", "message": "no"})
        if Flaky.seen[body] < 3:
            return self._send([429, 503][Flaky.seen[body] - 1], {})
        vectors = np.array([[int(cell[4:-2]), 0] for cell in cells], "<f4")
        packed = base64.b64encode(vectors.tobytes()).decode()
        answer = {"cell_ids": cells, "embeddings_base64": packed, "embedding_dim": 2, "error": None}
        return self._send(200, {"predictions": [answer]})

    def _send(self, status, document):
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_client_retries_without_losing_cells(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Flaky)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(client, "CELLS", 2)
    monkeypatch.setenv("DATABRICKS_TOKEN", "d-token")
    url = f"http://127.0.0.1:{server.server_port}/serving-endpoints/scgpt"
    with pytest.raises(PartsFailed, match=r"2 of 7 cells have no embedding.*cells 2 to 3: HTTP 400: no") as caught:
        client.embed(random_adata(7, 5), url, progress=False, concurrency=1, **CELLS)
    server.shutdown()
    (failure,) = caught.value.failures
    assert (failure.first, failure.last, failure.status) == (2, 4, 400)
    assert caught.value.answered["cell_id"].tolist() == [f"CELL{i}-1" for i in (0, 1, 4, 5, 6)]
    assert np.stack(caught.value.answered["embedding"])[:, 0].tolist() == [0, 1, 4, 5, 6]
    sent = Flaky.headers_seen[0]
    assert sent["Authorization"] == "Bearer d-token" and sent["path"] == "/serving-endpoints/scgpt/invocations"
    assert len(Flaky.headers_seen) == 3 * 3 + 1


# Stopping; last, because it stops the endpoint


def test_graceful_stop_writes_all_records(endpoint):
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, endpoint, row(n_obs=2000), **CELLS | {"mode": "contextual"}) for _ in range(4)]
        while endpoint.metric("scgpt_batch_requests_in_flight") < 4:
            time.sleep(0.01)
        code, printed = endpoint.stop()
        assert all(len(one.result()[0]["genes"]) == 30 for one in answers)
    summary = json.loads(printed.splitlines()[-1])
    table = DeltaTable(endpoint.table).to_pandas()
    assert code == 0 and summary["requests"] == summary["logged"] == len(table)
    assert table["databricks_request_id"].is_unique and set(table["requester"]) == {"127.0.0.1"}
    written = [path for name in ("payload", "payload_spool") for path in (endpoint.table.parent / name).rglob("*")]
    assert written and [path for path in written if path.stat().st_mode & 0o077] == []
    log = endpoint.log.read_text()
    assert "Traceback" not in log and "Bearer" not in log
