"""The inference table: one Delta row per request and response, in the columns of Databricks' payload table.

A record is appended to a local file (the spool) before its response is sent; a thread moves closed files to the table.
Before a request is computed, it is noted in a separate file, which is removed when its record is appended. A note that
exists at the start belongs to a request that a killed process did not answer: it becomes a record with status 500 and
the code REQUEST_UNANSWERED.

Each spool file is one Delta transaction under the spool's id. Before a file is written, the table's last transaction of
that id is read, so each file is written exactly once, even if the process is killed in between.

Durability: an appended record survives a kill by any signal. A closed file also survives a power cut (`fsync` on
close, every `flush_seconds`); an open file, as far as the system has written it to disk.
"""

import errno
import fcntl
import logging
import os
import re
import stat
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import orjson
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema, Transaction, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError

from scgpt_batch.errors import ConfigError
from scgpt_batch.io.locations import canonical, delta_path
from scgpt_batch.serving.metrics import Metrics
from scgpt_batch.serving.request import MAX_CLIENT_ID

logger = logging.getLogger(__name__)

# Databricks, "AI Gateway-enabled inference tables": columns and types of <endpoint>_payload.
SCHEMA = pa.schema(
    [
        ("databricks_request_id", pa.string()),
        ("request_date", pa.date32()),
        ("client_request_id", pa.string()),
        ("request_time", pa.timestamp("us", tz="UTC")),
        ("status_code", pa.int32()),
        ("sampling_fraction", pa.float64()),
        ("execution_duration_ms", pa.int64()),
        ("request", pa.string()),
        ("response", pa.string()),
        ("logging_error_codes", pa.list_(pa.string())),
        ("served_entity_id", pa.string()),
        ("requester", pa.string()),
    ]
)
MAX_PAYLOAD = 2**20  # bytes of a request or response that Databricks still logs
UNANSWERED = "REQUEST_UNANSWERED"  # our own code: the process was killed before the response
MAX_SEGMENT = 32 * 2**20  # bytes of a spool file, which is read into memory to write it to the table

# Table features that prevent appends by delta-rs.
_UNSUPPORTED = {
    "clustering",
    "domainMetadata",
    "rowTracking",
    "inCommitTimestamp",
    "allowColumnDefaults",
    "typeWidening",
}


@dataclass(frozen=True)
class Exchange:
    """A request and its response. `request` is None if it was too large to read, or not valid gzip."""

    request_id: str
    at: datetime
    status: int
    seconds: float
    request: bytes | None
    response: bytes
    client_request_id: str | None = None
    served_entity: str | None = None
    requester: str | None = None
    too_large_to_read: bool = False

    def record(self) -> dict[str, Any]:
        """Return the table's columns in JSON types; a payload over 1 MiB is null, with a code that says so."""
        codes = []
        if self.too_large_to_read or len(self.request or b"") > MAX_PAYLOAD:
            codes.append("MAX_REQUEST_SIZE_EXCEEDED")
        if len(self.response) > MAX_PAYLOAD:
            codes.append("MAX_RESPONSE_SIZE_EXCEEDED")
        return {
            "databricks_request_id": self.request_id,
            "client_request_id": self.client_request_id,
            "request_time": int(self.at.timestamp() * 1e6),
            "status_code": self.status,
            "sampling_fraction": 1.0,
            "execution_duration_ms": round(self.seconds * 1000),
            "request": _text(self.request),
            "response": _text(self.response),
            "logging_error_codes": codes,
            "served_entity_id": self.served_entity,
            "requester": self.requester,
        }

    def unanswered(self) -> dict[str, Any]:
        """Return the record of a request whose process was killed; its duration is unknown."""
        record = self.record()
        codes = [*record["logging_error_codes"], UNANSWERED]
        return record | {"response": None, "execution_duration_ms": None, "logging_error_codes": codes}


def _text(payload: bytes | None) -> str | None:
    if payload is None or len(payload) > MAX_PAYLOAD:
        return None
    return payload.decode(errors="replace")


class Spool:
    """Numbered append-only files in a folder that one process owns; the newest is open, older ones are closed.

    Numbers only increase, also across restarts: the newest file stays, even empty, until there is a newer one.
    """

    def __init__(self, folder: Path) -> None:
        """Lock the folder; raise ConfigError if another process owns it or it is not writable."""
        self.folder, self._lock, self._torn = folder, threading.Lock(), False
        self._begun = folder / "unanswered"
        try:
            for place in (folder, self._begun):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_owner(place)
            self._owner = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.app_id = self._read_app_id()
            self._open(max(self._numbers(), default=0) + 1)
        except BlockingIOError as exc:
            raise ConfigError(f"a running endpoint uses spool {folder}: use another --spool for this one") from exc
        except OSError as exc:
            raise ConfigError(f"cannot write to spool {folder}: {exc.strerror}; use another --spool") from exc

    def begin(self, request_id: str, line: bytes) -> None:
        """Note a request before it is computed; an OSError means that the note was not written."""
        _create(self._note(request_id), line)

    def unanswered(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Yield id and record of each request that an earlier process noted; None if no record is needed.

        A process that was killed between a record and the removal of its note left the record in a file that still
        exists, because both happen under the lock that closing a file takes.
        """
        with os.scandir(self._begun) as entries:
            notes = [
                Path(entry)
                for entry in entries
                if re.fullmatch(r"[0-9a-f]{32}\.json", entry.name) and entry.is_file(follow_symlinks=False)
            ]
        answered = set()
        for number in self.closed(rotate=False) if notes else ():
            with suppress(UnreadableFile):  # moved aside when it is moved to the table
                answered |= {record["databricks_request_id"] for record in self.read(number)[0]}
        for path in notes:
            records, _ = _records(_read(path))  # none: the note is incomplete, so nothing was computed
            yield path.stem, None if path.stem in answered or not records else records[0]

    def forget(self, request_id: str) -> None:
        """Remove the note of a request, if there is one."""
        self._note(request_id).unlink(missing_ok=True)

    def append(self, line: bytes, *, request_id: str) -> None:
        """Write one line and remove the request's note; an OSError means that the line was not written."""
        with self._lock:
            # after a failed write, end the incomplete line first
            line = b"\n" + line + b"\n" if self._torn else line + b"\n"
            self._torn = True
            try:
                _write(self._file, line)
            finally:
                self.forget(request_id)
            self._torn = False
            self._size += len(line)
            if self._size > MAX_SEGMENT:
                self._rotate()

    def closed(self, *, rotate: bool) -> list[int]:
        """Return the numbers of all closed files, in order; with `rotate`, close the open file first."""
        with self._lock:
            if rotate and (self._size or self._torn):
                self._rotate()
            return [number for number in self._numbers() if number < self._number]

    def read(self, number: int) -> tuple[list[dict[str, Any]], int]:
        """Return a closed file's records, and the number of lines with other content.

        A line that does not parse is incomplete: its request got no response.

        Raises
        ------
        UnreadableFile
            It is not a regular file, or larger than any that this class writes.
        """
        return _records(_read(self._path(number)))

    def remove(self, number: int) -> None:
        """Remove a file whose records are in the table."""
        self._path(number).unlink()

    def move_aside(self, number: int) -> Path:
        """Rename a file so that it is no longer read; return the new path."""
        return self._path(number).rename(self.folder / f"{number:012d}.bad-{uuid.uuid4().hex[:8]}")

    def waiting_bytes(self) -> int:
        """Return the total size of the files."""
        return sum(self._path(number).lstat().st_size for number in self._numbers())

    def close(self) -> None:
        """Release the folder; the files stay."""
        os.close(self._file)
        os.close(self._owner)

    def _rotate(self) -> None:
        os.fsync(self._file)
        closed = self._file
        self._open(self._number + 1)
        os.close(closed)

    def _open(self, number: int) -> None:
        while True:
            try:
                self._file = _created(self._path(number))
                break
            except FileExistsError:  # not ours
                number += 1
        self._number, self._size, self._torn = number, 0, False
        folder = os.open(self.folder, os.O_RDONLY)
        os.fsync(folder)  # a number lost in a power cut would be reused
        os.close(folder)

    def _read_app_id(self) -> str:
        place = self.folder / "app_id"
        if not os.path.lexists(place):
            fresh = place.with_suffix(".new")
            fresh.unlink(missing_ok=True)
            _create(fresh, f"scgpt-batch-{uuid.uuid4()}".encode())
            fresh.rename(place)
        try:
            app_id = _read(place).decode(errors="replace")
        except UnreadableFile as exc:
            raise ConfigError(f"cannot read spool {self.folder}: {exc}; use another --spool") from exc
        if not re.fullmatch(r"scgpt-batch-[0-9a-f-]{36}", app_id):
            raise ConfigError(f"{place} does not contain the id of a spool: use another --spool")
        return app_id

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:012d}.jsonl"

    def _note(self, request_id: str) -> Path:
        return self._begun / f"{request_id}.json"

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.iterdir() if re.fullmatch(r"\d{12,15}\.jsonl", path.name))


class UnreadableFile(OSError):
    """A file in the spool that this package did not write: a link, folder, pipe, or a file of impossible size."""


def _created(path: Path) -> int:
    """Open a new file for appending; never write to an existing file or link."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_APPEND, 0o600)


def _create(path: Path, content: bytes) -> None:
    file = _created(path)
    try:
        _write(file, content)
    finally:
        os.close(file)


def _read(path: Path) -> bytes:
    """Read a regular file; links are not followed."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise UnreadableFile(f"{path} is a link") from exc
        raise
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableFile(f"{path} is not a regular file")
        if found.st_size > 2 * MAX_SEGMENT:
            raise UnreadableFile(f"{path} has {found.st_size} bytes, more than any spool file")
        with os.fdopen(file, "rb", closefd=False) as opened:
            return opened.read()
    finally:
        os.close(file)


def _records(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the records among the lines, and the number of lines that are JSON but not a record."""
    records, bad = [], 0
    for line in content.split(b"\n"):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if _is_record(record):
            records.append(record)
        else:
            bad += 1
    return records, bad


def _is_record(record: Any) -> bool:
    """Return whether a line is a record that fits the table."""
    if not isinstance(record, dict) or not isinstance(record.get("databricks_request_id"), str):
        return False
    try:
        _arrow([record])
    except (pa.ArrowException, TypeError, ValueError, KeyError, OverflowError, OSError):
        return False
    return True


def _check_owner(folder: Path) -> None:
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"other users can write to spool {folder}: use a folder that only you can access (chmod 700)")


def _write(file: int, line: bytes) -> None:
    if os.write(file, line) != len(line):
        raise OSError("short write: the disk is full")


class PayloadTable:
    """The Delta table, written with delta-rs."""

    def __init__(self, path: str) -> None:
        """Create the table if it does not exist.

        Raises
        ------
        ConfigError
            It has other columns, or features that prevent appends by delta-rs.
        """
        self.path = path
        try:
            table = self._opened()
        except (DeltaError, OSError) as exc:
            logger.warning("cannot open inference table %s now, requests are spooled: %s", path, exc)
            return
        _check_columns(table, path)
        features = set(table.protocol().writer_features or ())
        if features & _UNSUPPORTED:
            raise ConfigError(
                f"delta-rs cannot append to inference table {path}, because of its table features "
                f"{', '.join(sorted(features & _UNSUPPORTED))}: use the path of a new table"
            )

    def write(self, records: list[dict[str, Any]], app_id: str, version: int) -> None:
        """Append records in one transaction, unless the table already has that transaction."""
        table = self._opened()
        written = table.transaction_version(app_id)
        if written is not None and written >= version:
            return
        once = CommitProperties(app_transactions=[Transaction(app_id, version)])
        write_deltalake(table, _arrow(records), mode="append", commit_properties=once)

    def _opened(self) -> DeltaTable:
        """Open the table at its newest version: it may have been optimised, emptied or replaced meanwhile."""
        try:
            return DeltaTable(self.path)
        except TableNotFoundError:
            return DeltaTable.create(self.path, SCHEMA, mode="ignore")


def _check_columns(table: DeltaTable, path: str) -> None:
    found = {field.name: str(field.type) for field in table.schema().fields}
    expected = {field.name: str(field.type) for field in Schema.from_arrow(SCHEMA).fields}
    different = sorted(name for name in expected if found.get(name) != expected[name])
    if different or set(found) - set(expected):
        names = ", ".join(different or sorted(set(found) - set(expected)))
        raise ConfigError(f"{path} is not an inference table of this kind: column {names} differs; use another path")


def _arrow(records: list[dict[str, Any]]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [record.get(name) for record in records] for name in SCHEMA.names}
    columns["request_time"] = [datetime.fromtimestamp(at / 1e6, UTC) for at in columns["request_time"]]
    columns["request_date"] = [at.date() for at in columns["request_time"]]
    return pa.Table.from_pydict(columns, schema=SCHEMA)


class InferenceLog:
    """Spools records and moves them to the table in the background; errors here never fail a request."""

    def __init__(self, table: str, spool: str, *, flush_seconds: float, metrics: Metrics) -> None:
        """Open table and spool, and start to move the records that an earlier process left.

        Raises
        ------
        ConfigError
            Raised by `table_path`, `Spool` or `PayloadTable`.
        """
        path = table_path(table)
        self.spool = Spool(Path(spool or _beside(path)))
        self.table = PayloadTable(path)
        self._metrics, self._flush_seconds = metrics, flush_seconds
        self._stop, self._draining = threading.Event(), threading.Lock()
        self._record_unanswered()
        self._thread = threading.Thread(target=self._drain_regularly, name="inference-log", daemon=True)
        self._thread.start()

    def begin(self, exchange: Exchange) -> None:
        """Note a request before it is computed, so that it is recorded even if it kills the process."""
        try:
            self.spool.begin(exchange.request_id, orjson.dumps(exchange.unanswered()))
        except OSError as exc:
            self._warn_of_spool(exchange.request_id, exc)

    def append(self, exchange: Exchange) -> None:
        """Spool a record; if that fails, the record is lost, and a counter and a warning say so."""
        self._append(exchange.request_id, exchange.record())

    def _append(self, request_id: str, record: dict[str, Any]) -> None:
        try:
            self.spool.append(orjson.dumps(record), request_id=request_id)
        except OSError as exc:
            self._warn_of_spool(request_id, exc)
        else:
            self._metrics.spooled.inc()

    def _warn_of_spool(self, request_id: str, exc: OSError) -> None:
        self._metrics.log_failures.labels("spool").inc()
        logger.warning(
            "request %s is not in the inference table: cannot write to %s: %s", request_id, self.spool.folder, exc
        )

    def _record_unanswered(self) -> None:
        """Append records for the requests that a killed process did not answer."""
        for request_id, record in self.spool.unanswered():
            if record is None:
                self.spool.forget(request_id)
                continue
            logger.warning("request %s got no response: the process that computed it was killed", request_id)
            self._append(request_id, record | {"client_request_id": _client_request_id(record["request"])})

    def drain(self) -> bool:
        """Move all spooled records to the table; return False, with a warning, if the table cannot be written now."""
        with self._draining:
            try:
                self._metrics.spool_bytes.set(self.spool.waiting_bytes())
                for rotate in (False, True):  # on a full disk, moving closed files makes room for the next file
                    for number in self.spool.closed(rotate=rotate):
                        self._move_to_table(number)
                self._metrics.spool_bytes.set(self.spool.waiting_bytes())
            except Exception as exc:  # after any error the records stay in the spool and are tried again
                self._metrics.log_failures.labels("table").inc()
                logger.warning("cannot write to inference table %s, tried again later: %s", self.table.path, exc)
                return False
            return True

    def _move_to_table(self, number: int) -> None:
        try:
            records, bad = self.spool.read(number)
        except UnreadableFile as exc:
            self._move_aside(number, str(exc))
            return
        if records:
            self.table.write(records, self.spool.app_id, number)
            self._metrics.logged.inc(len(records))
        if bad:
            self._move_aside(number, f"{bad} of its lines are not records; the other {len(records)} are in the table")
        else:
            self.spool.remove(number)

    def _move_aside(self, number: int, reason: str) -> None:
        kept = self.spool.move_aside(number)
        self._metrics.log_moved_aside.inc()
        logger.warning("spool file %d was moved to %s: %s", number, kept, reason)

    def _drain_regularly(self) -> None:
        self.drain()
        while not self._stop.wait(self._flush_seconds):
            self.drain()

    def close(self) -> None:
        """Move the remaining records to the table, and release the spool."""
        self._stop.set()
        self._thread.join()
        if not self.drain():
            logger.warning("spool %s keeps records that the next start writes to the table", self.spool.folder)
        self.spool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _client_request_id(request: str | None) -> str | None:
    """Return the client's id in a request; None if there is none, or the request was not logged."""
    try:
        document = orjson.loads(request or "")
    except orjson.JSONDecodeError:
        return None
    client_id = document.get("client_request_id") if isinstance(document, dict) else None
    return client_id if isinstance(client_id, str) and len(client_id) <= MAX_CLIENT_ID else None


def table_path(table: str) -> str:
    """Return the path or URI of a table given as delta.`path` or path; raise ConfigError for a catalog name."""
    if path := delta_path(table) or (table if "/" in table else None):
        return canonical(path)
    raise ConfigError(
        f"inference table {table!r} is not a path: the endpoint writes without a Spark catalog; use delta.`path`"
    )


def _beside(path: str) -> str:
    if "://" in path:
        raise ConfigError(f"inference table {path} is not on this machine: set a local folder with --spool")
    return path.rstrip("/") + "_spool"
