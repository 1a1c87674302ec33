"""Script that runs one registered version in a new process, with the code stored with it, as an endpoint does.

`python -P run_version.py MODEL_FOLDER REQUESTS RESULTS`. It imports nothing of the installed package, which would
replace the version's own code. REQUESTS and RESULTS are JSON files: [{"rows", "params", "repeats"}] and
[{"answers", "seconds"}].
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd


def run(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return the results of the rows, computed one by one; `seconds` is the sum of the fastest time of each row."""
    answers, seconds = [], 0.0
    for row in request["rows"]:
        frame, times = pd.DataFrame([row], dtype=object), []
        for _ in range(request["repeats"]):
            started = time.perf_counter()
            result = model.predict(frame, params=request["params"])
            times.append(time.perf_counter() - started)
        answers += result.to_dict("records")
        seconds += min(times)
    return {"answers": answers, "seconds": seconds}


def main(folder: str, requests_file: str, results_file: str) -> None:
    """Run the requests of one file, and write the results to another."""
    model = mlflow.pyfunc.load_model(folder)
    requests = json.loads(Path(requests_file).read_text(encoding="utf-8"))
    Path(results_file).write_text(json.dumps([run(model, request) for request in requests]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
