"""Embeddings of an AnnData from an HTTP endpoint: one started by `scgpt-batch serve`, or one on Databricks."""

import gzip
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anndata as ad
import numpy as np
import orjson
import pandas as pd
import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from tqdm.auto import tqdm
from urllib3.util import Retry

from scgpt_batch.errors import ConfigError, EmbeddingWarning, PartsFailed, PayloadError, listed
from scgpt_batch.inference.results import unpack
from scgpt_batch.io.rows import PAYLOAD_COLUMNS, to_row, unique_cell_names
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.gene_names import lookup_columns

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient

REQUEST_BYTES = 16_000_000  # limit of a request body, on Databricks and on the local endpoint
CELLS = 2_000  # maximum cells per request; their vectors take 6 MB in base64 at 512 dimensions
TOO_LARGE = 413
WARNINGS = 20  # maximum number of warnings shown per call
RETRIED = (429, 500, 502, 503, 504)
REJECTED_LOGINS = (401, 403)  # Databricks returns either for an expired token
MESSAGE_LENGTH = 2_000  # characters quoted from an error response


@dataclass(frozen=True)
class Failure:
    """A range of cells without embeddings.

    Attributes
    ----------
    first, last
        Positions in the AnnData; `last` is exclusive.
    status
        HTTP status; None if there was no response.
    message
        The reason.
    """

    first: int
    last: int
    status: int | None
    message: str


class _RequestFailed(Exception):
    """A request returned no embeddings."""

    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(message)
        self.status = status


def embed(
    adata: ad.AnnData,
    url: str,
    *,
    token: str | Callable[[], str] | None = None,
    workspace: "WorkspaceClient | None" = None,
    concurrency: int = 4,
    retries: int = 5,
    timeout_seconds: float = 300.0,
    request_bytes: int = REQUEST_BYTES,
    progress: bool = True,
    **parameters: Any,
) -> pd.DataFrame:
    """Return the embeddings of an AnnData, computed by an HTTP endpoint.

    In cell mode with `need_preprocess=False`, the vector of a cell depends only on that cell. The cells are then split
    over several requests, each within the size limits. In all other cases filters, variable genes and means depend on
    all cells, so the AnnData is sent in a single request, which fails if it is too large.

    Parameters
    ----------
    adata
        Cells × genes. Only the matrix, the names, and the obs and var columns that the model needs are sent.
    url
        URL of the endpoint; `/invocations` is added if it is missing. With `workspace`, also the endpoint's name.
    token
        Bearer token, or a function that returns one. The function is called for each request, from several threads, so
        that a call may outlive a token. Default: the environment variable DATABRICKS_TOKEN if the URL contains
        `/serving-endpoints/`, else SCGPT_BATCH_TOKEN.
    workspace
        A `databricks.sdk.WorkspaceClient`, whose credentials are used instead of a token. It refreshes OAuth tokens.
    concurrency
        Maximum number of concurrent requests.
    retries
        How often a request is repeated after status 429, 5xx or a broken connection, with increasing delays.
    timeout_seconds
        Time limit of one request, in seconds.
    request_bytes
        Maximum size of a request body before compression, in bytes.
    progress
        Whether to show a progress bar on standard error.
    parameters
        Parameters of the model, see `scgpt_batch.parameters.Parameters`. The default of `encoding` is "float32_base64".

    Returns
    -------
    DataFrame
        With the columns `cell_id` and `embedding` (mode "cell"), or `group`, `gene`, `embedding` and `n_cells`; cells
        keep their order. Embeddings are float32, or float16 if `encoding` says so. `attrs["warnings"]` has the model's
        warnings. `attrs["coverage"]` is the share of counts in genes of the vocabulary, the minimum over requests.

    Warns
    -----
    EmbeddingWarning
        Once for each warning of the model, such as unknown genes or values that look scaled.

    Raises
    ------
    ConfigError
        A parameter or the URL is invalid, obs lacks a column that a parameter names, or the URL is not in `workspace`.
    PartsFailed
        Some cells have no embeddings; `failures` lists them with the reasons, and `answered` has the embeddings of the
        others.

    Examples
    --------
    >>> adata = anndata.read_h5ad("pbmc3k.h5ad")
    >>> cells = embed(adata, "http://127.0.0.1:5000", mode="cell", need_preprocess=False)
    >>> genes = embed(adata, "scgpt", workspace=WorkspaceClient(), mode="static", data_is_raw=True, log1p=True)
    """
    request = Parameters.create({"encoding": "float32_base64"}, parameters)
    document = {"params": {**parameters, "encoding": request.encoding}}
    url = _invocations(url, workspace)
    session = _session(_login(url, token, workspace), retries, concurrency)
    reduced, renamed = _reduced(adata, request)
    sender = _Sender(session, url, timeout_seconds, request_bytes, reduced, request, document)
    most = CELLS if sender.may_split else max(adata.n_obs, 1)
    parts = [(first, min(first + most, adata.n_obs)) for first in range(0, adata.n_obs, most)]
    found: list[pd.DataFrame] = []
    failures: list[Failure] = []
    with (
        session,
        ThreadPoolExecutor(concurrency) as pool,
        tqdm(total=adata.n_obs, unit="cell", disable=not progress) as bar,
    ):
        for (first, last), (embedded, failed) in zip(parts, pool.map(sender, parts), strict=True):
            found += embedded
            failures += failed
            bar.update(last - first)
    result = _joined(found, renamed)
    for text in result.attrs["warnings"]:
        warnings.warn(text, EmbeddingWarning, stacklevel=2)
    if failures:
        raise PartsFailed(_summary(failures, adata.n_obs), failures=failures, answered=result)
    return result


def _joined(parts: list[pd.DataFrame], renamed: str | None) -> pd.DataFrame:
    """Join the results of several requests; `attrs` has their warnings and the smallest coverage."""
    messages = _distinct_warnings([renamed, *(text for part in parts for text in part.attrs["warnings"])])
    coverage = [part.attrs["coverage"] for part in parts if part.attrs["coverage"] is not None]
    for part in parts:
        part.attrs = {}  # pandas compares the attrs of all parts when it concatenates them
    result = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    result.attrs = {"warnings": messages, "coverage": min(coverage, default=None)}
    return result


def _reduced(adata: ad.AnnData, request: Parameters) -> tuple[ad.AnnData, str | None]:
    """Return the AnnData with only what the model needs, and a warning if cell names had to be made unique."""
    obs = [name for name in {request.group_by, request.batch_key} if name]
    missing = [name for name in obs if name not in adata.obs]
    if missing:
        raise ConfigError(f"obs has no column {missing[0]!r}; its columns: {listed(adata.obs.columns, missing[0])}")
    names, warning = unique_cell_names(adata.obs_names)  # of all cells, because one request may have only some of them
    uns = {"log1p": adata.uns["log1p"]} if "log1p" in adata.uns else {}
    reduced = ad.AnnData(
        adata.X, obs=adata.obs[obs].set_axis(names), var=adata.var[lookup_columns(adata.var.columns)], uns=uns
    )
    return reduced, warning


def _distinct_warnings(texts: Iterable[str | None]) -> list[str]:
    """Return each warning once, and at most `WARNINGS` of them."""
    distinct = list(dict.fromkeys(filter(None, texts)))
    more = len(distinct) - WARNINGS
    return distinct[:WARNINGS] + ([f"{more} further warnings are not shown"] if more > 0 else [])


@dataclass(frozen=True)
class _Sender:
    """Sends ranges of cells to the endpoint. A range that is too large is halved, if the mode allows it."""

    session: requests.Session
    url: str
    timeout_seconds: float
    request_bytes: int
    adata: ad.AnnData
    parameters: Parameters
    document: dict[str, Any]

    @property
    def may_split(self) -> bool:
        """Whether the result of a cell depends only on that cell."""
        return self.parameters.mode == "cell" and not self.parameters.need_preprocess

    def __call__(self, part: tuple[int, int]) -> tuple[list[pd.DataFrame], list[Failure]]:
        first, last = part
        try:
            body, messages = self._body(first, last)
            found = self._post(body)
            found.attrs["warnings"] = messages + found.attrs["warnings"]
            return [found], []
        except _RequestFailed as exc:
            if exc.status != TOO_LARGE or last - first < 2 or not self.may_split:
                return [], [Failure(first, last, exc.status, str(exc))]
        middle = (first + last) // 2
        lower, upper = self((first, middle)), self((middle, last))
        return lower[0] + upper[0], lower[1] + upper[1]

    def _body(self, first: int, last: int) -> tuple[bytes, list[str]]:
        """Return the request body for a range of cells, and warnings about values that were changed."""
        messages: list[str] = []
        try:
            row = to_row(self.adata[first:last], warnings=messages)
        except PayloadError as exc:
            raise _RequestFailed(None, str(exc)) from exc
        payload = {name: row[name] for name in PAYLOAD_COLUMNS if row[name] is not None}
        body = orjson.dumps({"dataframe_records": [payload], **self.document}, option=orjson.OPT_SERIALIZE_NUMPY)
        if len(body) > self.request_bytes:
            raise _RequestFailed(
                TOO_LARGE,
                f"the request has {len(body) / 1e6:.1f} MB, the limit is {self.request_bytes / 1e6:.1f} MB. Requests "
                "can only be split in mode 'cell' with need_preprocess false: drop genes or cells, or run the batch "
                "job (scgpt-batch embed)",
            )
        return body, messages

    def _post(self, body: bytes) -> pd.DataFrame:
        headers = {"Content-Type": "application/json"}
        if not _is_databricks(self.url):  # Databricks does not document that it accepts compressed requests
            body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
        response = self._send(body, headers)
        if response.status_code in REJECTED_LOGINS and self._has_new_token(response):
            response = self._send(body, headers)
        if response.status_code != 200:
            raise _RequestFailed(response.status_code, _message(response))
        try:
            (prediction,) = orjson.loads(response.content)["predictions"]
            found = _frame(prediction, self.parameters)
        except (ValueError, KeyError, TypeError) as exc:
            raise _RequestFailed(
                200, f"unexpected response ({type(exc).__name__}: {exc}); does {self.url} serve an scgpt_batch model?"
            ) from exc
        # models registered by earlier versions return neither warnings nor coverage
        found.attrs = {"warnings": prediction.get("warnings") or [], "coverage": prediction.get("coverage")}
        return found

    def _send(self, body: bytes, headers: dict[str, str]) -> requests.Response:
        try:
            return self.session.post(self.url, data=body, headers=headers, timeout=(10, self.timeout_seconds))
        except requests.RequestException as exc:
            raise _RequestFailed(None, f"no response from {self.url}: {exc}") from exc

    def _has_new_token(self, response: requests.Response) -> bool:
        """Return whether the token of a rejected request has been replaced since; retries keep a request's headers."""
        if not isinstance(self.session.auth, _Login):
            return False
        sent = response.request.headers
        return any(sent.get(name) != value for name, value in self.session.auth.headers().items())


def _frame(prediction: dict[str, Any], parameters: Parameters) -> pd.DataFrame:
    if prediction["error"] is not None:
        raise _RequestFailed(200, prediction["error"])
    if parameters.encoding == "list":
        nested = prediction["cell_embeddings"] or prediction["gene_embeddings"]
        vectors = np.array(nested, np.float32).reshape(-1, prediction["embedding_dim"])
    else:
        vectors = unpack(prediction["embeddings_base64"], parameters.encoding, prediction["embedding_dim"])
    if parameters.mode == "cell":
        return pd.DataFrame({"cell_id": prediction["cell_ids"], "embedding": list(vectors)})
    genes = prediction["genes"]
    return pd.DataFrame(
        {
            "group": prediction["groups"] or [""] * len(genes),
            "gene": genes,
            "embedding": list(vectors),
            "n_cells": prediction["n_cells"],
        }
    )


class _Login(AuthBase):
    """Adds login headers to a request; reads them anew for each request, because tokens expire."""

    def __init__(self, headers: Callable[[], Mapping[str, str]]) -> None:
        self._headers = headers

    def headers(self) -> dict[str, str]:
        """Return the present headers."""
        try:
            return dict(self._headers())
        except Exception as exc:  # the caller's function and the SDK's credentials raise anything
            raise _RequestFailed(None, f"no token for the endpoint: {type(exc).__name__}: {exc}") from exc

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers.update(self.headers())
        return request


def _login(url: str, token: str | Callable[[], str] | None, workspace: "WorkspaceClient | None") -> _Login | None:
    if workspace is not None:
        return _Login(workspace.config.authenticate)
    if callable(token):
        current = token
        return _Login(lambda: {"Authorization": f"Bearer {current().strip()}"})
    fixed = (token or os.environ.get("DATABRICKS_TOKEN" if _is_databricks(url) else "SCGPT_BATCH_TOKEN", "")).strip()
    return _Login(lambda: {"Authorization": f"Bearer {fixed}"}) if fixed else None


def _session(login: _Login | None, retries: int, concurrency: int) -> requests.Session:
    """Return a session that retries failed requests with increasing delays, and honours Retry-After headers."""
    retry = Retry(
        total=retries,
        backoff_factor=0.5,
        backoff_jitter=0.5,
        status_forcelist=RETRIED,
        allowed_methods=None,  # includes POST, because the request is idempotent
        raise_on_status=False,
    )
    session = requests.Session()
    session.auth = login
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=concurrency))
    return session


def _is_databricks(url: str) -> bool:
    return "/serving-endpoints/" in urlsplit(url).path


def _invocations(url: str, workspace: "WorkspaceClient | None") -> str:
    """Return the URL of an endpoint's `/invocations`; a workspace's credentials are sent to that workspace only."""
    host = str(workspace.config.host).rstrip("/") if workspace is not None else ""
    if host and "/" not in url:
        url = f"{host}/serving-endpoints/{url}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{url!r} is not the URL of an endpoint: use http://… or https://…/serving-endpoints/NAME")
    if host and f"{parts.scheme}://{parts.netloc}" != host:
        raise ConfigError(f"{url!r} is not in the workspace {host}: give the endpoint's name, or a token for that URL")
    return url.rstrip("/").removesuffix("/invocations") + "/invocations"


def _message(response: requests.Response) -> str:
    try:
        document = orjson.loads(response.content)
        return str(document.get("message") or document)[:MESSAGE_LENGTH]
    except (orjson.JSONDecodeError, AttributeError):
        return response.text[:MESSAGE_LENGTH]


def _summary(failures: list[Failure], n_obs: int) -> str:
    cells = sum(failure.last - failure.first for failure in failures)
    first = failures[0]
    status = "" if first.status is None else f"HTTP {first.status}: "
    return (
        f"{cells} of {n_obs} cells have no embedding ({len(failures)} failed requests); "
        f"first cells {first.first} to {first.last - 1}: {status}{first.message}"
    )
