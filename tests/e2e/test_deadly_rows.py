"""A night with rows that no code survives, in processes of their own."""

from tests.faults.bench import Bench
from tests.faults.scenarios import poison


def test_deadly_rows_fail_alone():
    """In processes of their own: rows that raise, segfault, hang and exhaust memory, among 24."""
    with Bench() as bench:
        result = poison(bench, 1, rows_in=24)
    assert (result.failed, result.lost, result.duplicates, result.broken) == (4, 0, 0, [])
