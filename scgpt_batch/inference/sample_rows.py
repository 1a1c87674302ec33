"""Rows of samples larger than a row: what each contributes to its sample's decisions, and the decisions it gets."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scgpt_batch.errors import RowError, row_errors
from scgpt_batch.inference.row_reader import RowReader
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.sample_selection import Decisions
from scgpt_batch.preprocessing.sample_statistics import Statistics, contribution, decide, merge, passes

Row = Mapping[str, Any]


def statistics(reader: RowReader, row: Row, parameters: Parameters, decisions: Decisions | None = None) -> Statistics:
    """Return what a row contributes to the next pass; a row that will fail by itself contributes nothing.

    Parameters
    ----------
    decisions
        What the passes before decided; None in the first.
    """
    if decisions is not None and decisions.final:
        return Statistics()
    try:
        with row_errors():
            opened = reader.open(row, parameters)
            return contribution(opened.adata, parameters, decisions, whole_numbers=opened.whole_numbers)
    except RowError:  # the ledger says why when the row is embedded
        return Statistics(left_out=1)


def decisions_of_sample(reader: RowReader, rows: Iterable[Row], parameters: Parameters) -> Decisions | None:
    """Return the decisions of one sample from all of its rows, which are read up to three times.

    Parameters
    ----------
    rows
        The sample's rows; iterated once for each pass.
    """
    decisions: Decisions | None = None
    for _ in range(passes(parameters)):
        decisions = decide(merge(statistics(reader, row, parameters, decisions) for row in rows), parameters, decisions)
    return decisions


def with_decisions(
    reader: RowReader, rows: Sequence[Row], parameters: Parameters
) -> Iterable[tuple[Row, Decisions | None]]:
    """Pair each row with the decisions of its sample, as the batch job does; None for a row that is a sample by itself.

    Rows belong together by `sample_id`. Without preprocessing there is nothing to decide.
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
