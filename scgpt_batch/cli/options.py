"""The options of each command, made from the fields of its settings: groups, metavars, help and completion."""

import argparse
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from argcomplete.completers import ChoicesCompleter, FilesCompleter
from pydantic.fields import FieldInfo

from scgpt_batch.cli.load_settings import is_dict, is_list, named_values

PATH, TABLE = "PATH", "TABLE"

# Group -> setting -> metavar; without one the type decides.
GROUPS: dict[str, dict[str, str]] = {
    "input and output": {
        "h5ad": PATH, "input": PATH, "table": TABLE, "input_table": TABLE, "output_table": TABLE, "ledger_table": TABLE,
        "runs_table": TABLE, "search_table": TABLE, "inference_table": TABLE, "requests_view": "VIEW",
        "rows": "TABLE|PATH", "out": "TABLE|PATH", "query": TABLE, "reference": TABLE, "labels": "TABLE|PATH",
        "label_column": "COLUMN", "obs": "TABLE|PATH", "format": "",
        "batch_column": "COLUMN", "cells": "TABLE|PATH", "scores_table": TABLE, "gmt": PATH,
        "embeddings": TABLE, "tables": TABLE, "report": PATH, "spool": PATH, "key_added": "KEY",
        "layer": "auto|X|raw|LAYER", "split_by": "COLUMN", "gene_symbols": "COLUMN",
        "sample_id": "file|none|COLUMN", "id_from": "", "cells_per_row": "",
    },
    "model": {
        "checkpoint": PATH, "name": "NAME", "alias": "ALIAS", "model_uri": "URI", "input_roots": PATH,
        "requirement": "PACKAGE==VERSION", "deployment_job": "ID",
        "model_version": "VERSION", "run_id": "ID",
        "challenger": "ALIAS|VERSION", "champion": "ALIAS", "mode": "", "genes": "GENE", "group_by": "COLUMN",
        "compare_version": "VERSION", "max_length": "", "seed": "", "dtype": "", "min_coverage": "FRACTION",
        "allow_other_code": "",
    },
    "preprocessing": {
        "preset": "", "need_preprocess": "", "data_is_raw": "", "data_is_binned": "", "filter_gene_by_counts": "",
        "filter_cell_by_counts": "", "min_cell_counts": "", "normalize_total": "SUM", "result_normed_key": "LAYER",
        "log1p": "", "result_log1p_key": "LAYER", "subset_hvg": "", "hvg_flavor": "", "batch_key": "COLUMN",
        "binning": "", "tie_break": "",
    },
    "analysis": {
        "neighbours": "", "metric": "", "vote": "", "min_confidence": "FRACTION", "correct_frequency": "",
        "resolution": "", "min_genes": "", "seeds": "", "max_cells": "",
    },
    "endpoint": {
        "endpoint": "NAME", "rollback": "", "traffic": "old=N,new=N", "workload_type": "TYPE", "workload_size": "SIZE",
        "scale_to_zero": "", "usage_tracking": "", "allow_user": "", "can_query": "PRINCIPAL",
        "host": "ADDRESS", "port": "PORT",
        "trusted_proxies": "ADDRESS", "allow_without_token": "", "timeout_seconds": "SECONDS",
        "header_seconds": "SECONDS", "body_seconds": "SECONDS", "shutdown_seconds": "SECONDS",
        "flush_seconds": "SECONDS", "max_request_bytes": "BYTES", "max_answer_bytes": "BYTES", "max_concurrent": "",
        "max_connections": "", "batch_wait_ms": "MS",
    },
    "checks": {
        "fail_on": "", "ignore": "RULE", "severity": "RULE=SEVERITY", "hours": "HOURS", "days": "DAYS",
        "delay_minutes": "MINUTES", "max_error_rate": "FRACTION", "max_client_error_rate": "FRACTION",
        "min_errors": "", "max_p95_ms": "MS", "slow_ms": "MS", "min_volume": "FRACTION", "min_usual_requests": "N",
        "max_canary_days": "DAYS", "max_run_age_hours": "HOURS", "max_cosine": "COSINE",
        "max_rows": "", "tolerance": "DIFFERENCE", "max_slowdown": "RATIO", "min_cosine": "COSINE",
    },
    "run control": {
        "max_failed_fraction": "FRACTION", "plan": "", "retry_failed": "", "wave_cells": "", "row_timeout": "SECONDS",
        "prune": "", "trigger": "", "checkpoint_location": PATH, "date_column": "COLUMN", "retain_days": "DAYS",
        "runs_days": "DAYS",
        "cluster_by": "COLUMN", "vacuum_hours": "HOURS", "force": "", "retry_seconds": "SECONDS",
        "poll_seconds": "SECONDS", "timeout_minutes": "MINUTES",
    },
    "Spark and MLflow": {
        "spark_conf": "NAME=VALUE", "tracking_uri": "URI", "registry_uri": "URI", "experiment": "NAME",
    },
}  # fmt: skip
COMMON_OPTIONS = ("config", "debug", "json", "verbose")  # of every command


def add_options(parser: argparse.ArgumentParser, fields: Mapping[str, FieldInfo]) -> None:
    """Add an option for each setting, in groups, and those that every command has."""
    for title, metavars in GROUPS.items():
        names = [name for name in metavars if name in fields]
        if names:
            group = parser.add_argument_group(title)
            for name in names:
                _add_option(group, name, fields[name], metavars[name])
    control = parser.add_argument_group("configuration and output")
    control.add_argument(
        "--config", metavar="FILE", help="YAML file of settings: a section per command, and one named `common`"
    ).completer = FilesCompleter(("yml", "yaml"))  # type: ignore[attr-defined]
    control.add_argument("--json", action="store_true", help="print the JSON line only, also in a terminal")
    control.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    control.add_argument("--verbose", action="store_true", help="show what Spark and other libraries print, too")


def _add_option(group: Any, name: str, field: FieldInfo, metavar: str) -> None:
    """Add an option without a default: values are checked later, with those of file and environment."""
    choices = _choices(field)
    arguments: dict[str, Any] = {"metavar": metavar or "|".join(filter(None, choices)) or _metavar_of_type(field)}
    if is_list(field):
        arguments["nargs"] = "+"
    elif is_dict(field):
        arguments |= {"nargs": "+", "action": _NamedValues}
    elif field.annotation is bool:
        arguments |= {"nargs": "?", "const": True}
    option = group.add_argument(flag(name), dest=name, default=None, help=_help(field), **arguments)
    if choices:
        option.completer = ChoicesCompleter(dict.fromkeys(choices, ""))
    elif PATH in metavar:
        option.completer = FilesCompleter()


def _choices(field: FieldInfo) -> list[str]:
    if field.annotation is bool:
        return ["true", "false"]
    return list(get_args(field.annotation)) if get_origin(field.annotation) is Literal else []


def _metavar_of_type(field: FieldInfo) -> str:
    return "N" if field.annotation is int else "NUMBER"


def _help(field: FieldInfo) -> str:
    if field.is_required():
        default = " (required)"
    elif field.default in (None, "", (), {}):
        default = ""
    else:
        default = f" [{_written(field.default)}]"
    return f"{field.description}{default}".replace("%", "%%")


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


class _NamedValues(argparse.Action):
    """Collects NAME=VALUE words into a dictionary."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            setattr(namespace, self.dest, named_values(values))
        except ValueError as exc:
            parser.error(f"{option_string}: {exc}")


def flag(name: str) -> str:
    """Return a setting's option: `--cells-per-row`."""
    return f"--{name.replace('_', '-')}"
