"""When a run may take from an earlier one that it has nothing to do."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pandas as pd
import pytest

from scgpt_batch.parameters import Parameters
from scgpt_batch.settings import EmbedSettings
from scgpt_batch.spark import tables, work_to_do
from scgpt_batch.spark.job import Job
from scgpt_batch.spark.work_to_do import same_state, state_after, state_of

NOW = datetime(2026, 11, 28, tzinfo=UTC)
ROWS, LEDGER, OUT = (tables.Snapshot(version, NOW) for version in (3, 5, 7))


def job(parameters=None, **settings):
    """A run over a table with snapshot `ROWS`."""
    words = {"model_uri": "models:/m/1", "input_table": "rows", "output_table": "out"} | settings
    return Job(
        spark=None, settings=EmbedSettings(**words), parameters=Parameters(**(parameters or {})),
        model=SimpleNamespace(name="m", version="1"), input="rows", input_snapshot=ROWS, output="out",
        ledger="out_ledger", runs="out_runs", started=NOW,
    )  # fmt: skip


def runs(*lines):
    """Runs: status, state, days ago."""
    return pd.DataFrame(
        [{"run_id": f"r{i}", "status": status, "started_at": pd.Timestamp(NOW - timedelta(days=days)), "rows_in": 12,
          "output_version": 7, "state": state} for i, (status, state, days) in enumerate(lines)]
    )  # fmt: skip


@pytest.fixture(autouse=True)
def stored(monkeypatch):
    """The newest snapshots of the ledger and the output."""
    newest = {"out": OUT, "out_ledger": LEDGER}
    monkeypatch.setattr(tables, "snapshot", lambda spark, table: newest[table])


def done(found, ledger=LEDGER):
    same = same_state(job(), ledger, found)
    return None if same is None else int(same["rows_in"])


def test_same_state_of_a_finished_run_means_nothing_to_do():
    state = state_of(job(), LEDGER, OUT)
    assert done(runs(("finished", state, 1))) == 12
    assert done(runs(("finished", state, 2), ("finished", "another", 1))) == 12
    assert done(runs(("finished", None, 1), ("finished", "another", 1))) is None
    assert done(None) is None and done(runs(("finished", state, 1)), ledger=None) is None


@pytest.mark.parametrize("status", ["running", "failed"])
def test_an_unfinished_run_may_have_left_something(status):
    state = state_of(job(), LEDGER, OUT)
    assert done(runs(("finished", state, 1), (status, None, 0))) is None
    assert done(runs((status, state, 1))) is None
    assert done(runs((status, None, 9), ("finished", state, 1))) == 12  # finished runs have removed its remains


CHANGES = {
    "input": lambda run: replace(run, input_snapshot=replace(ROWS, version=4)),
    "input made anew": lambda run: replace(run, input_snapshot=replace(ROWS, at=NOW + timedelta(hours=1))),
    "model": lambda run: replace(run, model=SimpleNamespace(name="m", version="2")),
    "parameters": lambda run: replace(run, parameters=Parameters(mode="cell")),
    "coverage": lambda run: replace(run, parameters=Parameters(min_coverage=0.1)),
    "time limit": lambda run: replace(run, settings=job(row_timeout=60).settings),
    "versions to keep": lambda run: replace(run, settings=job(prune=1).settings),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_about_rows_is_in_the_state(name):
    assert state_of(CHANGES[name](job()), LEDGER, OUT) not in (None, state_of(job(), LEDGER, OUT))


def test_changed_tables_and_libraries_are_another_state(monkeypatch):
    state = state_of(job(), LEDGER, OUT)
    assert state_of(job(), replace(LEDGER, version=6), OUT) != state
    assert state_of(job(), LEDGER, replace(OUT, version=8)) != state
    monkeypatch.setattr(work_to_do, "environment", lambda: "torch 1")
    assert state_of(job(), LEDGER, OUT) != state


def test_views_streams_retries_and_search_tables_have_no_state():
    stream = {"trigger": "available-now", "checkpoint_location": "c"}
    unknown = replace(job(), input_snapshot=None), job(retry_failed=True), job(search_table="found"), job(**stream)
    for run in unknown:
        assert state_of(run, LEDGER, OUT) is None


@pytest.mark.parametrize(("commits", "known"), [(2, True), (1, False), (0, False)])
def test_state_is_stored_if_no_other_run_wrote_to_the_ledger(commits, known):
    run = replace(job(), ledger_commits=commits)
    assert (state_after(run, 3, OUT) is not None) == known
