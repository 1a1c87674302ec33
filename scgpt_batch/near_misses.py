"""Suggestions for misspelt names: of settings, parameters and their values, columns, layers, tables and genes."""

import difflib
from collections.abc import Iterable, Sequence

MAX_LENGTH = 100  # characters of a name that is compared: the time grows with their square
MAX_COMPARED = 2_000  # known names that are all compared; of more, those that start alike
GENE_CUTOFF = 0.9  # in most gene symbols one other letter makes another gene


def closest(name: str, known: Iterable[str], *, cutoff: float = 0.7) -> str | None:
    """Return the known name most similar to `name`, whatever the case and the kind of dash; None if none is close."""
    if len(name) > MAX_LENGTH:
        return None
    wanted, folded = _fold(name), {_fold(each): each for each in known}
    if wanted in folded:
        return folded[wanted]
    compared: Sequence[str] = list(folded)
    if len(compared) > MAX_COMPARED:
        compared = [each for each in compared if each[:2] == wanted[:2]][:MAX_COMPARED]
    found = difflib.get_close_matches(wanted, compared, 1, cutoff)
    return folded[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.7) -> str:
    """Return how to end a message about an unknown name: `: did you mean 'mode'?`, or nothing."""
    close = closest(name, known, cutoff=cutoff)
    return f": did you mean {close!r}?" if close else ""


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")
