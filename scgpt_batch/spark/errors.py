"""What an error of Spark, Delta or a file system reports.

The error class decides where there is one (`DELTA_CONCURRENT_APPEND`). The text is the fallback: errors of Java's file
systems have no class, classic Spark and Spark Connect raise different types for one fact, and an error that wraps
another one keeps the class of its cause in the text only.
"""

from collections.abc import Iterator

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark.errors import PySparkException

# parts of error classes, and of the text where there is no class
_CONFLICTS = ("DELTA_CONCURRENT", "DELTA_METADATA_CHANGED", "DELTA_PROTOCOL_CHANGED", "DELTA_TABLE_ID_MISMATCH",
              "ALREADY_EXISTS")  # fmt: skip
_CONFLICT_TEXTS = (*_CONFLICTS, "FileAlreadyExists")
_LOST_WORKER = ("PYTHON_EXCEPTION",)
_LOST_WORKER_TEXTS = (*_LOST_WORKER, "Python worker", "PythonException", "ExecutorLostFailure")
_NOT_SUPPORTED = ("NOT_SUPPORTED_WITH_SERVERLESS", "CONFIG_NOT_AVAILABLE")  # of Databricks' serverless compute
_DENIED = ("INSUFFICIENT_PERMISSIONS", "PERMISSION_DENIED")  # of Unity Catalog
_UNBOUND = ("UNBOUND_SQL_PARAMETER", "NOT_A_CONSTANT_STRING.NOT_CONSTANT")


def is_conflict(exc: BaseException) -> bool:
    """Return whether another writer changed or created the same table first."""
    return _reports(exc, _CONFLICTS, _CONFLICT_TEXTS)


def is_lost_worker(exc: BaseException) -> bool:
    """Return whether a Python worker, not a table or the cluster, failed or died."""
    return _reports(exc, _LOST_WORKER, _LOST_WORKER_TEXTS)


def is_folder_refused(exc: BaseException) -> bool:
    """Return whether the file system did not let Delta create a table's folder."""
    return _reports(exc, ("DELTA_CANNOT_CREATE_LOG_PATH",))


def is_location_taken(exc: BaseException) -> bool:
    """Return whether a new table's folder holds other files."""
    return _reports(exc, ("NON_EMPTY_LOCATION",))


def is_not_supported(exc: BaseException) -> bool:
    """Return whether the compute (Databricks serverless) has no such operation or setting."""
    return _reports(exc, _NOT_SUPPORTED)


def is_denied(exc: BaseException) -> bool:
    """Return whether Unity Catalog denied a permission."""
    return _reports(exc, _DENIED)


def is_unbound_parameter(exc: BaseException) -> bool:
    """Return whether the session does not bind SQL parameters."""
    return _reports(exc, _UNBOUND)


def error_classes(exc: BaseException) -> Iterator[str]:
    """Yield the error classes of an error and of its causes, as far as Spark tells them."""
    if isinstance(exc, PySparkException):
        if found := exc.getCondition():
            yield found
    elif isinstance(exc, Py4JJavaError):
        cause = exc.java_exception
        while cause is not None:
            try:
                found = cause.getErrorClass()
            except Py4JError:  # an exception that is not Spark's has no such method
                found = None
            if found:
                yield found
            cause = cause.getCause()


def _reports(exc: BaseException, classes: tuple[str, ...], texts: tuple[str, ...] = ()) -> bool:
    if any(part in found for found in error_classes(exc) for part in classes):
        return True
    return any(text in str(exc) for text in texts or classes)
