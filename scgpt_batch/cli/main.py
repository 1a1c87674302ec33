"""The command line: `scgpt-batch COMMAND`, and the same commands as jobs for spark-submit.

Flags are made from the settings' and parameters' fields. The last line on standard output is the summary, one line
of JSON; progress and logs go to standard error.
"""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from scgpt_batch.errors import ConfigError, SafeLogFilter, ScgptBatchError, in_one_line
from scgpt_batch.parameters import Parameters, validation_message
from scgpt_batch.settings import (
    DemoCheckpointSettings,
    DeploySettings,
    EmbedSettings,
    IngestSettings,
    MaintainSettings,
    MonitorSettings,
    PromoteSettings,
    RegisterSettings,
    ServeSettings,
    Settings,
    StatusSettings,
    Summary,
    SummarySettings,
)

OK, FAILED, WRONG_USAGE, TOO_MANY_FAILED_ROWS, ALERTS = 0, 1, 2, 3, 4

ENVIRONMENT = "SCGPT_BATCH_"

# Of the parameters, these say how an answer travels; the job's answers travel to a table.
NOT_FOR_JOBS = ("on_error", "encoding")


@dataclass(frozen=True)
class Command:
    """A command: its settings, what it calls, and whether it takes the embedding parameters too."""

    settings: type[Settings]
    run: Callable[..., Summary]
    with_parameters: bool = False


def _demo_checkpoint(settings: DemoCheckpointSettings) -> Summary:
    from scgpt_batch.cli.demo import write_demo_checkpoint

    return write_demo_checkpoint(Path(settings.h5ad), Path(settings.out))


def _ingest(settings: IngestSettings) -> Summary:
    from scgpt_batch.spark.ingest import ingest
    from scgpt_batch.spark.session import get_spark

    return ingest(get_spark(settings.spark_conf), settings)


def _register(settings: RegisterSettings) -> Summary:
    from scgpt_batch.registry.register import register, use_experiment

    if settings.experiment:
        use_experiment(settings.experiment)
    model = register(settings.checkpoint, settings.name, alias=settings.alias, input_roots=settings.input_roots)
    return {"model_uri": model.uri, "version": model.version, "checkpoint_digest": model.digest}


def _embed(settings: EmbedSettings, parameters: Parameters) -> Summary:
    from scgpt_batch.spark.embed import embed_table
    from scgpt_batch.spark.session import get_spark

    return embed_table(get_spark(settings.spark_conf), settings, parameters)


def _serve(settings: ServeSettings) -> Summary:
    with _needs("serve", "serving"):
        from scgpt_batch.serving.app import serve

    return serve(settings)


def _summary(settings: SummarySettings) -> Summary:
    from scgpt_batch.cli.summary import summarize
    from scgpt_batch.spark.session import get_spark

    return summarize(get_spark(settings.spark_conf), settings)


def _monitor(settings: MonitorSettings) -> Summary:
    from scgpt_batch.monitoring.monitor import monitor
    from scgpt_batch.spark.session import get_spark

    return monitor(get_spark(settings.spark_conf), settings)


def _maintain(settings: MaintainSettings) -> Summary:
    from scgpt_batch.spark.maintain import maintain
    from scgpt_batch.spark.session import get_spark

    return maintain(get_spark(settings.spark_conf), settings)


def _deploy(settings: DeploySettings) -> Summary:
    with _needs("deploy", "databricks"):
        from scgpt_batch.databricks.deploy import deploy

    return deploy(settings)


def _promote(settings: PromoteSettings) -> Summary:
    from scgpt_batch.promotion.promotion import promote

    return promote(settings)


def _status(settings: StatusSettings) -> Summary:
    with _needs("status", "databricks"):
        from scgpt_batch.databricks.status import status

    return status(settings)


COMMANDS = {
    "demo-checkpoint": Command(DemoCheckpointSettings, _demo_checkpoint),
    "ingest": Command(IngestSettings, _ingest),
    "register": Command(RegisterSettings, _register),
    "embed": Command(EmbedSettings, _embed, with_parameters=True),
    "serve": Command(ServeSettings, _serve),
    "summary": Command(SummarySettings, _summary),
    "monitor": Command(MonitorSettings, _monitor),
    "maintain": Command(MaintainSettings, _maintain),
    "promote": Command(PromoteSettings, _promote),
    "deploy": Command(DeploySettings, _deploy),
    "status": Command(StatusSettings, _status),
}


@contextmanager
def _needs(command: str, extra: str) -> Iterator[None]:
    """Name the extra to install where a package is missing."""
    try:
        yield
    except ModuleNotFoundError as exc:
        raise ConfigError(f"{command} needs {exc.name}: pip install 'scgpt_batch[{extra}]'") from exc


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code (0 done, 1 failed, 2 wrong usage, 3 too many rows failed, 4 alerts)."""
    args = vars(_parser().parse_args(argv))
    name, config, debug = args.pop("command"), args.pop("config"), args.pop("debug")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for noisy in ("py4j", "alembic", "mlflow", "databricks"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    _make_logs_safe(logging.getLogger())
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is our JSON's
    try:
        command = COMMANDS[name]
        settings = _settings(command, name, args, config)
        summary = _run(command, *settings)
    except ConfigError as exc:
        return _fail(exc, WRONG_USAGE, debug)
    except Exception as exc:  # the last place: say it in one line, and all of it with --debug
        return _fail(exc, FAILED, debug)
    print(json.dumps(summary), flush=True)
    return _exit_code(settings[0], summary)


def job(name: str) -> None:
    """Run a command as a spark-submit job: the same flags, exit codes and streams."""
    from scgpt_batch.spark.session import separate_stderr

    separate_stderr()
    sys.exit(main([name, *sys.argv[1:]]))


def entry_point() -> None:
    """Run the console script, and a Databricks wheel task: which takes any SystemExit for a failure, 0 too."""
    if code := main():
        sys.exit(code)


_SAFE_LOGS = SafeLogFilter()


def _make_logs_safe(logger: logging.Logger) -> None:
    for handler in logger.handlers:
        handler.addFilter(_SAFE_LOGS)


def _run(command: Command, *settings: BaseModel) -> Summary:
    import mlflow

    _make_logs_safe(logging.getLogger("mlflow"))  # it has a handler of its own
    common: Any = settings[0]
    if common.tracking_uri:
        mlflow.set_tracking_uri(common.tracking_uri)
    if common.registry_uri:
        mlflow.set_registry_uri(common.registry_uri)
    return command.run(*settings)


def _settings(command: Command, name: str, flags: Mapping[str, Any], config: str | None) -> list[BaseModel]:
    """Merge file, environment and flags, later ones winning, and check them."""
    fields = _fields(command)
    given = _from_file(config, name, fields) | _from_environment(fields)
    given |= {flag: value for flag, value in flags.items() if value is not None}
    mine = {key: value for key, value in given.items() if key in command.settings.model_fields}
    try:
        settings: list[BaseModel] = [command.settings(**mine)]
    except ValidationError as exc:
        missing = [f"--{_flag(str(e['loc'][0]))}" for e in exc.errors() if e["type"] == "missing"]
        if missing:
            raise ConfigError(f"{name} needs {', '.join(missing)}") from exc
        raise ConfigError(validation_message(exc, "setting")) from exc
    if command.with_parameters:
        settings.append(Parameters.create({k: v for k, v in given.items() if k not in mine}))
    return settings


def _from_file(config: str | None, name: str, fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """Read the settings of a command: the file's section of its name, and `common` for all commands.

    A setting without a value (null) is not given, and one word is a list of one.
    """
    if config is None:
        return {}
    try:
        sections = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
    except OSError as exc:
        raise ConfigError(f"cannot read --config {config}: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{config} is not YAML: {' '.join(str(exc).split())}") from exc
    known = f"common, {', '.join(COMMANDS)}"
    if not isinstance(sections, dict) or not all(isinstance(s, dict | None) for s in sections.values()):
        raise ConfigError(f"{config} must hold sections of settings: {known}")
    unknown = [section for section in sections if section not in ("common", *COMMANDS)]
    if unknown:
        raise ConfigError(f"{config}: unknown section {unknown[0]!r}; known: {known}")
    given = (sections.get("common") or {}) | (sections.get(name) or {})
    for key in given:
        if key not in fields:
            raise ConfigError(f"{config}: unknown setting {key!r} for {name}")
    return {
        key: [value] if _is_list(fields[key]) and isinstance(value, str) else value
        for key, value in given.items()
        if value is not None
    }


def _from_environment(fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    given = {}
    for name, field in fields.items():
        variable = ENVIRONMENT + name.upper()
        value = os.environ.get(variable)
        if value is None:
            continue
        try:
            given[name] = value.split() if _is_list(field) else _named(value.split()) if _is_dict(field) else value
        except ValueError as exc:
            raise ConfigError(f"{variable} is {value!r}: {exc}") from exc
    return given


def _fields(command: Command) -> dict[str, FieldInfo]:
    fields = dict(command.settings.model_fields)
    if command.with_parameters:
        fields |= {n: f for n, f in Parameters.model_fields.items() if n not in NOT_FOR_JOBS}
    return fields


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scgpt-batch", description="scGPT embeddings in Delta tables.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        told = (command.settings.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(name, help=told, description=told, allow_abbrev=False)
        sub.add_argument("--config", metavar="FILE", help="YAML with a section for each command, and one `common`")
        sub.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
        for field_name, field in _fields(command).items():
            sub.add_argument(f"--{_flag(field_name)}", dest=field_name, **_argument(field))
    return parser


def _argument(field: FieldInfo) -> dict[str, Any]:
    """Say to argparse what a field takes; values are checked later, with those of file and environment."""
    default = "" if field.is_required() or field.default in (None, "", (), {}) else f" [{_told(field.default)}]"
    argument: dict[str, Any] = {"help": ((field.description or "") + default).replace("%", "%%"), "default": None}
    if _is_list(field):
        return argument | {"nargs": "+", "metavar": "X"}
    if _is_dict(field):
        return argument | {"nargs": "+", "metavar": "NAME=VALUE", "action": _Named}
    if field.annotation is bool:
        return argument | {"nargs": "?", "const": True, "metavar": "true|false"}
    if get_origin(field.annotation) is Literal:
        return argument | {"metavar": "|".join(get_args(field.annotation))}
    return argument | {"metavar": "X"}


class _Named(argparse.Action):
    """Collect NAME=VALUE words into a dictionary."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            setattr(namespace, self.dest, _named(values))
        except ValueError as exc:
            parser.error(f"{option_string}: {exc}")


def _named(words: Sequence[str]) -> dict[str, str]:
    for word in words:
        if not re.match("[^=]+=", word):
            raise ValueError(f"{word!r} must be NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _is_dict(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is dict


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _fail(exc: Exception, code: int, debug: bool) -> int:
    if debug:
        logging.getLogger(__name__).exception("%s", exc)
    more = "" if debug or isinstance(exc, ScgptBatchError) else " (--debug shows all of it)"
    print(f"scgpt-batch: {in_one_line(exc)}{more}", file=sys.stderr)
    return code


def _exit_code(settings: BaseModel, summary: Summary) -> int:
    if isinstance(settings, MonitorSettings):
        return ALERTS if summary["status"] in ("critical", settings.fail_on) else OK
    if isinstance(settings, PromoteSettings):
        return FAILED if summary["refused"] else OK
    if isinstance(settings, IngestSettings):
        too_many = summary["files_failed"] / summary["files"] > settings.max_failed_fraction
        return TOO_MANY_FAILED_ROWS if too_many else OK
    if not isinstance(settings, EmbedSettings):
        return OK
    failed = summary.get("rows_failed", 0)  # --plan has none
    done = summary.get("rows_ok", 0) + failed
    too_many = done and failed / done > settings.max_failed_fraction
    return TOO_MANY_FAILED_ROWS if too_many else OK
