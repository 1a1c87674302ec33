"""A registered model in an environment that has its requirements and nothing else, neither Spark nor this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from scgpt_batch.parameters import Parameters
from scgpt_batch.registry.resolve import load
from tests.helpers import assert_close
from tests.paths import REPO

ASK = """
import importlib.util, json, sys
import mlflow, pandas as pd
assert importlib.util.find_spec("pyspark") is None and importlib.util.find_spec("scgpt_batch") is None
model, rows = mlflow.pyfunc.load_model(sys.argv[1]), pd.DataFrame(json.load(sys.stdin))
static, cell = (model.predict(rows, params={"need_preprocess": False, "mode": mode}) for mode in ("static", "cell"))
vectors = {"static": static["gene_embeddings"][0], "cell": cell["cell_embeddings"][0]}
print(json.dumps({mode: [vector.tolist() for vector in found] for mode, found in vectors.items()}))
"""


@pytest.fixture(scope="module")
def lonely(registered, tmp_path_factory):
    """A Python that has the model's requirements and nothing else."""
    folder = tmp_path_factory.mktemp("lonely")
    uv = str(Path(sys.prefix) / "bin" / "uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    needs = ["-r", registered.folder / "requirements.txt", "-c", REPO / "constraints.txt"]
    subprocess.run([uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python", *needs], check=True)
    return folder / "bin" / "python"


def test_the_model_answers_where_only_its_requirements_are(registered, lonely, tmp_path):
    example = mlflow.models.Model.load(str(registered.folder)).load_input_example()
    rows = example.astype(object).where(example.notna(), None)
    done = subprocess.run(
        [lonely, "-c", ASK, registered.folder],
        input=json.dumps(rows.to_dict("records")),
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLFLOW"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = load(registered)
    for mode, found in theirs.items():
        answer = ours.embed(rows.iloc[0].to_dict(), Parameters(need_preprocess=False, mode=mode))
        assert_close(found, answer.embeddings, atol=1e-6)
