"""Seconds and peak memory of the job over 1, 4 and 16 times the cells, in cell mode with a small model."""

from __future__ import annotations

from figures import say
from job_runs import checkpoint_of, embed, write_rows


def run(n_cells: int = 250) -> dict[str, object]:
    """Time the second of two runs in a session at each size; the small model leaves everything else to be seen."""
    checkpoint = checkpoint_of("small", {"embsize": 64, "d_hid": 64, "nlayers": 2, "nheads": 4})
    found: dict[str, object] = {}
    for times in (1, 4, 16):
        result, memory = embed(checkpoint, write_rows(f"growth_{times}", 8 * times, n_cells), "cell")
        seconds = result["warm"]["seconds"]
        say(f"{times}x: {8 * times * n_cells} cells, {seconds:.1f} s, {memory}")
        found[f"{times}x"] = {"cells": 8 * times * n_cells, "seconds": seconds, **memory}
    found["time_ratio_16x"] = round(found["16x"]["seconds"] / found["1x"]["seconds"], 2)
    return found
