"""Locations of input files: paths, globs and URIs, readable names for them, and fingerprints that detect changes."""

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scgpt_batch.errors import ConfigError

HEAD_BYTES = 65_536  # bytes at the start of a file that go into its fingerprint
SUFFIXES = (".zarr.zip", ".h5ad", ".h5mu", ".hdf5", ".h5", ".zarr", ".zip", ".mtx.gz", ".mtx")
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}
ID_FROM = ("name", "parent", "path")

_DELTA_PATH = re.compile(r"delta\.`([^`]+)`")
_TABLE_NAME = re.compile(r"(`[^`]+`|\w+)(\.(`[^`]+`|\w+)){0,2}")
_METADATA = (".zmetadata", "zarr.json", ".zattrs", ".zgroup")


def delta_path(table: str) -> str | None:
    """Return the path of a table that is given as delta.`path`; None for any other text.

    >>> delta_path("delta.`/data/cells`")
    '/data/cells'
    """
    match = _DELTA_PATH.fullmatch(table)
    return match[1] if match else None


def table_name(given: str) -> str:
    """Return a checked table name: one to three parts, or delta.`path` with the path made absolute if it is local.

    Raises
    ------
    ConfigError
        It has another form, or contains `${`, which Spark replaces in SQL text.
    """
    if "${" in given:
        raise ConfigError(f"table {given!r} contains ${{...}}, which Spark replaces in SQL: rename the table or folder")
    if path := delta_path(given.strip()):
        return f"delta.`{path if '://' in path or path.startswith('dbfs:') else Path(path).absolute()}`"
    if is_table_name(given.strip()):
        return given.strip()
    raise ConfigError(f"{given!r} is not a table name: use catalog.schema.table or delta.`path`")


def is_table_name(text: str) -> bool:
    """Return whether a text has the form of a table's name in a catalog: one to three parts.

    >>> is_table_name("main.lab.gene_embeddings"), is_table_name("/data/gene_embeddings")
    (True, False)
    """
    return _TABLE_NAME.fullmatch(text) is not None


def beside(table: str, suffix: str) -> str:
    """Return the name of a companion table: `suffix` is appended to the name or path."""
    return f"{table[:-1].rstrip('/')}{suffix}`" if table.endswith("`") else f"{table}{suffix}"


def tables_in_folder(folder: str) -> list[str]:
    """Return the names of a folder's Delta tables, if its file system is this machine's."""
    return [log.parent.name for log in Path(folder).glob("*/_delta_log")] if not is_remote(folder) else []


def is_remote(source: str) -> bool:
    """Return whether a source is a URI rather than a local path."""
    return "://" in source


def canonical(given: str) -> str:
    """Return the local path for `file://`, `dbfs:/` and `~`; other URIs are returned unchanged.

    >>> canonical("dbfs:/Volumes/main/lab/pbmc.h5ad")
    '/Volumes/main/lab/pbmc.h5ad'
    """
    if given.startswith("file:"):
        plain = given.removeprefix("file:")
        return "/" + plain.lstrip("/") if plain.startswith("/") else plain
    if given.startswith("dbfs:"):
        path = "/" + given.removeprefix("dbfs:").lstrip("/")
        return path if path.startswith(("/Volumes/", "/dbfs/")) else f"/dbfs{path}"
    return given if is_remote(given) else str(Path(given).expanduser())


def local_path(given: str | Path, what: str) -> Path:
    """Return the path on this machine of a file or folder, given as a path, `file:` or `dbfs:/`.

    Parameters
    ----------
    what
        What the path is for; starts the error message.

    Raises
    ------
    ConfigError
        It is in other storage.
    """
    path = canonical(str(given))
    if is_remote(path):
        raise ConfigError(
            f"{what} {path} is not a path on this machine: copy it here first; on Databricks, put it into a volume and "
            "give /Volumes/catalog/schema/volume/…"
        )
    return Path(path)


def find_sources(patterns: Sequence[str]) -> list[str]:
    """Return the files and folders that paths, globs and URIs refer to, each once.

    Raises
    ------
    ConfigError
        A pattern matches nothing, or reading it requires a package that is not installed.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        for source in _matches(canonical(pattern)):
            found.setdefault(source if is_remote(source) else os.path.realpath(source), source)
    return list(found.values())


def _matches(pattern: str) -> list[str]:
    if is_remote(pattern):
        system, path = _file_system(pattern)
        names = sorted(system.glob(path)) if glob.has_magic(path) else [path] if system.exists(path) else []
        sources = [_uri(system, name, pattern) for name in names]
    else:
        sources = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))  # noqa: PTH207  # absolute too
        sources = [str(Path(name).absolute()) for name in sources]
    if not sources:
        raise ConfigError(f"no file matches {pattern}; check the path and that this machine can read it")
    return sources


def _uri(system: Any, name: str, pattern: str) -> str:
    """Return the URI of a file that a pattern matched; it names the Azure storage account if the pattern does."""
    parts = urlsplit(pattern)
    if "@" in parts.netloc:  # abfss://container@account/…: the name starts with the container, without the account
        return f"{parts.scheme}://{parts.netloc}/{name.partition('/')[2]}"
    return str(system.unstrip_protocol(name))


def _file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URI, and the path in it."""
    import fsspec  # imported late: local files do not need it

    protocol = url.split("://", 1)[0]
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as exc:  # fsspec raises ValueError for an unknown protocol
        if package := PACKAGES.get(protocol):
            raise ConfigError(f"{url}: reading {protocol}:// needs a package: pip install {package}") from exc
        raise ConfigError(f"{url}: {exc}") from exc


def is_folder(source: str) -> bool:
    """Return whether a source is a folder."""
    if is_remote(source):
        system, path = _file_system(source)
        return bool(system.isdir(path))
    return Path(source).is_dir()


def list_folder(source: str) -> list[str]:
    """Return the names of the files and folders in a folder."""
    if is_remote(source):
        system, path = _file_system(source)
        return [name.rstrip("/").rsplit("/", 1)[-1] for name in system.ls(path, detail=False)]
    return [entry.name for entry in Path(source).iterdir()]


def open_binary(source: str) -> Any:
    """Open a file for reading bytes, with random access."""
    if is_remote(source):
        system, path = _file_system(source)
        return system.open(path, "rb")
    return Path(source).open("rb")


def size_of(source: str) -> int:
    """Return a file's size in bytes."""
    if is_remote(source):
        system, path = _file_system(source)
        return int(system.size(path))
    return Path(source).stat().st_size


def stem(source: str) -> str:
    """Return the last part of a path or URI, without the suffix of a supported format.

    >>> stem("s3://lab/runs/pbmc.zarr.zip")
    'pbmc'
    """
    return _without_suffix(source.rstrip("/").rsplit("/", 1)[-1])


def _without_suffix(name: str) -> str:
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def name_sources(
    sources: Sequence[str],
    id_from: str = "name",
    known: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return a unique readable name for each source; the ids of its rows start with it.

    The name is the file's stem, preceded by as many of its folders as make it unique. A source that is already in the
    table keeps its name.

    Parameters
    ----------
    sources
        Files to name.
    id_from
        The shortest possible name: the stem ("name"), folder and stem ("parent"), or the whole path ("path").
    known
        Names of the sources that are already in the table.
    """
    known = known or {}
    named = {source: name for source in sources if (name := known.get(source)) in candidates(source, id_from)}
    taken = {name for source, name in known.items() if source not in sources or source in named}
    unnamed = {source: candidates(source, id_from) for source in sources if source not in named}
    uses = Counter(name for names in unnamed.values() for name in names)
    for source, names in unnamed.items():
        free = (name for name in names if uses[name] == 1 and name not in taken)
        named[source] = next(free, source)
    return {source: named[source] for source in sources}


def candidates(source: str, id_from: str = "name") -> list[str]:
    """Return the possible names of a source, shortest first; names without its suffix precede those with it."""
    head, _, last = source.rstrip("/").rpartition("/")
    folders = head.split("/") if head else []
    first = {"name": 0, "parent": min(1, len(folders)), "path": len(folders)}[id_from]
    depths = range(first, len(folders) + 1)
    names = [
        "/".join([*folders[len(folders) - depth :], name]) for name in (_without_suffix(last), last) for depth in depths
    ]
    return list(dict.fromkeys(names))


def fingerprint(source: str) -> str:
    """Return a fingerprint of a file or folder, from sizes, times and the start of files, without reading all of it."""
    digest = blake2b(digest_size=16)
    if is_remote(source):
        system, path = _file_system(source)
        found = system.find(path, detail=True) if system.isdir(path) else {path: system.info(path)}
        for name in sorted(found):
            digest.update(repr((name, _state(found[name]))).encode())
        return f"{sum(entry['size'] or 0 for entry in found.values())}:{digest.hexdigest()}"
    local = Path(source)
    files = sorted(entry for entry in local.rglob("*") if entry.is_file()) if local.is_dir() else [local]
    total = 0
    for file in files:
        state = file.stat()
        total += state.st_size
        digest.update(repr((str(file), state.st_size, state.st_mtime_ns)).encode())
        if len(files) <= 10 or file.name in _METADATA:
            with file.open("rb") as opened:
                digest.update(opened.read(HEAD_BYTES))
    return f"{total}:{digest.hexdigest()}"


def _state(info: Mapping[str, Any]) -> list[str]:
    keys = ("size", "ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime")
    return [str(info[key]) for key in (*keys, "created") if key in info]
