"""All errors of the package. The class tells what is at fault: the configuration, the data, a request or this package.

* ScgptBatchError
  + ConfigError            the command cannot start: a setting, table, model or program is missing or wrong
    + CheckpointError      weights, args.json and vocabulary contradict each other, or are not supported
  + DataError              the input data is at fault; the message is one line of bounded length
    + FileError            one input file cannot be read; other files are unaffected
    + RowError             one row failed; the ledger records it, and the job continues
      + PayloadError       the row is not a valid AnnData
      + PreprocessError    filtering, normalisation or binning of the row failed
      + InternalError      a bug in this package; the row is retried with another version of the package
      + LowCoverage        the genes in the model's vocabulary carry too small a share of the row's counts
      + NonFiniteOutput    the model returned NaN or infinity
      + WorkerCrash        the process that computed only this row crashed
      + Timeout            the process that computed only this row exceeded the time limit
  + RequestRefused         the endpoint rejects a request; the HTTP status tells a client error from a server error
  + PartsFailed            the client got no embeddings for some cells; the error carries those of the other cells
"""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from traceback import format_exception
from typing import Any

from scgpt_batch.near_misses import closest, did_you_mean

logger = logging.getLogger(__name__)

SHOWN = 100  # characters of a wrong value that a message quotes
NAMES_SHOWN = 20  # names that a message lists
MESSAGE_LENGTH = 2_000  # maximum characters of a message about input data
GPU_UNUSABLE = "this machine has a GPU, but torch cannot use it"  # `status` finds this in the log of an endpoint

# user:password@ of a URI (a password may contain / and @), and query parameters whose name suggests a secret
_USERINFO = re.compile(r"(\w[\w+.-]{0,30})://([^/\s@'\"]{0,256}(?::[^\s@'\"]{0,256})?@(?:[^/\s@'\"]{0,256}@)*)")
_SECRETS = re.compile(r"(?i)(?<=[?&])((?:\w*password|\w*token|\w*secret|sig)=)[^&\s'\"]+")


class ScgptBatchError(Exception):
    """Base class of all errors that this package raises deliberately."""


class ConfigError(ScgptBatchError):
    """The command cannot start as called; the message says what to change."""


class CheckpointError(ConfigError):
    """Weights, args.json and vocab.json contradict each other, or this package does not support them."""


class DataError(ScgptBatchError):
    """The input data is at fault.

    The message may quote names from the data and is written to tables, logs and HTTP responses. It is therefore always
    a single line of at most `MESSAGE_LENGTH` characters.
    """

    def __init__(self, message: str) -> None:
        """Escape control characters in the message and shorten it."""
        super().__init__(plain_line(message))


class FileError(DataError):
    """One input file cannot be read; other files are unaffected."""


class RowError(DataError):
    """One row has no result; other rows are unaffected.

    Attributes
    ----------
    report
        The counts and warnings collected before the error, for the ledger: an `inference.results.RowReport`, or None.
    """

    report: Any = None


class PayloadError(RowError):
    """The row is not a valid AnnData; the message names the column at fault."""


class PreprocessError(RowError):
    """The row is a valid AnnData, but filtering, normalisation or binning failed."""


class InternalError(RowError):
    """A bug in this package, not a fault of the data. The row is retried with another version of the package."""


class LowCoverage(RowError):
    """The genes in the model's vocabulary carry a smaller share of the row's counts than `min_coverage`."""


class NonFiniteOutput(RowError):
    """The model returned NaN or infinity for the row."""


class WorkerCrash(RowError):
    """The process that computed only this row crashed or ran out of memory."""


class Timeout(RowError):
    """The process that computed only this row exceeded the time limit."""


class RequestRefused(ScgptBatchError):
    """The endpoint rejects a request; the message says what to change.

    Attributes
    ----------
    status
        HTTP status: 4xx for an error of the client, 5xx for an error of the endpoint or the model.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class PartsFailed(ScgptBatchError):
    """The client got no embeddings for some cells.

    Attributes
    ----------
    failures
        The cells without embeddings and the reasons: a list of `client.Failure`.
    answered
        DataFrame with the embeddings of the other cells, so that they need not be computed again.
    """

    def __init__(self, message: str, *, failures: list[Any], answered: Any) -> None:
        super().__init__(message)
        self.failures, self.answered = failures, answered


_DATA_ERRORS = (ValueError, ArithmeticError)  # raised by scanpy, scipy and pandas for values they do not accept


@contextmanager
def row_errors() -> Iterator[None]:
    """Convert exceptions of other libraries into errors of the current row.

    ValueError and ArithmeticError become a PreprocessError, because libraries raise them for unsuitable data. Any other
    exception points to a bug and becomes an InternalError, so that a later version of the package retries the row.
    MemoryError and ImportError affect all rows and are not converted.
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
        raise InternalError(f"{type(exc).__name__}: {exc}; this is a bug in scgpt_batch, please report it") from exc


def _log_fault(exc: Exception) -> None:
    """Log an exception with its traceback.

    `logger.exception` would write the traceback unindented in Spark workers, where SafeLogFilter is not installed.
    """
    logger.error("a row could not be prepared\n    %s", indented("".join(format_exception(exc))))


def masked(text: str) -> str:
    """Return the text with user names, passwords and secret query parameters of URIs replaced by `***`."""
    return _SECRETS.sub(r"\1***", _USERINFO.sub(_mask, text))


def _mask(found: re.Match[str]) -> str:
    scheme, user = found.groups()
    # in Azure's abfss://container@account the part before @ is not a secret
    is_container = scheme.startswith(("abfs", "wasb")) and ":" not in user
    return found[0] if is_container else f"{scheme}://***@"


class SafeLogFilter(logging.Filter):
    """Masks secrets in log records and escapes control characters, tracebacks included.

    Names from input data can contain line breaks; without escaping they could imitate log records.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Sanitize the record in place, once even if several handlers write it. No record is dropped."""
        if getattr(record, "is_safe", False):
            return True
        record.is_safe = True
        record.msg, record.args = indented(masked(record.getMessage())), None
        if record.exc_info:
            trace = record.exc_text or logging.Formatter().formatException(record.exc_info)
            record.exc_text = indented(masked(f"\n{trace}")).lstrip("\n")
        return True


class EmbeddingWarning(UserWarning):
    """Embeddings were computed, but the input looks unusual; the message says in what way."""


def in_one_line(exc: Exception) -> str:
    """Return an error as one line, without secrets.

    Of a Java stack trace, the line consists of the first message and the root cause; py4j's own first line is dropped.
    """
    text = str(exc) if isinstance(exc, ScgptBatchError) else f"{type(exc).__name__}: {str(exc).strip()}"
    lines = [line for line in text.strip().splitlines() if "An error occurred while calling" not in line]
    first = lines[0].removeprefix(": ") if lines else type(exc).__name__
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    return printable(masked(f"{first}: {causes[-1]}" if causes else first))


def shortened(text: str) -> str:
    """Return a value for use in a message: unchanged, or its first `SHOWN` characters and its length."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters)"


def listed(names: Iterable[object], given: str = "") -> str:
    """Return names for a message, quoted, with the one that resembles `given` as a suggestion.

    >>> listed(["counts", "raw"], "count")
    "'counts', 'raw' (did you mean 'counts'?)"
    """
    known = [shortened(str(name)) for name in names]
    more = f", … ({len(known):,} in total)" if len(known) > NAMES_SHOWN else ""
    close = closest(given, known)
    hint = f" (did you mean {close!r}?)" if close else ""
    return (", ".join(map(repr, known[:NAMES_SHOWN])) or "none") + more + hint


def suggestion(name: str, known: Iterable[object], *, label: str = "known") -> str:
    """Return how to end a message about an unknown name: the closest known name, or after `label` all of them.

    >>> suggestion("cel", ["static", "cell"])
    ": did you mean 'cell'?"
    """
    names = list(map(str, known))
    return did_you_mean(name, names) or f"; {label}: {listed(names)}"


def install(extra: str) -> str:
    """Return the command that installs an extra. The package is on no index: `pip install scgpt_batch` finds nothing.

    >>> install("report")
    "pip install '.[report]' in a clone of scgpt_batch, or 'WHEEL[report]' with the path of its wheel"
    """
    return f"pip install '.[{extra}]' in a clone of scgpt_batch, or 'WHEEL[{extra}]' with the path of its wheel"


def plain_line(text: str) -> str:
    """Return a message about input data as one line of at most `MESSAGE_LENGTH` characters."""
    line = printable(text[: MESSAGE_LENGTH + 1])
    return line if len(line) <= MESSAGE_LENGTH else f"{line[: MESSAGE_LENGTH - 1]}…"


def indented(text: str) -> str:
    """Return a log message with control characters escaped and all lines but the first indented.

    Only lines that the logger itself writes then start at the margin; text from data cannot imitate them.
    """
    return "\n    ".join(map(printable, text.splitlines()))


def printable(text: str) -> str:
    """Return the text as one line, with control characters and line breaks escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
