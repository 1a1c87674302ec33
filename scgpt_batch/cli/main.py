"""The command line: `scgpt-batch COMMAND`, and the same commands as jobs for spark-submit.

The last line on standard output is the result, one line of JSON. In a terminal a summary for people comes before it.
Progress and logs go to standard error.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import argcomplete
from pydantic import BaseModel, ValidationError

import scgpt_batch
from scgpt_batch.cli.commands import COMMANDS, EMBED_PARAMETERS, Command
from scgpt_batch.cli.load_settings import load, read_sections
from scgpt_batch.cli.options import COMMON_OPTIONS, add_options, flag
from scgpt_batch.command_result import ALERTS, FAILED, OK, TOO_MANY_FAILED_ROWS, WRONG_USAGE, CommandResult
from scgpt_batch.errors import (
    ConfigError,
    EmbeddingWarning,
    SafeLogFilter,
    ScgptBatchError,
    in_one_line,
    printable,
    suggestion,
)
from scgpt_batch.near_misses import did_you_mean
from scgpt_batch.parameters import PRESETS, Parameters, validation_message
from scgpt_batch.settings import EmbedSettings, MlflowSettings

__all__ = [
    "ALERTS", "COMMANDS", "FAILED", "OK", "TOO_MANY_FAILED_ROWS", "WRONG_USAGE", "entry_point", "job", "main",
]  # fmt: skip

DESCRIPTION = "scGPT embeddings of genes and cells in Delta tables."
EPILOG = """\
`scgpt-batch COMMAND --help` shows the options of a command and an example.
Every option can also be set by an environment variable (--cells-per-row: SCGPT_BATCH_CELLS_PER_ROW) or in a --config
file. Options win over variables, variables over the file.

exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 too many rows or files failed, 4 alerts

completion in bash and zsh: eval "$(register-python-argcomplete scgpt-batch)"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code (0 done, 1 failed, 2 wrong usage, 3 too many rows failed, 4 alerts)."""
    args = vars(parse(sys.argv[1:] if argv is None else argv))
    name, config, debug, only_json, verbose = (args.pop(key) for key in ("command", *COMMON_OPTIONS))
    _set_up_logs(verbose=verbose)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is for our result
    command = COMMANDS[name]
    try:
        result = _run(command, *read_settings(name, args, config))
    except ConfigError as exc:
        return _fail(exc, WRONG_USAGE, debug)
    except Exception as exc:  # the last place: one line, and the traceback with --debug
        return _fail(exc, FAILED, debug)
    if not only_json and (command.always_readable or sys.stdout.isatty()):
        print(*map(printable, result.lines()), sep="\n")
    print(result.to_json(), flush=True)
    return result.exit_code


def job(name: str) -> None:
    """Run a command as a spark-submit job: the same options, exit codes and streams."""
    from scgpt_batch.spark.session import separate_stderr

    separate_stderr()
    sys.exit(main([name, *sys.argv[1:]]))


def entry_point() -> None:
    """Run the console script. On success it returns: a Databricks wheel task fails on any SystemExit, even of 0."""
    if code := main():
        sys.exit(code)


# Options


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words of a command line; exits with code 2 and a suggestion for what is misspelt."""
    parser, commands = _parsers()
    argcomplete.autocomplete(parser, default_completer=argcomplete.completers.SuppressCompleter())
    name = next((word for word in argv if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        parser.error(f"unknown command {name!r}{suggestion(name, COMMANDS)}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        option = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
        known = [flag(field) for field in COMMANDS[args.command].fields]
        commands[args.command].error(f"unknown option {option}{did_you_mean(option, known)}")
    return args


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the whole line, and those of the commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="scgpt-batch", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"scgpt_batch {scgpt_batch.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        purpose = (command.settings.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(
            name,
            help=purpose,
            description=purpose,
            epilog=f"example:\n  scgpt-batch {name} {command.example}",
            formatter_class=raw,
            allow_abbrev=False,
            usage=f"scgpt-batch {name} [--config FILE] [options]",
        )
        add_options(sub, command.fields)
    return parser, dict(commands.choices)


# Settings


def read_settings(name: str, flags: Mapping[str, Any], config: str | None) -> list[BaseModel]:
    """Return the settings of a command, and its embedding parameters if it has any."""
    command = COMMANDS[name]
    given = {key: value for key, value in flags.items() if value is not None}
    known = {each: list(other.fields) for each, other in COMMANDS.items()}
    sections = read_sections(config, name, command.fields, known) if config else ()
    try:
        settings = load(command.settings, command.settings.model_fields, given, *sections)
    except ValidationError as exc:
        missing = [flag(str(error["loc"][0])) for error in exc.errors() if error["type"] == "missing"]
        if missing:
            raise ConfigError(f"{name} needs {', '.join(missing)}; see scgpt-batch {name} --help") from exc
        raise ConfigError(validation_message(exc, "setting")) from exc
    if not isinstance(settings, EmbedSettings):
        return [settings]
    try:
        return [settings, load(Parameters, EMBED_PARAMETERS, given, *sections, PRESETS[settings.preset])]
    except ValidationError as exc:
        raise ConfigError(validation_message(exc, "parameter")) from exc


# Running


def _run(command: Command, *settings: BaseModel) -> CommandResult:
    if command.start:
        command.start(settings[0])
    if isinstance(settings[0], MlflowSettings):
        _use_mlflow(settings[0])
    return command.run(*settings)


def _use_mlflow(settings: MlflowSettings) -> None:
    import mlflow

    _make_logs_safe(logging.getLogger("mlflow"))  # it has a handler of its own
    if settings.tracking_uri:
        mlflow.set_tracking_uri(settings.tracking_uri)
    if settings.registry_uri:
        mlflow.set_registry_uri(settings.registry_uri)


def _set_up_logs(*, verbose: bool) -> None:
    """Show our own messages; those of libraries, Spark's JVM included, from warnings on, or with `verbose` all."""
    libraries = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=libraries, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger(scgpt_batch.__name__).setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.INFO)  # our endpoint
    logging.getLogger("py4j").setLevel(logging.WARNING)  # a line for each call to the JVM
    for own_level in ("alembic", "mlflow", "databricks"):
        logging.getLogger(own_level).setLevel(libraries)
    _make_logs_safe(logging.getLogger())
    if not verbose:
        warnings.filterwarnings("default", category=EmbeddingWarning, append=True)
        warnings.filterwarnings("ignore", append=True)


_SAFE_LOGS = SafeLogFilter()


def _make_logs_safe(logger: logging.Logger) -> None:
    for handler in logger.handlers:
        handler.addFilter(_SAFE_LOGS)


def _fail(exc: Exception, code: int, debug: bool) -> int:
    if debug:
        logging.getLogger(__name__).exception("%s", exc)
    more = "" if debug or isinstance(exc, ScgptBatchError) else " (--debug shows the traceback)"
    print(f"scgpt-batch: {in_one_line(exc)}{more}", file=sys.stderr)
    return code
