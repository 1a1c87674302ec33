"""Inject real faults into the nightly run, many times, and count lost and duplicated rows.

    make faults                                  all scenarios
    .venv/bin/python -m tests.faults.run --only driver-killed --tries 3

Each scenario runs `scgpt-batch embed` as a user does, in processes of its own, over small rows, breaks something, runs
it again, and compares the tables with the rows and with the model's own answers. The last line is one JSON document;
exit code 1 when a promise was broken.
"""

import argparse
import json
import signal
import sys
import time

from tests.faults.bench import Bench, Result
from tests.faults.scenarios import SCENARIOS

COLUMNS = ("tries", "rows in", "rows out", "failed", "duplicates", "lost", "seconds")


def shown(name: str, bench: Bench, tries: int | None) -> Result:
    """Run a scenario and print its line of the table."""
    scenario, usual = SCENARIOS[name]
    started = time.monotonic()
    r = scenario(bench, tries or usual)
    seconds = round(time.monotonic() - started)
    print(line(name, r.tries, r.rows_in, r.rows_out, r.failed, r.duplicates, r.lost, seconds))
    seen = ", ".join(f"{what} {n}" for what, n in sorted(r.seen.items()))
    print(f"  {seen}", *(f"  BROKEN {promise}" for promise in r.broken), sep="\n", flush=True)
    return r


def line(name: str, *counted: object) -> str:
    return f"{name:<16}" + "".join(f"{value:>11}" for value in counted)


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the nightly run, and count what is lost or doubled.")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="scenarios to run")
    parser.add_argument("--tries", type=int, help="tries of each, instead of its own number")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that drivers and mounts are removed
    print(line("scenario", *COLUMNS), flush=True)
    results = []
    for name in args.only:
        with Bench() as bench:  # its drivers end with it: each uses gigabytes
            results.append(shown(name, bench, args.tries))
    print(json.dumps([vars(r) for r in results]))
    return 0 if all(r.kept for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
