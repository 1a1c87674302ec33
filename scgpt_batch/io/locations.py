"""Where files of counts are: paths, globs and URIs; their readable names; and what tells that one has changed."""

import glob
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from scgpt_batch.errors import ConfigError

HEAD_BYTES = 65_536  # of a file, hashed to tell that it has changed
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

_METADATA = (".zmetadata", "zarr.json", ".zattrs", ".zgroup")


def is_remote(source: str) -> bool:
    """Tell whether a source is a URI rather than a path."""
    return "://" in source


def canonical(given: str) -> str:
    """Return a path as this machine sees it: of `file://`, `dbfs:/` and `~`; other URIs stay as they are."""
    if given.startswith("file:"):
        plain = given.removeprefix("file:")
        return "/" + plain.lstrip("/") if plain.startswith("/") else plain
    if given.startswith("dbfs:"):
        path = "/" + given.removeprefix("dbfs:").lstrip("/")
        return path if path.startswith(("/Volumes/", "/dbfs/")) else f"/dbfs{path}"
    return given if is_remote(given) else str(Path(given).expanduser())


def find_sources(patterns: Sequence[str]) -> list[str]:
    """Resolve paths, globs and URIs to files and folders; one that is named twice counts once.

    Raises
    ------
    ConfigError
        There is nothing of this name, or its file system needs a package.
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
        sources = [system.unstrip_protocol(name) for name in names]
    else:
        sources = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))  # noqa: PTH207  # absolute too
        sources = [str(Path(name).absolute()) for name in sources]
    if not sources:
        raise ConfigError(f"no file {pattern}")
    return sources


def _file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URI, and the path in it."""
    import fsspec  # imported late: local files do not need it

    protocol = url.split("://", 1)[0]
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as exc:  # a ValueError where fsspec does not know the protocol
        if package := PACKAGES.get(protocol):
            raise ConfigError(f"{url}: reading {protocol}:// needs another package: pip install {package}") from exc
        raise ConfigError(f"{url}: {exc}") from exc


def is_folder(source: str) -> bool:
    """Tell whether a source is a folder."""
    if is_remote(source):
        system, path = _file_system(source)
        return bool(system.isdir(path))
    return Path(source).is_dir()


def list_folder(source: str) -> list[str]:
    """Return the names in a folder."""
    if is_remote(source):
        system, path = _file_system(source)
        return [name.rstrip("/").rsplit("/", 1)[-1] for name in system.ls(path, detail=False)]
    return [entry.name for entry in Path(source).iterdir()]


def open_binary(source: str) -> Any:
    """Open a file for reading bytes at any place."""
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
    """Return the last part of a path or URI, without the suffix of a file of counts."""
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
    """Give each source a readable name that no other has, from which the ids of its rows are made.

    A name is the file's stem; where that is taken, as many of its folders are put before it as are needed. A source
    keeps the name that its rows in the table have.

    Parameters
    ----------
    sources
        Files to name.
    id_from
        The shortest name: the stem ("name"), folder and stem ("parent"), or the whole path ("path").
    known
        Names in the table: of each source, these and others.
    """
    known = known or {}
    named = {source: name for source in sources if (name := known.get(source)) in candidates(source, id_from)}
    taken = {name for source, name in known.items() if source not in sources or source in named}
    open_ones = {source: candidates(source, id_from) for source in sources if source not in named}
    times = Counter(name for names in open_ones.values() for name in names)
    for source, names in open_ones.items():
        free = (name for name in names if times[name] == 1 and name not in taken)
        named[source] = next(free, source)
    return {source: named[source] for source in sources}


def candidates(source: str, id_from: str = "name") -> list[str]:
    """List the names of a source from the shortest on: first without its suffix, then with it."""
    head, _, last = source.rstrip("/").rpartition("/")
    folders = head.split("/") if head else []
    first = {"name": 0, "parent": min(1, len(folders)), "path": len(folders)}[id_from]
    depths = range(first, len(folders) + 1)
    names = [
        "/".join([*folders[len(folders) - depth :], name]) for name in (_without_suffix(last), last) for depth in depths
    ]
    return list(dict.fromkeys(names))


def fingerprint(source: str) -> str:
    """Say by size, time and the hash of its start what a file or folder is, without reading all of it."""
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
