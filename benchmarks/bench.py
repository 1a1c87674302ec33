"""Every regime side by side in one run: ours, upstream, the ceiling.

    .venv/bin/python benchmarks/bench.py [--only engine,tokenize,...]

Each regime is a module of this folder whose `run()` prints its figures as it goes (ceiling first, on standard error)
and returns them. The last line is one JSON document with a key a regime; in each `ours`, `upstream`, `ratio` and
`share_of_ceiling` where they apply. A regime that this machine cannot run is left out with a line that says why.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from collections.abc import Sequence
from datetime import date

from figures import CannotRun, say

REGIMES = {
    "engine": "cells/s of the model against upstream's embed_data, and of the matrix rate",
    "tokenize": "cells/s of binning and tokenising, and of preprocessing, against upstream's",
    "job": "cells/s of the job, Delta to Delta, against the model alone",
    "output": "MB/s of vectors into Delta, against Parquet alone",
    "growth": "seconds and peak memory over 1, 4 and 16 times the cells",
    "rows": "rows/s of the job over 1,000 to 100,000 small rows; seconds of a run with nothing to do, to 1,000,000",
    "gpu": "cells/s in bfloat16 on a GPU against the padded encoder",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run the benchmarks.")
    parser.add_argument("--only", default=",".join(REGIMES), help=f"regimes, comma-separated, of {', '.join(REGIMES)}")
    wanted = parser.parse_args(argv).only.split(",")
    if unknown := set(wanted) - set(REGIMES):
        parser.error(f"no regime {', '.join(sorted(unknown))}; there are {', '.join(REGIMES)}")
    figures: dict[str, object] = {
        "machine": platform.platform(), "cores": os.cpu_count(), "date": date.today().isoformat()
    }  # fmt: skip
    for name in wanted:
        say(f"--- {name}: {REGIMES[name]}")
        try:
            # a module `tokenize` would stand in the standard library's way
            figures[name] = importlib.import_module("tokens" if name == "tokenize" else name).run()
        except CannotRun as exc:
            say(f"{name} is left out: {exc}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
