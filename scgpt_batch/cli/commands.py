"""The commands: their settings, what each calls, and an example for its help."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from threading import Event, Thread

from pydantic.fields import FieldInfo

from scgpt_batch.command_result import CommandResult
from scgpt_batch.errors import ConfigError, install
from scgpt_batch.io.locations import local_path
from scgpt_batch.parameters import Parameters
from scgpt_batch.settings import (
    AnnotateSettings,
    DemoCheckpointSettings,
    DeploySettings,
    DoctorSettings,
    EmbedSettings,
    EvaluateSettings,
    ExportSettings,
    IngestSettings,
    MaintainSettings,
    MonitorSettings,
    ProgramsSettings,
    PromoteSettings,
    RegisterSettings,
    ReportSettings,
    ServeSettings,
    Settings,
    SparkSettings,
    StatusSettings,
    SummarySettings,
)

# What `embed` cannot use: its rows hold one matrix and no paths, its results go to a table, and the checkpoint alone
# says how large the model is. The MLflow model takes all of these.
NOT_FOR_EMBED = (
    "input_data_path", "use_key", "result_binned_key", "embsize", "nhead", "d_hid", "nlayers", "n_layers_cls",
    "encoding", "on_error",
)  # fmt: skip
EMBED_PARAMETERS = {name: field for name, field in Parameters.model_fields.items() if name not in NOT_FOR_EMBED}


@dataclass(frozen=True)
class Command:
    """A command."""

    settings: type[Settings]
    run: Callable[..., CommandResult]
    example: str  # the words after the command's name
    with_parameters: bool = False  # takes embedding parameters too
    start: Callable[..., None] | None = None  # what takes long to start, before the command itself
    always_readable: bool = False  # prints the lines for people also where standard output is not a terminal

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """All settings and parameters of the command, by name."""
        return {**self.settings.model_fields, **(EMBED_PARAMETERS if self.with_parameters else {})}


@dataclass(frozen=True, kw_only=True)
class RegisterResult(CommandResult):
    """The new version of the registered model."""

    model_uri: str
    version: str
    checkpoint_digest: str

    def lines(self) -> list[str]:
        """Name the model and its checkpoint."""
        return [f"registered {self.model_uri}", f"digest of the checkpoint: {self.checkpoint_digest}"]


def _start_spark(settings: SparkSettings, imported: Sequence[str]) -> None:
    """Start the Spark session, and import modules while its JVM starts; they must not import Spark."""
    from scgpt_batch.spark.session import get_spark

    launched, names = Event(), list(imported)
    os.register_at_fork(after_in_parent=launched.set)  # a process should not fork while a thread of it imports

    def import_all() -> None:
        launched.wait()
        with suppress(Exception):  # the command imports them too, and reports the error
            while names:
                import_module(names.pop(0))

    imports = Thread(target=import_all, name="imports")
    imports.start()
    try:
        get_spark(settings.spark_conf)
    except BaseException:
        names.clear()
        raise
    finally:
        launched.set()
        imports.join()


def _demo_checkpoint(settings: DemoCheckpointSettings) -> CommandResult:
    from scgpt_batch.cli.demo import write_demo_checkpoint

    return write_demo_checkpoint(local_path(settings.h5ad, "h5ad"), local_path(settings.out, "out"))


def _ingest(settings: IngestSettings) -> CommandResult:
    from scgpt_batch.spark.ingest import ingest
    from scgpt_batch.spark.session import get_spark

    return ingest(get_spark(settings.spark_conf), settings)


def _register(settings: RegisterSettings) -> CommandResult:
    from scgpt_batch.registry.experiment import use_experiment
    from scgpt_batch.registry.register import register

    if settings.experiment:
        use_experiment(settings.experiment)
    model = register(
        settings.checkpoint,
        settings.name,
        alias=settings.alias,
        input_roots=settings.input_roots,
        requirements=settings.requirement,
        deployment_job=settings.deployment_job,
    )
    return RegisterResult(model_uri=model.uri, version=model.version, checkpoint_digest=model.digest)


def _embed(settings: EmbedSettings, parameters: Parameters) -> CommandResult:
    from scgpt_batch.spark.embed import embed_table
    from scgpt_batch.spark.session import get_spark

    return embed_table(get_spark(settings.spark_conf), settings, parameters)


def _serve(settings: ServeSettings) -> CommandResult:
    with _needs("serve", "serving"):
        from scgpt_batch.serving.app import serve

    return serve(settings)


def _summary(settings: SummarySettings) -> CommandResult:
    from scgpt_batch.cli.summary import summarize

    return summarize(settings)


def _export(settings: ExportSettings) -> CommandResult:
    from scgpt_batch.cli.export import export

    return export(settings)


def _programs(settings: ProgramsSettings) -> CommandResult:
    from scgpt_batch.cli.programs import programs

    return programs(settings)


def _annotate(settings: AnnotateSettings) -> CommandResult:
    from scgpt_batch.cli.annotate import annotate

    return annotate(settings)


def _evaluate(settings: EvaluateSettings) -> CommandResult:
    from scgpt_batch.cli.evaluate import evaluate

    return evaluate(settings)


def _report(settings: ReportSettings) -> CommandResult:
    from scgpt_batch.cli.report import report

    return report(settings)


def _doctor(settings: DoctorSettings) -> CommandResult:
    from scgpt_batch.cli.doctor import doctor

    return doctor(settings)


def _monitor(settings: MonitorSettings) -> CommandResult:
    from scgpt_batch.monitoring.monitor import monitor
    from scgpt_batch.spark.session import get_spark

    return monitor(get_spark(settings.spark_conf), settings)


def _maintain(settings: MaintainSettings) -> CommandResult:
    from scgpt_batch.spark.maintain import maintain
    from scgpt_batch.spark.session import get_spark

    return maintain(get_spark(settings.spark_conf), settings)


def _promote(settings: PromoteSettings) -> CommandResult:
    from scgpt_batch.promotion.promotion import promote

    return promote(settings)


def _deploy(settings: DeploySettings) -> CommandResult:
    with _needs("deploy", "databricks"):
        from scgpt_batch.databricks.deploy import deploy

    return deploy(settings)


def _status(settings: StatusSettings) -> CommandResult:
    with _needs("status", "databricks"):
        from scgpt_batch.databricks.status import status

    return status(settings)


@contextmanager
def _needs(command: str, extra: str) -> Iterator[None]:
    """Name the extra to install if a package is missing."""
    try:
        yield
    except ModuleNotFoundError as exc:
        raise ConfigError(f"{command} needs {exc.name}: {install(extra)}") from exc


COMMANDS = {
    "demo-checkpoint": Command(DemoCheckpointSettings, _demo_checkpoint, "--h5ad cells.h5ad --out demo_checkpoint"),
    "ingest": Command(
        IngestSettings,
        _ingest,
        "--input 'samples/*.h5ad' --split-by donor \\\n      --table 'delta.`/data/adata_rows`'",
    ),
    "register": Command(RegisterSettings, _register, "--checkpoint scGPT_human --name scgpt --alias champion"),
    "embed": Command(
        EmbedSettings,
        _embed,
        "--model-uri models:/scgpt@champion --input-table 'delta.`/data/adata_rows`' \\\n"
        "      --output-table 'delta.`/data/gene_embeddings`' --mode contextual --group-by cell_type --preset counts",
        with_parameters=True,
        start=partial(_start_spark, imported=("mlflow", "scgpt_batch.registry.sample_answers")),
    ),
    "serve": Command(ServeSettings, _serve, "--model-uri models:/scgpt@champion --port 5000"),
    "summary": Command(
        SummarySettings,
        _summary,
        "--output-table 'delta.`/data/gene_embeddings`' --genes CD3D MS4A1",
        always_readable=True,
    ),
    "export": Command(
        ExportSettings, _export, "--embeddings 'delta.`/data/cell_embeddings`' --h5ad cells.h5ad --out embedded.h5ad"
    ),
    "programs": Command(
        ProgramsSettings,
        _programs,
        "--embeddings 'delta.`/data/gene_embeddings`' --mode static \\\n"
        "      --out 'delta.`/data/gene_programs`' --cells cells.h5ad --group-by cell_type",
        always_readable=True,
    ),
    "annotate": Command(
        AnnotateSettings,
        _annotate,
        "--query 'delta.`/data/new_cells`' --reference 'delta.`/data/atlas_cells`' \\\n"
        "      --labels atlas.h5ad --label-column cell_type --out 'delta.`/data/annotations`'",
        always_readable=True,
    ),
    "evaluate": Command(
        EvaluateSettings,
        _evaluate,
        "--embeddings 'delta.`/data/cell_embeddings`' --obs cells.h5ad --label-column cell_type",
        always_readable=True,
    ),
    "report": Command(
        ReportSettings,
        _report,
        "--embeddings 'delta.`/data/cell_embeddings`' 'delta.`/data/gene_embeddings`' \\\n"
        "      --obs cells.h5ad --label-column cell_type --report embeddings.html",
        always_readable=True,
    ),
    "doctor": Command(DoctorSettings, _doctor, "--model-uri models:/scgpt@champion", always_readable=True),
    "monitor": Command(
        MonitorSettings, _monitor, "--output-table main.lab.gene_embeddings --report health.html --fail-on warning"
    ),
    "maintain": Command(MaintainSettings, _maintain, "--table 'delta.`/data/gene_embeddings`' --cluster-by gene"),
    "promote": Command(PromoteSettings, _promote, "--name main.lab.scgpt --rows main.lab.adata_rows --plan"),
    "deploy": Command(
        DeploySettings,
        _deploy,
        "--endpoint scgpt --model-uri models:/main.lab.scgpt@champion --traffic old=90,new=10",
    ),
    "status": Command(StatusSettings, _status, "--endpoint scgpt"),
}
