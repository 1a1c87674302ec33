"""Ask an endpoint, the local one or Databricks', for the embeddings of an AnnData.

embed(adata, "http://127.0.0.1:5000", mode="cell", need_preprocess=False)
embed(adata, "https://WORKSPACE/serving-endpoints/NAME", mode="static", data_is_raw=True, log1p=True)
"""

import gzip
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anndata as ad
import numpy as np
import orjson
import pandas as pd
import requests
from requests.adapters import HTTPAdapter
from tqdm.auto import tqdm
from urllib3.util import Retry

from scgpt_batch.errors import ConfigError, EmbeddingWarning, PartsFailed, PayloadError
from scgpt_batch.inference.results import unpack
from scgpt_batch.io.rows import PAYLOAD_COLUMNS, to_row, unique_cell_names
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.gene_names import lookup_columns

REQUEST_BYTES = 16_000_000  # of a request's body at Databricks, and at the local endpoint
CELLS = 2_000  # of one request at most: their vectors in base64 take 6 MB at d 512
TOO_LARGE = 413
WARNINGS = 20  # that a call shows
RETRIED = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Failure:
    """Cells without an answer: their positions in the AnnData, the HTTP status (None: no answer came), and why."""

    first: int
    last: int
    status: int | None
    message: str


class _Refused(Exception):
    """What the endpoint answered instead of embeddings."""

    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(message)
        self.status = status


def embed(
    adata: ad.AnnData,
    url: str,
    *,
    token: str | None = None,
    concurrency: int = 4,
    retries: int = 5,
    timeout_seconds: float = 300.0,
    request_bytes: int = REQUEST_BYTES,
    progress: bool = True,
    **parameters: Any,
) -> pd.DataFrame:
    """Embed an AnnData by HTTP.

    In cell mode with `need_preprocess` false, where a cell's vector depends on the cell alone, the cells are sent in
    as many requests as the limits want. Elsewhere filters, variable genes and means are those of the whole row, so it
    goes in one request or not at all.

    Parameters
    ----------
    adata
        Cells × genes. Of obs and var travel the names and the columns that the parameters name, nothing else.
    url
        Of the endpoint; `/invocations` is added.
    token
        Bearer token; by default from the environment: DATABRICKS_TOKEN for a `/serving-endpoints/` URL, else
        SCGPT_BATCH_TOKEN.
    concurrency
        Requests at once.
    retries
        How often a request is tried again, with growing pauses, after 429, 5xx or a broken connection.
    timeout_seconds
        For one request.
    request_bytes
        What a request's body may hold before compression.
    progress
        Show a bar on standard error.
    parameters
        Those of the model (`scgpt_batch.parameters.Parameters`). `encoding` is float32_base64 unless given.

    Returns
    -------
    The columns of the embedding tables, in the order of the cells: `cell_id`, `embedding`; or `group`, `gene`,
    `embedding`, `n_cells`. Embeddings are float32 (float16 with that encoding). `attrs` has the model's `warnings`
    and the smallest `coverage` of a request: the share of its counts in known genes.

    Warns
    -----
    EmbeddingWarning
        For each of the model's warnings, such as genes that are unknown or values that look scaled.

    Raises
    ------
    ConfigError
        An unknown or impossible parameter, or a URL that is none.
    PartsFailed
        Some cells, listed with the reason in `failures`, have no answer; the others' are in `answered`. One reason is
        LowCoverage: known genes carry less than `min_coverage` (0.2) of the counts.
    """
    asked = Parameters.create({"encoding": "float32_base64"}, parameters)
    document = {"params": {**parameters, "encoding": asked.encoding}}
    session = _session(url, token, retries, concurrency)
    lean, renamed = _lean(adata, asked)
    ask = _Asker(session, _invocations(url), timeout_seconds, request_bytes, lean, asked, document)
    most = CELLS if ask.may_split else max(adata.n_obs, 1)
    parts = [(first, min(first + most, adata.n_obs)) for first in range(0, adata.n_obs, most)]
    found: list[pd.DataFrame] = []
    failures: list[Failure] = []
    with (
        session,
        ThreadPoolExecutor(concurrency) as pool,
        tqdm(total=adata.n_obs, unit="cell", disable=not progress) as bar,
    ):
        for (first, last), (answered, failed) in zip(parts, pool.map(ask, parts), strict=True):
            found += answered
            failures += failed
            bar.update(last - first)
    told = _distinct_warnings([renamed, *(text for part in found for text in part.attrs["warnings"])])
    coverage = [part.attrs["coverage"] for part in found if part.attrs["coverage"] is not None]
    for part in found:
        part.attrs = {}
    answer = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
    answer.attrs = {"warnings": told, "coverage": min(coverage, default=None)}
    for text in told:
        warnings.warn(text, EmbeddingWarning, stacklevel=2)
    if failures:
        raise PartsFailed(_told(failures, adata.n_obs), failures=failures, answered=answer)
    return answer


def _lean(adata: ad.AnnData, asked: Parameters) -> tuple[ad.AnnData, str | None]:
    """Keep the matrix and those columns that the model may look at; say which cell names were changed."""
    obs = [name for name in {asked.group_by, asked.batch_key} if name]
    missing = [name for name in obs if name not in adata.obs]
    if missing:
        raise ConfigError(f"obs has no column {missing[0]!r}")
    names, warning = unique_cell_names(adata.obs_names)  # over all cells: a request may hold some of them
    uns = {"log1p": adata.uns["log1p"]} if "log1p" in adata.uns else {}
    lean = ad.AnnData(
        adata.X, obs=adata.obs[obs].set_axis(names), var=adata.var[lookup_columns(adata.var.columns)], uns=uns
    )
    return lean, warning


def _distinct_warnings(texts: Iterable[str | None]) -> list[str]:
    """Return each warning once; requests for many cells may have too many to read."""
    distinct = list(dict.fromkeys(filter(None, texts)))
    more = len(distinct) - WARNINGS
    return distinct[:WARNINGS] + ([f"{more} further warnings are not shown"] if more > 0 else [])


@dataclass(frozen=True)
class _Asker:
    """Sends cells from a position to a position; halves what is too large, where it may be halved."""

    session: requests.Session
    url: str
    timeout_seconds: float
    request_bytes: int
    adata: ad.AnnData
    asked: Parameters
    document: dict[str, Any]

    @property
    def may_split(self) -> bool:
        """Whether a cell's answer depends on the cell alone."""
        return self.asked.mode == "cell" and not self.asked.need_preprocess

    def __call__(self, part: tuple[int, int]) -> tuple[list[pd.DataFrame], list[Failure]]:
        first, last = part
        try:
            body, told = self._body(first, last)
            found = self._ask(body)
            found.attrs["warnings"] = told + found.attrs["warnings"]
            return [found], []
        except _Refused as exc:
            if exc.status != TOO_LARGE or last - first < 2 or not self.may_split:
                return [], [Failure(first, last, exc.status, str(exc))]
        middle = (first + last) // 2
        left, right = self((first, middle)), self((middle, last))
        return left[0] + right[0], left[1] + right[1]

    def _body(self, first: int, last: int) -> tuple[bytes, list[str]]:
        """Return a request for some cells, and what was changed to make it."""
        told: list[str] = []
        try:
            row = to_row(self.adata[first:last], warnings=told)
        except PayloadError as exc:
            raise _Refused(None, str(exc)) from exc
        payload = {name: row[name] for name in PAYLOAD_COLUMNS if row[name] is not None}
        body = orjson.dumps({"dataframe_records": [payload], **self.document}, option=orjson.OPT_SERIALIZE_NUMPY)
        if len(body) > self.request_bytes:
            raise _Refused(
                TOO_LARGE,
                f"the request holds {len(body) / 1e6:.1f} MB, the limit {self.request_bytes / 1e6:.1f} MB, and cells "
                "cannot be sent apart but in mode 'cell' with need_preprocess false: drop genes or cells, or run the "
                "batch job (scgpt-batch embed)",
            )
        return body, told

    def _ask(self, body: bytes) -> pd.DataFrame:
        headers = {"Content-Type": "application/json"}
        if not _is_databricks(self.url):  # which nowhere says that it takes it
            body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
        try:
            answer = self.session.post(self.url, data=body, headers=headers, timeout=(10, self.timeout_seconds))
        except requests.RequestException as exc:
            raise _Refused(None, f"no answer: {exc}") from exc
        if answer.status_code != 200:
            raise _Refused(answer.status_code, _message(answer))
        try:
            (prediction,) = orjson.loads(answer.content)["predictions"]
            found = _frame(prediction, self.asked)
        except (ValueError, KeyError, TypeError) as exc:
            raise _Refused(200, f"an answer of another form than this package's model gives: {exc}") from exc
        # versions registered earlier give neither
        found.attrs = {"warnings": prediction.get("warnings") or [], "coverage": prediction.get("coverage")}
        return found


def _frame(prediction: dict[str, Any], asked: Parameters) -> pd.DataFrame:
    if prediction["error"] is not None:
        raise _Refused(200, prediction["error"])
    if asked.encoding == "list":
        nested = prediction["cell_embeddings"] or prediction["gene_embeddings"]
        vectors = np.array(nested, np.float32).reshape(-1, prediction["embedding_dim"])
    else:
        vectors = unpack(prediction["embeddings_base64"], asked.encoding, prediction["embedding_dim"])
    if asked.mode == "cell":
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


def _session(url: str, token: str | None, retries: int, concurrency: int) -> requests.Session:
    """Make a session that pauses and tries again; a Retry-After of the endpoint is kept to."""
    retry = Retry(
        total=retries,
        backoff_factor=0.5,
        backoff_jitter=0.5,
        status_forcelist=RETRIED,
        allowed_methods=None,  # POST too: asking twice changes nothing
        raise_on_status=False,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=concurrency))
    token = token or os.environ.get("DATABRICKS_TOKEN" if _is_databricks(url) else "SCGPT_BATCH_TOKEN")
    if token:
        session.headers["Authorization"] = f"Bearer {token}"
    return session


def _is_databricks(url: str) -> bool:
    return "/serving-endpoints/" in urlsplit(url).path


def _invocations(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{url!r} is no endpoint: give http://… or https://…/serving-endpoints/NAME")
    return url.rstrip("/").removesuffix("/invocations") + "/invocations"


def _message(answer: requests.Response) -> str:
    try:
        told = orjson.loads(answer.content)
        return str(told.get("message") or told)[:2000]
    except (orjson.JSONDecodeError, AttributeError):
        return answer.text[:2000]


def _told(failures: list[Failure], n_obs: int) -> str:
    cells = sum(failure.last - failure.first for failure in failures)
    first = failures[0]
    status = "no answer" if first.status is None else f"HTTP {first.status}"
    return (
        f"{cells} of {n_obs} cells have no answer, in {len(failures)} requests; "
        f"first cells {first.first} to {first.last - 1}: {status}: {first.message}"
    )
