"""Delta tables at paths, opened without Spark by delta-rs. Importing this module is quick."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scgpt_batch.errors import ConfigError
from scgpt_batch.io.locations import canonical, delta_path, is_remote, tables_in_folder
from scgpt_batch.near_misses import closest


class SparkNeeded(ConfigError):
    """The table exists, but only Spark can read it."""


def table_path(table: str) -> str | None:
    """Return the path or URI of a table that is given by it, alone or as ``delta.`path` ``; None for a table's name."""
    path = delta_path(table.strip()) or (table if "/" in table or Path(table).is_dir() else None)
    return path and canonical(path)


def open_table(path: str, version: int | None = None) -> Any:
    """Return the `deltalake.DeltaTable` at a path, by default in its newest version.

    Raises
    ------
    SparkNeeded
        deltalake is not installed, or cannot read the table.
    ConfigError
        There is no Delta table.
    """
    with _delta_errors(path):
        from deltalake import DeltaTable

        return DeltaTable(path, version=version)


@contextmanager
def _delta_errors(path: str) -> Iterator[None]:
    """Raise what delta-rs cannot read as a ConfigError that names the path."""
    try:
        from deltalake.exceptions import DeltaError, TableNotFoundError
    except ModuleNotFoundError as exc:
        raise SparkNeeded(f"reading Delta without Spark needs {exc.name}: pip install deltalake") from exc
    try:
        yield
    except TableNotFoundError as exc:
        folder, _, name = path.rstrip("/").rpartition("/")
        close = closest(name, tables_in_folder(folder))
        meant = f": did you mean {folder}/{close}?" if close else ": check the path"
        raise ConfigError(f"there is no Delta table at {path}{meant}") from exc
    except (DeltaError, OSError) as exc:
        raise SparkNeeded(f"{path} cannot be read without Spark: {str(exc).splitlines()[0]}") from exc


def open_dataset(path: str, version: int | None = None) -> Any:
    """Return the `pyarrow.dataset.Dataset` of the Delta table at a path; raises as `open_table` does."""
    with _delta_errors(path):
        return open_table(path, version).to_pyarrow_dataset(filesystem=_local_files(path))


def _local_files(path: str) -> Any:
    """Return pyarrow's own file system at a local path; None for a URI, which delta-rs opens.

    Arrow's threads call delta-rs's file system in Python. If one of them still does when the process ends, it aborts.
    """
    if is_remote(path):
        return None
    from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

    return SubTreeFileSystem(str(Path(path).absolute()), LocalFileSystem())
