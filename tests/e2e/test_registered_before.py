"""A version that was registered before the package's modules got their present names still loads and answers.

`data/registered_before_layout.zip` is what commit 12a9278 logged for the golden checkpoint, without the checkpoint.
"""

import json
import shutil
import subprocess
import sys
import zipfile

import mlflow
import pandas as pd
import pytest

from scgpt_batch.inference.results import unpack
from scgpt_batch.registry.resolve import load, resolve
from scgpt_batch.registry.sample_answers import code_difference, registered_by
from tests.helpers import assert_close


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data, golden):
    folder = tmp_path_factory.mktemp("registered") / "model"
    with zipfile.ZipFile(data / "registered_before_layout.zip") as file:
        file.extractall(folder)
    shutil.copytree(golden / "checkpoint_flash", folder / "artifacts" / "checkpoint_flash")
    return folder


def stored_vectors(folder):
    """The row that was stored with the version, and the vectors of its cells."""
    sample = json.loads((folder / "artifacts" / "sample.json").read_text())
    case = next(case for case in sample["cases"] if case["params"]["mode"] == "cell")
    answer = case["answers"][0]
    return sample["rows"][0], case["params"], unpack(answer["embeddings_base64"], "float32_base64", 64)


def test_it_answers_with_the_installed_code(folder):
    row, params, wanted = stored_vectors(folder)
    answer = mlflow.pyfunc.load_model(str(folder)).predict(pd.DataFrame([row], dtype=object), params=params)
    assert answer["error"][0] is None
    assert_close(unpack(answer["embeddings_base64"][0], "float32_base64", 64), wanted, atol=1e-6)


ALONE = """
import json, sys
import mlflow, pandas as pd
folder, row, params, out = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
answer = mlflow.pyfunc.load_model(folder).predict(pd.DataFrame([row], dtype=object), params=params)
import scgpt_batch
json.dump([scgpt_batch.__file__, answer["embeddings_base64"][0]], open(out, "w"))
"""


def test_it_answers_with_its_own_code_in_a_fresh_process(folder, tmp_path):
    row, params, wanted = stored_vectors(folder)
    out = tmp_path / "answer.json"
    command = [sys.executable, "-P", "-c", ALONE, str(folder), json.dumps(row), json.dumps(params), str(out)]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    code, vectors = json.loads(out.read_text())
    assert code.startswith(str(folder))
    assert_close(unpack(vectors, "float32_base64", 64), wanted, atol=1e-6)


def test_the_job_accepts_it(folder):
    model = resolve(str(folder))
    assert code_difference(model) is None
    assert registered_by(model) == "0.1.0"
    assert load(model).digest == model.digest
