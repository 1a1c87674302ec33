"""All errors of the package; the class says who can mend it.

* ScgptBatchError
  + ConfigError            the command cannot start: a setting, table, model or program is missing or wrong
    + CheckpointError      weights, args.json and vocabulary do not fit each other or this package
  + DataError              foreign data; the message is one line of bounded length
    + FileError            one file of counts cannot be read; other files are unaffected
    + RowError             one row has no answer; it is quarantined and the job goes on
      + PayloadError       the row cannot be read as AnnData
      + PreprocessError    its genes or cells could not be filtered, normalised or binned
      + InternalError      a fault of this package stood in the way; another version of it tries the row again
      + LowCoverage        too little of its counts lies in genes that the model knows
      + NonFiniteOutput    the model answered NaN or infinity
      + WorkerCrash        the process that read it died, alone with it
      + Timeout            it had no answer in the time allowed, alone in a process
  + RequestRefused         the endpoint does not answer a request; its status says whose fault that is
  + PartsFailed            the client got no answer for some cells; it holds the others'
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import format_exception
from typing import Any

logger = logging.getLogger(__name__)

SHOWN, MESSAGE_LENGTH = 100, 2_000  # characters of a wrong value in a message, and of a message about foreign data

# user:password@ of a URI (a password may hold / and @), and parameters of its query that hold a secret
_USERINFO = re.compile(r"(\w[\w+.-]{0,30})://([^/\s@'\"]{0,256}(?::[^\s@'\"]{0,256})?@(?:[^/\s@'\"]{0,256}@)*)")
_SECRETS = re.compile(r"(?i)(?<=[?&])((?:\w*password|\w*token|\w*secret|sig)=)[^&\s'\"]+")


class ScgptBatchError(Exception):
    """Anything that this package raises on purpose."""


class ConfigError(ScgptBatchError):
    """The command cannot start as it was called; the message says what to do."""


class CheckpointError(ConfigError):
    """Weights, args.json and vocab.json do not fit each other or this package."""


class DataError(ScgptBatchError):
    """Something is wrong with foreign data.

    The message is one line of bounded length, whatever the data put into it: it goes to tables, logs and clients.
    """

    def __init__(self, message: str) -> None:
        """Shorten the message and escape its control characters."""
        super().__init__(plain_line(message))


class FileError(DataError):
    """One file of counts cannot be read; the message says what is wrong with it. Other files are unaffected."""


class RowError(DataError):
    """One row has no result; other rows are unaffected.

    `report` holds what was counted in the row before the error (an `inference.results.RowReport`), for the ledger.
    """

    report: Any = None


class PayloadError(RowError):
    """The row cannot be read as AnnData; the message names the column and what is wrong."""


class PreprocessError(RowError):
    """The row was read, but its genes or cells could not be filtered, normalised or binned."""


class InternalError(RowError):
    """A fault of this package, not of the row's data: the row is tried again with another version of the package."""


class LowCoverage(RowError):
    """Too little of the row's counts lies in genes of the model's vocabulary."""


class NonFiniteOutput(RowError):
    """The model answered NaN or infinity for the row."""


class WorkerCrash(RowError):
    """The process that embedded the row died (native crash, out of memory), alone with it."""


class Timeout(RowError):
    """The row had no answer in the time allowed, alone in a process."""


class RequestRefused(ScgptBatchError):
    """The endpoint does not answer a request; `status` is the HTTP status, the message what to do."""

    def __init__(self, status: int, message: str) -> None:
        """Say whose fault it is by `status`: 4xx the client's, 5xx the model's."""
        super().__init__(message)
        self.status = status


class PartsFailed(ScgptBatchError):
    """Some cells have no answer; `failures` says which and why, `answered` holds the DataFrame of the others."""

    def __init__(self, message: str, *, failures: list[Any], answered: Any) -> None:
        """Keep what was answered: it has been paid for."""
        super().__init__(message)
        self.failures, self.answered = failures, answered


_DATA_ERRORS = (ValueError, ArithmeticError)  # of libraries, for values that they cannot take


@contextmanager
def row_errors() -> Iterator[None]:
    """Raise what a library raises for a row's data as an error of the row.

    scanpy, scipy and pandas refuse values by these classes. Any other exception is a fault of the code and becomes an
    InternalError, so that the row is tried again with another version of it. A missing package concerns all rows and
    passes.
    """
    try:
        yield
    except (RowError, MemoryError, ImportError):
        raise
    except _DATA_ERRORS as exc:
        _log_fault(exc)
        raise PreprocessError(f"{type(exc).__name__}: {exc}") from exc
    except Exception as exc:
        _log_fault(exc)
        raise InternalError(f"{type(exc).__name__}: {exc}; this is a fault of the package, please report it") from exc


def _log_fault(exc: Exception) -> None:
    """Log a library's error with its traceback; not by `exception`: Spark's workers log without our filter."""
    logger.error("a row could not be prepared\n    %s", indented("".join(format_exception(exc))))


def masked(text: str) -> str:
    """Return the text with `***` in the place of user name and password in each URI."""
    return _SECRETS.sub(r"\1***", _USERINFO.sub(_mask, text))


def _mask(found: re.Match[str]) -> str:
    scheme, user = found.groups()
    is_container = scheme.startswith(("abfs", "wasb")) and ":" not in user  # Azure's storage: abfss://container@account
    return found[0] if is_container else f"{scheme}://***@"


class SafeLogFilter(logging.Filter):
    """Masks secrets in what a handler is about to write, tracebacks included, and keeps data from forging log lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record, once however many handlers write it; it is always let through."""
        if getattr(record, "is_safe", False):
            return True
        record.is_safe = True
        record.msg, record.args = indented(masked(record.getMessage())), None
        if record.exc_info:
            trace = record.exc_text or logging.Formatter().formatException(record.exc_info)
            record.exc_text = indented(masked(f"\n{trace}")).lstrip("\n")
        return True


class EmbeddingWarning(UserWarning):
    """Embeddings were computed, but something about the input deserves a look; the message says what."""


def in_one_line(exc: Exception) -> str:
    """Say an error in one line: its first, without py4j's own call, and the root cause of a Java trace."""
    told = str(exc) if isinstance(exc, ScgptBatchError) else f"{type(exc).__name__}: {str(exc).strip()}"
    lines = [line for line in told.strip().splitlines() if "An error occurred while calling" not in line]
    first = lines[0].removeprefix(": ") if lines else type(exc).__name__
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    return printable(masked(f"{first}: {causes[-1]}" if causes else first))


def shortened(text: str) -> str:
    """Return a text for a message: its start, where it is long."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters)"


def plain_line(text: str) -> str:
    """Return a message about foreign data as one line of bounded length."""
    line = printable(text[: MESSAGE_LENGTH + 1])
    return line if len(line) <= MESSAGE_LENGTH else f"{line[: MESSAGE_LENGTH - 1]}…"


def indented(text: str) -> str:
    """Return a log message with its further lines indented and control characters escaped.

    A log line that starts a record then comes from the logger, never from data.
    """
    return "\n    ".join(map(printable, text.splitlines()))


def printable(text: str) -> str:
    """Return the text in one line, control characters escaped: an id with a line end must not forge a log line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
