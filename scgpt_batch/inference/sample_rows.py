"""Preprocessing decisions for samples of several rows, from the rows themselves."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scgpt_batch.errors import RowError, row_errors
from scgpt_batch.inference.row_reader import RowReader
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.sample_selection import Decisions
from scgpt_batch.preprocessing.sample_statistics import Statistics, contribution, decide, merge, passes

Row = Mapping[str, Any]


def statistics(reader: RowReader, row: Row, parameters: Parameters, decisions: Decisions | None = None) -> Statistics:
    """Return the statistics of a row for the next pass; a row that cannot be read is only counted.

    Parameters
    ----------
    reader
        Reader of the model.
    row
        The row.
    parameters
        The parameters.
    decisions
        Decisions after the previous passes; None in the first pass.
    """
    if decisions is not None and decisions.final:
        return Statistics()
    try:
        with row_errors():
            opened = reader.open(row, parameters)
            return contribution(opened.adata, parameters, decisions, whole_numbers=opened.whole_numbers)
    except RowError:  # reported when the row is embedded
        return Statistics(left_out=1)


def decisions_of_sample(reader: RowReader, rows: Iterable[Row], parameters: Parameters) -> Decisions | None:
    """Return the decisions of one sample; its `rows` are iterated once for each pass, up to three times."""
    decisions: Decisions | None = None
    for _ in range(passes(parameters)):
        decisions = decide(merge(statistics(reader, row, parameters, decisions) for row in rows), parameters, decisions)
    return decisions


def with_decisions(
    reader: RowReader, rows: Sequence[Row], parameters: Parameters
) -> Iterable[tuple[Row, Decisions | None]]:
    """Return each row with the decisions of its sample, as in the batch job.

    Rows with the same `sample_id` are one sample. The decisions are None if a row is its own sample, or if
    preprocessing is off.
    """
    decided: list[Decisions | None] = [None] * len(rows)
    samples: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if isinstance(row.get("sample_id"), str):
            samples.setdefault(row["sample_id"], []).append(i)
    for members in samples.values() if parameters.need_preprocess else ():
        if len(members) == 1:
            continue
        decisions = decisions_of_sample(reader, [rows[i] for i in members], parameters)
        for i in members:
            decided[i] = decisions
    return zip(rows, decided, strict=True)
