"""The settings of each command: names, defaults and help, from which the command line's flags are made.

A flag wins over the environment (`SCGPT_BATCH_` and the name in capitals), the environment over the file.
"""

import re
from ipaddress import ip_address
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Settings(BaseModel):
    """What every command takes. Frozen; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tracking_uri: str = Field("", description="MLflow tracking URI; empty: MLflow's own environment variables")
    registry_uri: str = Field("", description="MLflow registry URI, such as databricks-uc; empty: MLflow's own")
    spark_conf: dict[str, str] = Field({}, description="Spark settings of a local session, name=value")

    @field_validator("spark_conf", mode="before")
    @classmethod
    def _as_spark_writes_it(cls, conf: Any) -> Any:
        """Accept YAML's numbers and booleans as the words that Spark takes."""
        if not isinstance(conf, dict):
            return conf
        words = {name: str(v).lower() if isinstance(v, bool) else str(v) for name, v in conf.items()
                 if isinstance(v, bool | int | float)}  # fmt: skip
        return conf | words


class DemoCheckpointSettings(Settings):
    """Make a small checkpoint in the published layout from data (not the published weights)."""

    h5ad: str = Field(description=".h5ad with raw counts, cells × genes")
    out: str = Field(description="folder to write")


class IngestSettings(Settings):
    """Turn files into rows of serialized AnnData."""

    input: tuple[str, ...] = Field(
        description="files, folders, globs or URIs: .h5ad, .zarr, .h5mu, 10x .h5, 10x mtx folder", min_length=1
    )
    table: str = Field(description="adata_rows table: catalog.schema.table or delta.`path`")
    cells_per_row: int = Field(1000, ge=1, description="cells of one row at most")
    split_by: str = Field("", description="obs column: cells of different values never share a row")
    gene_symbols: str = Field("", description="var column that holds the gene symbols, where var_names are Ensembl ids")
    layer: str = Field("auto", description="matrix to read: X, raw, a layer's name, or auto: the first with counts")
    sample_id: str = Field("file", description="one sample a file (and --split-by group), an obs column, or none")
    id_from: Literal["name", "parent", "path"] = Field(
        "name", description="ids of rows start with the file's name, its folder and name, or its whole path"
    )
    max_failed_fraction: float = Field(0.1, ge=0, le=1, description="exit code 3 when more of the files fail")


class RegisterSettings(Settings):
    """Log and register the model, and check that it serves."""

    checkpoint: str = Field(description="folder with best_model.pt (or .safetensors), args.json and vocab.json")
    name: str = Field(description="registered model: name, or catalog.schema.name")
    alias: str = Field("", description="alias to set on the new version, such as champion")
    input_roots: tuple[str, ...] = Field((), description="folders below which input_data_path may read; default none")
    experiment: str = Field("", description="MLflow experiment; empty: MLflow's default")


class EmbedSettings(Settings):
    """Embed the rows that have no result yet, Delta to Delta."""

    model_uri: str = Field(description="models:/name/version, models:/name@alias or a path")
    input_table: str = Field(description="adata_rows table")
    output_table: str = Field(description="gene_embeddings (or cell_embeddings) table; made if it is not there")
    ledger_table: str = Field("", description="what happened to each row; empty: output table + _ledger")
    runs_table: str = Field("", description="one row a run; empty: output table + _runs")
    max_failed_fraction: float = Field(0.1, ge=0, le=1, description="exit code 3 when more of the run's rows fail")
    allow_other_code: bool = Field(
        False, description="run even if the installed package's numbers differ from those the model was registered with"
    )
    retry_failed: bool = Field(False, description="take rows again that failed with the same content and parameters")
    wave_cells: int = Field(200_000, ge=1, description="cells of a wave: what a killed run has to do again at most")
    row_timeout: float = Field(3600, gt=0, description="seconds without an answer until a row is given up as Timeout")
    prune: int = Field(0, ge=0, description="keep this many newest versions of each model in the output; 0: all")
    plan: bool = Field(False, description="say what would be done, and do nothing")
    trigger: Literal["", "available-now"] = Field(
        "", description="available-now: take what a stream over the input table finds new since the last time"
    )
    checkpoint_location: str = Field("", description="folder where the stream remembers what it has read")
    experiment: str = Field("", description="MLflow experiment; empty: MLflow's default")

    @model_validator(mode="after")
    def _works(self) -> Self:
        if bool(self.trigger) != bool(self.checkpoint_location):
            raise ValueError("trigger and checkpoint_location go together: give both, or neither")
        return self


class SummarySettings(Settings):
    """Say what an embeddings table holds, and the nearest genes of some."""

    output_table: str = Field(description="gene_embeddings table")
    genes: tuple[str, ...] = Field(("CD3D", "MS4A1", "LYZ", "NKG7"), description="genes to show the neighbours of")
    neighbours: int = Field(5, ge=1, description="how many")


class MonitorSettings(Settings):
    """Judge the health of an endpoint and of the batch job, from their tables."""

    inference_table: str = Field("", description="the endpoint's inference table, of any generation")
    requests_view: str = Field(
        "", description="view of its requests to make anew, which dashboard and alerts read; empty: none that stays"
    )
    output_table: str = Field("", description="the batch job's embeddings; empty: those of the last run")
    runs_table: str = Field("", description="its runs; empty: output table + _runs")
    ledger_table: str = Field("", description="its ledger; empty: output table + _ledger")
    report: str = Field("", description="HTML file to write, complete in itself")
    fail_on: Literal["warning", "critical"] = Field("critical", description="exit code 4 for alerts from here on")
    hours: float = Field(24, gt=0, description="requests of how many hours are judged")
    days: int = Field(7, ge=2, description="of how many days traffic is compared, and the report tells")
    delay_minutes: int = Field(60, ge=0, description="how late requests may come into the inference table")
    max_error_rate: float = Field(0.05, ge=0, le=1, description="share of requests that may end in a server error")
    max_client_error_rate: float = Field(
        0.25, ge=0, le=1, description="share of requests that may end in a client error (status 4xx)"
    )
    min_errors: int = Field(5, ge=1, description="fewer server or client errors are not judged by their share")
    max_p95_ms: float = Field(10_000, gt=0, description="95th percentile of the duration, ms")
    slow_ms: int = Field(5_000, gt=0, description="the report names requests from here on, ms")
    min_volume: float = Field(0.5, ge=0, description="least requests of an hour, as share of the same hour's usual")
    min_usual_requests: float = Field(20, ge=0, description="hours with fewer usual requests are not judged by volume")
    max_run_age_hours: float = Field(26, gt=0, description="since the batch job last finished")
    max_failed_fraction: float = Field(0.1, ge=0, le=1, description="share of a run's rows that may fail")
    max_cosine: float = Field(0.999, gt=0, le=1, description="mean cosine of a run's vectors, above it they are alike")

    @model_validator(mode="after")
    def _works(self) -> Self:
        if self.requests_view and not self.inference_table:
            raise ValueError("requests_view needs inference_table: a view of which table's requests?")
        return self


class MaintainSettings(Settings):
    """Keep a Delta table, its ledger and runs small: delete old rows, cluster and compact files, remove old ones."""

    table: str = Field(description="inference, embeddings, ledger or any other Delta table")
    date_column: str = Field("", description="date or timestamp column; empty: no rows are deleted")
    retain_days: int = Field(90, ge=1, description="rows older than this are deleted, by date_column")
    cluster_by: str = Field("", description="column to cluster files by from now on, such as gene; empty: as it is")
    vacuum_hours: int = Field(168, ge=0, description="files that no version of so many hours needs are removed")
    force: bool = Field(False, description="allow vacuum_hours below 168: running readers and time travel may break")

    @model_validator(mode="after")
    def _works(self) -> Self:
        if "retain_days" in self.model_fields_set and not self.date_column:
            raise ValueError("--retain-days needs --date-column: which column says how old a row is?")
        return self


class ServeSettings(Settings):
    """Serve the model over HTTP, with an inference table, until stopped."""

    model_uri: str = Field(description="models:/name/version, models:/name@alias or a path")
    host: str = Field(
        "127.0.0.1", description="address to listen on; before opening it to others set SCGPT_BATCH_TOKEN"
    )
    port: int = Field(5000, ge=0, le=65535, description="port to listen on; 0: a free one, which the log names")
    inference_table: str = Field(
        "delta.`inference_payload`", description="delta.`path` for requests and answers, made if not there; none: off"
    )
    spool: str = Field("", description="local folder of records not yet in the table; empty: the table's path + _spool")
    flush_seconds: float = Field(10.0, gt=0, description="how often the spool is brought to the table")
    max_request_bytes: int = Field(16_000_000, ge=1, description="of a request's body, also when inflated")
    max_answer_bytes: int = Field(16_000_000, ge=1, description="of an answer; larger ones are refused unanswered")
    timeout_seconds: float = Field(297.0, gt=0, description="for one request")
    max_concurrent: int = Field(64, ge=1, description="requests computed at once; further ones get 429")
    max_connections: int = Field(1000, ge=1, description="open connections; further ones get 503 and are closed")
    header_seconds: float = Field(10.0, gt=0, description="for a connection to send a complete header")
    body_seconds: float = Field(60.0, gt=0, description="for a request's body to arrive")
    shutdown_seconds: float = Field(
        30.0, gt=0, description="for running requests after SIGTERM; then they are cancelled"
    )
    trusted_proxies: tuple[str, ...] = Field(
        (), description="addresses whose X-Forwarded-For header names the requester in the log; default none"
    )
    allow_without_token: bool = Field(
        False,
        description="listen on other addresses than loopback without a token: a proxy or firewall keeps others out",
    )
    batch_wait_ms: float = Field(5.0, ge=0, description="how long a request waits for others to share the device with")

    @field_validator("trusted_proxies")
    @classmethod
    def _are_addresses(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ip_address(proxy)) for proxy in proxies)


class PromoteSettings(Settings):
    """Make the challenger champion, if it answers right, fast and like the champion."""

    name: str = Field(description="registered model: name, or catalog.schema.name")
    challenger: str = Field("challenger", description="alias or version number of the version to promote")
    champion: str = Field("champion", description="alias to move to it")
    rows: str = Field("", description="adata_rows table, .parquet or .json to compare on; empty: what register stored")
    max_rows: int = Field(20, ge=1, description="of these rows, the first by adata_id (of a file: the first)")
    tolerance: float = Field(1e-3, ge=0, description="of a number in the answers stored when it was registered")
    max_slowdown: float = Field(1.5, gt=0, description="time for the rows, as multiple of the champion's")
    min_cosine: float = Field(0.95, ge=-1, le=1, description="mean cosine with the champion's vectors; -1: any")
    plan: bool = Field(False, description="check, and promote nothing")


class WorkspaceSettings(Settings):
    """What a command takes that asks a Databricks workspace; who it asks as is Databricks' unified authentication."""

    endpoint: str = Field(description="name of the serving endpoint")
    retry_seconds: int = Field(300, ge=1, description="how long a busy workspace (429, 503, no answer) is asked again")

    @model_validator(mode="after")
    def _is_a_name(self) -> Self:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,62}", self.endpoint, re.ASCII):
            raise ValueError(f"endpoint {self.endpoint!r} must be letters, digits, - and _ only, at most 63")
        return self


class DeploySettings(WorkspaceSettings):
    """Create or update a Databricks serving endpoint and wait until it serves; twice changes nothing."""

    model_uri: str = Field("", description="models:/catalog.schema.name@alias or models:/catalog.schema.name/version")
    rollback: bool = Field(False, description="serve again the version that served before, instead of model_uri")
    traffic: str = Field("", description="canary in percent, such as old=90,new=10; empty: all to the new version")
    workload_type: str = Field("GPU_SMALL", description="CPU, GPU_SMALL, GPU_MEDIUM, ... of the new version")
    workload_size: str = Field("Small", description="Small (4 requests at once), Medium (16) or Large (64)")
    scale_to_zero: bool = Field(True, description="cost nothing without requests; the first one then waits minutes")
    inference_table: str = Field(
        "",
        description="catalog.schema.PREFIX_payload, new, for requests and answers; empty: beside the model; none: off",
    )
    usage_tracking: bool = Field(False, description="count use in system tables, where the workspace can for models")
    can_query: tuple[str, ...] = Field((), description="groups, user@mail or service principal ids that may ask it")
    poll_seconds: float = Field(10.0, gt=0, description="between two looks at the endpoint while it is updated")
    timeout_minutes: float = Field(60.0, gt=0, description="how long to wait for an update; it goes on without us")
    plan: bool = Field(False, description="say what would change, and change nothing")

    @model_validator(mode="after")
    def _works(self) -> Self:
        if self.rollback == bool(self.model_uri):
            raise ValueError("deploy needs either --model-uri or --rollback")
        if self.rollback and self.traffic:
            raise ValueError("--rollback gives all traffic to the earlier version: leave --traffic out")
        if self.traffic and not self._shares():
            raise ValueError(f"traffic {self.traffic!r} must be percentages that add to 100, such as old=90,new=10")
        table = self.inference_table
        if table not in ("", "none") and not re.fullmatch(r"[^.\s]+\.[^.\s]+\.[^.\s]+_payload", table):
            raise ValueError(f"inference_table {table!r} must be catalog.schema.NAME_payload: Databricks adds _payload")
        return self

    def _shares(self) -> dict[str, int]:
        match = re.fullmatch(r"old=(\d+),\s*new=(\d+)|new=(\d+),\s*old=(\d+)", self.traffic)
        if match is None:
            return {}
        old, new = (int(match[i] or match[5 - i]) for i in (1, 2))
        return {"old": old, "new": new} if old + new == 100 else {}

    @property
    def new_share(self) -> int:
        """Percent of the traffic that the new version gets."""
        return self._shares()["new"] if self.traffic else 100


class StatusSettings(WorkspaceSettings):
    """Say how a Databricks endpoint is: state, versions, traffic, logs, metrics, its tables and the nightly run."""

    inference_table: str = Field("", description="the endpoint's inference table, to judge it too (reads by Spark)")
    output_table: str = Field("", description="the batch job's embeddings, to judge the last run too (reads by Spark)")
    runs_table: str = Field("", description="its runs; empty: output table + _runs")


Summary = dict[str, Any]
