"""How the HTTP client logs in: fixed tokens, functions that return one, and workspace clients."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anndata as ad
import numpy as np
import pytest
from databricks.sdk import WorkspaceClient

from scgpt_batch.client import embed
from scgpt_batch.errors import ConfigError, PartsFailed

CELLS = {"mode": "cell", "need_preprocess": False, "encoding": "list", "progress": False, "concurrency": 1}


class Endpoint(ThreadingHTTPServer):
    """Answers requests whose token is in `valid`; others get `rejection`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.valid, self.seen, self.rejection = {"first"}, [], 403


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.respond(200, {})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.seen.append((self.path, token))
        if token not in self.server.valid:
            self.respond(self.server.rejection, {"message": "Invalid access token."})
            return
        names = json.loads(json.loads(body)["dataframe_records"][0]["adata_obs"])["index"]
        vectors = [[1.0, 0.0]] * len(names)
        self.respond(200, {"predictions": [{"error": None, "cell_ids": names, "cell_embeddings": vectors,
                                            "gene_embeddings": None, "embedding_dim": 2}]})  # fmt: skip

    def respond(self, status, document):
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = Endpoint()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(endpoint):
    return f"{endpoint.url}/serving-endpoints/scgpt"


@pytest.fixture
def workspace(endpoint, monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("DATABRICKS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no profile of the machine's user
    return WorkspaceClient(host=endpoint.url, token="first")


@pytest.fixture
def adata():
    names = [f"cell{i}" for i in range(3)]
    return ad.AnnData(np.ones((3, 2), np.float32), obs={"name": names}, var={"name": ["A", "B"]})


def test_function_is_asked_again_when_its_token_expires(endpoint, url, adata):
    tokens = iter(["old", "first", "first"])
    assert len(embed(adata, url, token=lambda: next(tokens), **CELLS)) == 3
    assert [token for _, token in endpoint.seen] == ["old", "first"]


def test_rejected_token_is_sent_once_if_there_is_no_newer_one(endpoint, url, adata):
    for token in ("old", lambda: "old"):
        endpoint.seen.clear()
        with pytest.raises(PartsFailed, match=r"HTTP 403: Invalid access token\."):
            embed(adata, url, token=token, **CELLS)
        assert len(endpoint.seen) == 1


def test_error_of_the_token_function_is_reported(endpoint, url, adata):
    def token():
        raise OSError("vault is sealed")

    with pytest.raises(PartsFailed, match="no token for the endpoint: OSError: vault is sealed"):
        embed(adata, url, token=token, **CELLS)
    assert endpoint.seen == []


def test_workspace_client_logs_in_and_locates_the_endpoint(endpoint, workspace, url, adata):
    for given in ("scgpt", url, f"{url}/invocations"):
        assert len(embed(adata, given, workspace=workspace, **CELLS)) == 3
    assert endpoint.seen == [("/serving-endpoints/scgpt/invocations", "first")] * 3


def test_workspace_credentials_are_not_sent_elsewhere(workspace, adata):
    with pytest.raises(ConfigError, match="is not in the workspace"):
        embed(adata, "http://127.0.0.1:9/serving-endpoints/scgpt", workspace=workspace, **CELLS)


@pytest.mark.parametrize("token", ["first\n", lambda: "first\n"], ids=["text", "function"])
def test_token_read_from_a_file_may_end_with_a_line_break(url, token):
    adata = ad.AnnData(np.ones((2, 3), np.float32))
    assert len(embed(adata, url, token=token, **CELLS)) == 2
