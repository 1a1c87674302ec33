"""The bar over cells and tasks: what it shows, and that it ends with its block."""

import threading

import pytest

from scgpt_batch.spark import progress
from scgpt_batch.spark.progress import CellProgress, shown


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """As in a terminal."""
    monkeypatch.setattr(progress, "_is_watched", lambda: True)
    monkeypatch.setattr(progress, "SECONDS", 0.01)


def followers():
    return [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_bar_follows_and_ends_with_its_block(capsys):
    with shown(lambda: 3, 12, " cells"):
        assert len(followers()) == 1
    assert followers() == [] and "3/12" in capsys.readouterr().err


def test_bar_ends_with_an_error_in_its_block():
    def done():
        raise OSError("the JVM has gone")

    with pytest.raises(ValueError, match="cause"), shown(done, 12, " cells"):
        raise ValueError("the cause")
    assert followers() == []


def test_nothing_is_shown_to_a_log(monkeypatch, capsys, spark):
    monkeypatch.setattr(progress, "_is_watched", lambda: False)
    cells = CellProgress(spark, 12)
    with cells.shown(), cells.wave(12):
        assert cells.counter is None and followers() == []
    assert capsys.readouterr().err == ""


def test_tasks_report_cells_within_a_wave(spark):
    cells = CellProgress(spark, 20)
    counter = cells.counter

    def finish(batches):
        for batch in batches:
            counter.add(batch.num_rows)
            yield batch

    with cells.wave(10):
        spark.range(6).mapInArrow(finish, "id LONG").collect()
        assert cells._done() == 6
    assert cells._done() == 10
    with cells.wave(10):
        assert cells._done() == 10


def test_repeated_tasks_do_not_pass_the_waves_end(spark):
    cells = CellProgress(spark, 20)
    with cells.wave(10):
        cells.counter.add(15)
        assert cells._done() == 10
