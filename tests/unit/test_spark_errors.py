"""What an error of Spark or Delta reports: by its class where it has one, else by its text."""

import pytest
from py4j.protocol import Py4JError, Py4JJavaError
from pyspark.errors import AnalysisException, PySparkException

from scgpt_batch.spark.errors import (
    error_classes,
    is_conflict,
    is_folder_refused,
    is_location_taken,
    is_lost_worker,
    is_unbound_parameter,
)


class JavaError:
    """An exception of the JVM as py4j shows it; without `error_class`, one that is not Spark's."""

    _target_id = "o1"

    def __init__(self, error_class=None, cause=None):
        self._error_class, self._cause = error_class, cause

    def getErrorClass(self):
        if self._error_class is None:
            raise Py4JError("Method getErrorClass([]) does not exist")
        return self._error_class

    def getCause(self):
        return self._cause


def test_classes_of_causes_are_found():
    exc = Py4JJavaError("", JavaError("TASK_WRITE_FAILED", JavaError(None, JavaError("DELTA_CONCURRENT_APPEND"))))
    assert list(error_classes(exc)) == ["TASK_WRITE_FAILED", "DELTA_CONCURRENT_APPEND"]
    assert is_conflict(exc)


@pytest.mark.parametrize("name", ["DELTA_CONCURRENT_WRITE", "DELTA_METADATA_CHANGED", "TABLE_OR_VIEW_ALREADY_EXISTS"])
def test_the_class_alone_tells_a_conflict(name):
    assert is_conflict(PySparkException("sentences that may change", name))


@pytest.mark.parametrize(
    ("reports", "text"),
    [
        (is_conflict, "org.apache.hadoop.fs.FileAlreadyExistsException: 00000000000000000001.json"),
        (is_lost_worker, "Python worker exited unexpectedly (crashed)"),
        (is_folder_refused, "[DELTA_CANNOT_CREATE_LOG_PATH] Cannot create file:/x/_delta_log"),
        (is_location_taken, "[DELTA_CREATE_TABLE_WITH_NON_EMPTY_LOCATION] Cannot create table"),
    ],
)
def test_without_a_class_the_text_decides(reports, text):
    assert reports(RuntimeError(text)) and not reports(RuntimeError("No space left on device"))


def test_an_unbound_parameter_is_recognised():
    assert is_unbound_parameter(AnalysisException("?", "UNBOUND_SQL_PARAMETER"))
    assert not is_unbound_parameter(AnalysisException("?", "TABLE_OR_VIEW_NOT_FOUND"))
