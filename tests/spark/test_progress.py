"""The bars over cells and tasks: what it shows, and that it ends with its block."""

import threading

import pytest

from scgpt_batch.settings import IngestSettings
from scgpt_batch.spark import progress
from scgpt_batch.spark.ingest import ingest
from scgpt_batch.spark.progress import CellProgress, shown, tasks_shown


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """As in a terminal."""
    monkeypatch.setattr(progress, "_is_watched", lambda: True)
    monkeypatch.setattr(progress, "SECONDS", 0.01)


def followers():
    return [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_bar_follows_and_ends_with_its_block(capsys):
    with shown(lambda: (3, 12), " cells"):
        assert len(followers()) == 1
    assert followers() == [] and "3/12" in capsys.readouterr().err


def test_bar_ends_with_an_error_in_its_block():
    answers = iter([(0, 12)])

    def figures():
        return next(answers)  # then it fails, as if the JVM has gone

    with pytest.raises(ValueError, match="cause"), shown(figures, " cells"):
        raise ValueError("the cause")
    assert followers() == []


def test_nothing_is_shown_to_a_log(monkeypatch, capsys, spark):
    monkeypatch.setattr(progress, "_is_watched", lambda: False)
    cells = CellProgress(spark, 12)
    with cells.shown(), cells.wave(12), tasks_shown(spark, "reading"):
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
        assert cells.done() == 6
    assert cells.done() == 10
    with cells.wave(10):
        assert cells.done() == 10


def test_bar_counts_the_tasks_of_its_block_alone(spark, capsys):
    spark.range(8, numPartitions=4).collect()
    with tasks_shown(spark, "reading"):
        spark.range(8, numPartitions=3).collect()
        spark.range(8, numPartitions=2).collect()
    assert spark.sparkContext.getLocalProperty("spark.jobGroup.id") is None
    shown = capsys.readouterr().err
    assert "reading" in shown and "5/5" in shown and followers() == []


def test_ingest_shows_its_progress(spark, pbmc3k, tmp_path, capsys):
    pbmc3k[:20].write_h5ad(tmp_path / "cells.h5ad")
    settings = IngestSettings(input=(str(tmp_path / "cells.h5ad"),), table=f"delta.`{tmp_path / 'rows'}`")
    assert ingest(spark, settings).cells == 20
    shown = capsys.readouterr().err
    assert "reading" in shown and "writing" in shown and "parts/s" in shown


def test_repeated_tasks_do_not_pass_the_waves_end(spark):
    cells = CellProgress(spark, 20)
    with cells.wave(10):
        cells.counter.add(15)
        assert cells.done() == 10
