"""Run by itself in a fresh process: load one registered version with the code that it carries, and let it answer.

`python -P run_version.py MODEL_FOLDER QUESTIONS ANSWERS`. Nothing of the installed package is imported here, so that
the version's own code answers, as at an endpoint. QUESTIONS and ANSWERS are JSON files:
[{"rows", "params", "repeats"}] and [{"answers", "seconds"}].
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd


def answer(model: Any, question: dict[str, Any]) -> dict[str, Any]:
    """Answer rows one after the other; `seconds` is the sum of each row's fastest time."""
    answers, seconds = [], 0.0
    for row in question["rows"]:
        frame, times = pd.DataFrame([row], dtype=object), []
        for _ in range(question["repeats"]):
            started = time.perf_counter()
            told = model.predict(frame, params=question["params"])
            times.append(time.perf_counter() - started)
        answers += told.to_dict("records")
        seconds += min(times)
    return {"answers": answers, "seconds": seconds}


def main(folder: str, questions: str, answers: str) -> None:
    """Answer the questions of one file into another."""
    model = mlflow.pyfunc.load_model(folder)
    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    Path(answers).write_text(json.dumps([answer(model, question) for question in asked]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
