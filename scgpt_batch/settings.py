"""The settings of each command: names, defaults and help. The command line makes its options from them.

`cli/load_settings.py` reads them from flags, environment variables and a file.
"""

import re
from ipaddress import ip_address
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Severity = Literal["info", "warning", "critical"]
RuleName = Literal[
    "no_requests", "error_rate", "client_error_rate", "p95", "versions", "volume", "run_late", "run_failed",
    "rows_failed", "collapse",
]  # fmt: skip


class Settings(BaseModel):
    """Base of all settings. Frozen; unknown names are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MlflowSettings(Settings):
    """Settings of commands that use MLflow."""

    tracking_uri: str = Field("", description="MLflow tracking URI; if empty, MLflow's environment variables decide")
    registry_uri: str = Field("", description="MLflow registry URI, e.g. databricks-uc; if empty, MLflow decides")


class SparkSettings(Settings):
    """Settings of commands that use Spark."""

    spark_conf: dict[str, str] = Field({}, description="Spark settings of a local session, as NAME=VALUE")

    @field_validator("spark_conf", mode="before")
    @classmethod
    def _as_words(cls, conf: Any) -> Any:
        """Write YAML's numbers and booleans as Spark expects them."""
        if not isinstance(conf, dict):
            return conf
        words = {name: str(v).lower() if isinstance(v, bool) else str(v) for name, v in conf.items()
                 if isinstance(v, bool | int | float)}  # fmt: skip
        return conf | words


class DemoCheckpointSettings(Settings):
    """Make a small checkpoint in the published layout from your data (these are not the published weights)."""

    h5ad: str = Field(description=".h5ad file with raw counts, cells × genes")
    out: str = Field(description="folder to write the checkpoint to")


class IngestSettings(SparkSettings):
    """Read files of counts into a Delta table of serialized AnnData rows."""

    input: tuple[str, ...] = Field(
        description="files, folders, globs or URIs to read: .h5ad, .zarr, .h5mu, 10x .h5, 10x mtx folders", min_length=1
    )
    table: str = Field(description="table to write the rows to: catalog.schema.table or delta.`path`")
    cells_per_row: int = Field(1000, ge=1, description="maximum number of cells per row")
    split_by: str = Field("", description="obs column; cells with different values go to different rows")
    gene_symbols: str = Field("", description="var column with the gene symbols, if var_names are other ids")
    layer: str = Field("auto", description="matrix to read; auto takes the first one with counts")
    sample_id: str = Field(
        "file", description="what a sample is: a file (and --split-by group), the values of an obs column, or none"
    )
    id_from: Literal["name", "parent", "path"] = Field(
        "name", description="how row ids start: with the file name, its parent folder and name, or the whole path"
    )
    max_failed_fraction: float = Field(
        0.1, ge=0, le=1, description="exit with code 3 if a larger share of the files fails"
    )


class RegisterSettings(MlflowSettings):
    """Register a checkpoint as an MLflow model, after checking that it can be served."""

    checkpoint: str = Field(description="folder with best_model.pt (or .safetensors), args.json and vocab.json")
    name: str = Field(description="name of the registered model, or catalog.schema.name")
    alias: str = Field("", description="alias to set on the new version, e.g. champion")
    input_roots: tuple[str, ...] = Field((), description="folders that input_data_path may read from; default: none")
    requirement: tuple[str, ...] = Field(
        (), description="packages for endpoints instead of the installed versions, e.g. torch==2.9.1"
    )
    deployment_job: str = Field(
        "", pattern=r"^\d*$", description="id of the Databricks job that each new version of the model starts"
    )
    experiment: str = Field("", description="MLflow experiment; default: MLflow's own")


class EmbedSettings(SparkSettings, MlflowSettings):
    """Embed the rows of a Delta table that have no result yet."""

    model_uri: str = Field(description="model to use: models:/NAME/VERSION, models:/NAME@ALIAS or a path")
    input_table: str = Field(description="table of rows that ingest wrote")
    output_table: str = Field(description="table of embeddings to write to; created if it does not exist")
    ledger_table: str = Field("", description="outcome of each row; default: the output table's name and _ledger")
    runs_table: str = Field("", description="one line per run; default: the output table's name and _runs")
    search_table: str = Field(
        "", description="table for a vector search index: this model version's vectors alone, of length 1"
    )
    preset: Literal["", "counts"] = Field(
        "", description="counts: data_is_raw true, log1p true, hvg_flavor seurat_v3; an explicit value wins"
    )
    max_failed_fraction: float = Field(
        0.1, ge=0, le=1, description="exit with code 3 if a larger share of the run's rows fails"
    )
    allow_other_code: bool = Field(
        False, description="run although the installed code gives other numbers than the code that registered the model"
    )
    retry_failed: bool = Field(False, description="retry rows that failed with the same content and parameters")
    wave_cells: int = Field(200_000, ge=1, description="cells per wave; a killed run repeats at most one wave")
    row_timeout: float = Field(3600, gt=0, description="a row without a result after this time fails as Timeout")
    prune: int = Field(0, ge=0, description="model versions to keep in the output, newest first; 0: all")
    plan: bool = Field(False, description="report the pending work and write nothing")
    trigger: Literal["", "available-now"] = Field(
        "", description="available-now: process only rows added since the last run (Structured Streaming)"
    )
    checkpoint_location: str = Field("", description="folder for the stream's checkpoint; required with --trigger")
    experiment: str = Field("", description="MLflow experiment; default: MLflow's own")

    @model_validator(mode="after")
    def _works(self) -> Self:
        if bool(self.trigger) != bool(self.checkpoint_location):
            raise ValueError("trigger and checkpoint_location go together: give both, or neither")
        return self


class SummarySettings(SparkSettings):
    """Show what a table of gene embeddings contains, and the nearest genes of a few."""

    output_table: str = Field(description="table of gene embeddings")
    genes: tuple[str, ...] = Field(("CD3D", "MS4A1", "LYZ", "NKG7"), description="genes whose nearest genes are shown")
    neighbours: int = Field(5, ge=1, description="number of nearest genes shown for each gene")


class ExportSettings(Settings):
    """Write the embeddings of a table to an .h5ad, .zarr or Parquet file; a table at a path needs no Spark."""

    embeddings: str = Field(description="table of cell or gene embeddings")
    out: str = Field(description="file to write: .h5ad, .zarr or .parquet")
    h5ad: str = Field(
        "", description=".h5ad or .zarr file whose cells or genes get the vectors; default: a new AnnData"
    )
    mode: Literal["", "static", "contextual", "cell"] = Field(
        "", description="mode to export, if the table has several"
    )
    model_version: str = Field("", description="model version to export; default: the one that wrote last")
    run_id: str = Field("", description="run to export; default: all runs")
    key_added: str = Field("X_scGPT", description="key of the vectors in obsm or varm")


class ProgramsSettings(SparkSettings):
    """Find gene programs: clusters of gene vectors, how stable they are, and on request their scores in cells."""

    embeddings: str = Field(description="table of gene embeddings, static or contextual")
    out: str = Field(description="table of programs to write to; created if it does not exist")
    mode: Literal["", "static", "contextual"] = Field("", description="vectors to cluster, if the table has both")
    model_version: str = Field("", description="model version to use; default: the one that wrote last")
    resolution: float = Field(20.0, gt=0, description="of the Leiden clusters; larger: more and smaller programs")
    neighbours: int = Field(15, ge=2, description="neighbours of each gene in the graph")
    min_genes: int = Field(5, ge=2, description="smaller clusters are not programs")
    seeds: int = Field(10, ge=1, description="clusterings from which a program's stability is measured")
    cells: str = Field("", description="cells to score: a file with counts, or the table that ingest wrote")
    group_by: str = Field("", description="obs column of --cells: write the mean score of each value, not of each cell")
    scores_table: str = Field("", description="table for the scores; default: the out table's name and _scores")
    gmt: str = Field(
        "", description=".gmt file of gene sets: test each program for them; out table's name and _enrichment"
    )

    @model_validator(mode="after")
    def _works(self) -> Self:
        if (self.group_by or self.scores_table) and not self.cells:
            raise ValueError("group_by and scores_table need cells: the cells to score")
        return self


class AnnotateSettings(SparkSettings):
    """Label the cells of a table by their nearest neighbours in a reference table with known labels."""

    query: str = Field(description="table of cell embeddings to label")
    reference: str = Field(
        description="table of cell embeddings with known labels, by the same model; may be the query"
    )
    labels: str = Field(
        description="labels of the reference cells: .h5ad, .csv or .parquet file, the table that ingest wrote, or a "
        "table with the column cell_id"
    )
    label_column: str = Field(description="column of --labels with the label")
    out: str = Field(description="table of annotations to write to; created if it does not exist")
    model_version: str = Field("", description="model version to use; default: the one that wrote last")
    neighbours: int = Field(10, ge=1, description="reference cells that vote on each cell")
    metric: Literal["cosine", "euclidean"] = Field("cosine", description="distance between vectors")
    vote: Literal["cell", "cluster"] = Field("cell", description="cluster: cells of one Leiden cluster vote together")
    min_confidence: float = Field(
        0.0, ge=0, le=1, description="a label with a smaller share of the votes is written as unknown"
    )
    correct_frequency: bool = Field(False, description="weigh votes so that frequent labels do not outvote rare ones")


class EvaluateSettings(SparkSettings):
    """Measure whether embeddings separate known labels better than HVG + PCA, or group known gene families."""

    embeddings: str = Field(description="table of cell embeddings, or of gene embeddings")
    obs: str = Field(
        "",
        description="cells with labels and counts: .h5ad file or the table that ingest wrote; without counts (.csv, "
        ".parquet) there is no baseline; required for cell embeddings",
    )
    label_column: str = Field("", description="column of --obs with the label; required for cell embeddings")
    batch_column: str = Field("", description="column of --obs with the batch: measures how well batches mix too")
    out: str = Field("", description="table to write the figures to; created if it does not exist")
    mode: Literal["", "static", "contextual"] = Field(
        "", description="gene vectors to measure, if the table has several"
    )
    model_version: str = Field("", description="model version to use; default: the one that wrote last")
    compare_version: str = Field(
        "", description="another model version in the table: measure how far vectors moved from it"
    )
    neighbours: int = Field(15, ge=2, description="neighbours of each cell")
    max_cells: int = Field(50_000, ge=100, description="of more cells with labels, a random sample is measured")

    @model_validator(mode="after")
    def _works(self) -> Self:
        if bool(self.obs) != bool(self.label_column):
            raise ValueError("obs and label_column go together: give both")
        if self.batch_column and not self.obs:
            raise ValueError("batch_column needs obs, the table or file that has it")
        return self


class ReportSettings(SparkSettings):
    """Write a self-contained HTML page about embeddings: what ran, maps of cells and genes, programs, evaluation."""

    embeddings: tuple[str, ...] = Field(
        description="tables to show, recognised by their columns: cell and gene embeddings, gene programs, program "
        "scores, annotations, evaluations",
        min_length=1,
    )
    report: str = Field(description="HTML page to write")
    obs: str = Field(
        "",
        description="cells with columns to colour by: .h5ad, .csv or .parquet file, the table that ingest wrote, or a "
        "table with the column cell_id",
    )
    label_column: str = Field("", description="column of --obs with the cell type: groups of programs, evaluation")
    format: Literal["html", "png", "svg"] = Field("html", description="png, svg: write static figures beside the page")
    model_version: str = Field("", description="model version to show; default: the one that wrote last")

    @model_validator(mode="after")
    def _works(self) -> Self:
        if self.label_column and not self.obs:
            raise ValueError("label_column needs obs, the table or file that has it")
        return self


class DoctorSettings(MlflowSettings):
    """Check that this environment can run the commands, and say what mends what cannot."""

    model_uri: str = Field("", description="model to check: models:/name/version, models:/name@alias or a path")
    tables: tuple[str, ...] = Field((), description="tables to check")


class MonitorSettings(SparkSettings):
    """Check the health of an endpoint and of the batch job from their tables."""

    inference_table: str = Field("", description="inference table of the endpoint, of any generation")
    requests_view: str = Field(
        "", description="view of its requests to create, for dashboards and alerts; default: none"
    )
    output_table: str = Field("", description="embeddings of the batch job; default: those of the last run")
    runs_table: str = Field("", description="its runs; default: the output table's name and _runs")
    ledger_table: str = Field("", description="its ledger; default: the output table's name and _ledger")
    report: str = Field("", description="self-contained HTML report to write")
    fail_on: Literal["warning", "critical"] = Field(
        "critical", description="exit with code 4 for alerts of this severity or above"
    )
    ignore: tuple[RuleName, ...] = Field((), description="rules not to check")
    severity: dict[RuleName, Severity] = Field(
        {}, description="other severities, as RULE=info|warning|critical; info is listed and fails nothing"
    )
    hours: float = Field(24, gt=0, description="time window of the checks")
    days: int = Field(7, ge=2, description="history for traffic baselines and the report")
    delay_minutes: int = Field(60, ge=0, description="delay until requests appear in the inference table")
    max_error_rate: float = Field(0.05, ge=0, le=1, description="maximum share of requests with a server error (5xx)")
    max_client_error_rate: float = Field(
        0.25, ge=0, le=1, description="maximum share of requests with a client error (4xx)"
    )
    min_errors: int = Field(5, ge=1, description="below this number of errors, their share is not checked")
    max_p95_ms: float = Field(10_000, gt=0, description="maximum 95th percentile of the request duration")
    slow_ms: int = Field(5_000, gt=0, description="the report lists requests that took at least this long")
    min_volume: float = Field(0.5, ge=0, description="minimum requests per hour, as a share of that hour's baseline")
    min_usual_requests: float = Field(20, ge=0, description="hours with a smaller baseline are not checked for volume")
    max_canary_days: int = Field(3, ge=0, description="maximum number of days on which several versions answer")
    max_run_age_hours: float = Field(26, gt=0, description="maximum time since the batch job last finished")
    max_failed_fraction: float = Field(0.1, ge=0, le=1, description="maximum share of a run's rows that fail")
    max_cosine: float = Field(0.999, gt=0, le=1, description="maximum mean cosine similarity of a run's vectors")

    @model_validator(mode="after")
    def _works(self) -> Self:
        if self.requests_view and not self.inference_table:
            raise ValueError("requests_view needs inference_table, the table that the view reads")
        return self


class MaintainSettings(SparkSettings):
    """Compact, cluster and vacuum a Delta table, its ledger and its runs; delete old rows."""

    table: str = Field(description="any Delta table: embeddings, ledger, inference table")
    date_column: str = Field("", description="date or timestamp column for --retain-days; default: keep all rows")
    retain_days: int = Field(90, ge=1, description="delete rows whose --date-column is older than this")
    cluster_by: str = Field("", description="column to cluster the files by, e.g. gene; default: unchanged")
    runs_days: int = Field(
        0, ge=0, description="delete the records of runs that finished longer ago than this; 0: keep all"
    )
    vacuum_hours: int = Field(
        168,
        ge=0,
        description="remove files that only versions older than this need; Databricks' predictive optimization does it "
        "by itself where it is on",
    )
    force: bool = Field(
        False, description="allow --vacuum-hours below 168, which can break running readers and time travel"
    )

    @model_validator(mode="after")
    def _works(self) -> Self:
        if "retain_days" in self.model_fields_set and not self.date_column:
            raise ValueError("--retain-days needs --date-column, the column with a row's date")
        return self


class ServeSettings(MlflowSettings):
    """Serve a model over HTTP until stopped, and log requests to an inference table."""

    model_uri: str = Field(description="model to serve: models:/NAME/VERSION, models:/NAME@ALIAS or a path")
    host: str = Field(
        "127.0.0.1", description="address to listen on; others than loopback need a token in SCGPT_BATCH_TOKEN"
    )
    port: int = Field(5000, ge=0, le=65535, description="port to listen on; 0: a free port, named in the log")
    inference_table: str = Field(
        "delta.`inference_payload`", description="delta.`path` for requests and responses; none: off"
    )
    spool: str = Field("", description="local folder for records not yet in the table; default: beside the table")
    flush_seconds: float = Field(10.0, gt=0, description="interval between writes from the spool to the table")
    max_request_bytes: int = Field(
        16_000_000, ge=1, description="maximum size of a request body, before and after inflating"
    )
    max_answer_bytes: int = Field(
        16_000_000, ge=1, description="maximum response size; larger responses are rejected before they are computed"
    )
    timeout_seconds: float = Field(297.0, gt=0, description="maximum time for one request")
    max_concurrent: int = Field(64, ge=1, description="concurrent requests; further requests get 429")
    max_connections: int = Field(1000, ge=1, description="open connections; further connections get 503")
    header_seconds: float = Field(10.0, gt=0, description="maximum time until a connection has sent a complete header")
    body_seconds: float = Field(60.0, gt=0, description="maximum time until a request body has arrived")
    shutdown_seconds: float = Field(
        30.0, gt=0, description="time for running requests after SIGTERM, before they are cancelled"
    )
    trusted_proxies: tuple[str, ...] = Field(
        (), description="proxies whose X-Forwarded-For header names the requester in the log; default: none"
    )
    allow_without_token: bool = Field(
        False,
        description="listen on other addresses than loopback without a token, behind a proxy or firewall",
    )
    batch_wait_ms: float = Field(5.0, ge=0, description="how long a request waits to share a batch with others")

    @field_validator("trusted_proxies")
    @classmethod
    def _are_addresses(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ip_address(proxy)) for proxy in proxies)


class PromoteSettings(SparkSettings, MlflowSettings):
    """Make the challenger the champion if it reproduces its stored answers and is close to the champion."""

    name: str = Field(description="name of the registered model, or catalog.schema.name")
    challenger: str = Field("challenger", description="alias or number of the version to promote")
    champion: str = Field("champion", description="alias that is moved to the challenger")
    rows: str = Field(
        "", description="rows to compare on: table, .parquet or .json; default: those that register stored"
    )
    max_rows: int = Field(20, ge=1, description="number of these rows to use, the first by adata_id")
    tolerance: float = Field(1e-3, ge=0, description="maximum difference to the answers stored at registration")
    max_slowdown: float = Field(1.5, gt=0, description="maximum time, as a multiple of the champion's")
    min_cosine: float = Field(
        0.95, ge=-1, le=1, description="minimum mean cosine similarity with the champion's vectors"
    )
    plan: bool = Field(False, description="run the checks and change nothing")


class WorkspaceSettings(Settings):
    """Settings of commands that use a Databricks workspace; Databricks' unified authentication logs in."""

    endpoint: str = Field(description="name of the serving endpoint")
    retry_seconds: int = Field(
        300, ge=1, description="how long to retry while the workspace is busy (429, 503, no answer)"
    )

    @model_validator(mode="after")
    def _is_a_name(self) -> Self:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,62}", self.endpoint, re.ASCII):
            raise ValueError(f"endpoint {self.endpoint!r} must be letters, digits, - and _ only, at most 63")
        return self


class DeploySettings(WorkspaceSettings):
    """Create or update a Databricks serving endpoint and wait until it is ready (idempotent)."""

    model_uri: str = Field("", description="model to serve: models:/CATALOG.SCHEMA.NAME@ALIAS or .../VERSION")
    rollback: bool = Field(False, description="go back to the version that was served before")
    traffic: str = Field("", description="canary, in percent; default: all traffic goes to the new version")
    workload_type: str = Field("GPU_SMALL", description="hardware of the new version: CPU, GPU_SMALL, GPU_MEDIUM, ...")
    workload_size: str = Field("Small", description="concurrent requests: Small (4), Medium (16) or Large (64)")
    scale_to_zero: bool = Field(True, description="stop without requests; the first request then waits minutes")
    inference_table: str = Field(
        "",
        description="new table CATALOG.SCHEMA.PREFIX_payload for requests; default: beside the model; none: off",
    )
    usage_tracking: bool = Field(False, description="record usage in system tables, if the workspace supports it")
    allow_user: bool = Field(
        False, description="create the endpoint as a person, whose identity it keeps, not as a service principal"
    )
    can_query: tuple[str, ...] = Field((), description="groups, users or service principal ids that may query it")
    poll_seconds: float = Field(10.0, gt=0, description="interval between checks while the endpoint updates")
    timeout_minutes: float = Field(60.0, gt=0, description="how long to wait for an update, which then continues")
    plan: bool = Field(False, description="list the changes and make none")

    @model_validator(mode="after")
    def _works(self) -> Self:
        if self.rollback == bool(self.model_uri):
            raise ValueError("deploy needs either --model-uri or --rollback")
        if self.rollback and self.traffic:
            raise ValueError("--rollback sends all traffic to the earlier version: omit --traffic")
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


class StatusSettings(SparkSettings, WorkspaceSettings):
    """Show the state of a Databricks endpoint: versions, traffic, logs, metrics, and its tables if named."""

    inference_table: str = Field("", description="inference table of the endpoint, to check its health (needs Spark)")
    output_table: str = Field("", description="embeddings of the batch job, to check its last run (needs Spark)")
    runs_table: str = Field("", description="its runs; default: the output table's name and _runs")
