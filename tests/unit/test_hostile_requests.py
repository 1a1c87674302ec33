"""Small requests that ask for much memory: each is read, and where it passes computed, under a cap on memory."""

import subprocess
import sys

import pytest

from tests.paths import GOLDEN

CAP = 2_000_000_000  # bytes of address space on top of what Python, torch and MLflow take

ATTACKS = {
    "a gene name of 1 MB among 1,500": """
names = ["A" * 1_000_000, *map(str, range(1_499))]
document = {"dataframe_records": [good], "params": {"genes": names}}
""",
    "a gene name of 1 MB in a column": """
names = ["A" * 1_000_000, *map(str, range(1_499))]
document = {"dataframe_records": [good | {"genes": names}]}
""",
    "500,000 genes for 10,000 rows": """
document = {"dataframe_records": [{"adata_obs": None}] * 10_000, "params": {"genes": ["cd4"] * 500_000}}
""",
    "100,000 genes for rows with seeds of their own": """
rows = [{"adata_obs": None, "seed": i} for i in range(10_000)]
names = [GENES[i % len(GENES)] for i in range(100_000)]
document = {"dataframe_records": rows, "params": {"genes": names, "on_error": "record"}}
""",
    "100,000,000 bins": """
document = {"dataframe_records": [good], "params": {"mode": "cell", "binning": 100_000_000, "subset_hvg": 0}}
""",
    "300,000 columns of obs": """
table = {"columns": list(map(str, range(300_000))), "index": ["a"], "data": [[0] * 300_000]}
obs = orjson.dumps(table).decode()
group = {"mode": "contextual", "need_preprocess": False, "group_by": "7"}
document = {"dataframe_records": [good | {"adata_obs": obs}], "params": group}
""",
    "deep JSON in var": """
document = {"dataframe_records": [good | {"adata_var": "[" * 10_000_000}]}
""",
}

SCRIPT = """
import resource, sys
import numpy as np, orjson
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel
from scgpt_batch.io.rows import to_row
from scgpt_batch.inference.engine import Embedder
from scgpt_batch.errors import RequestRefused
from scgpt_batch.models.scgpt.checkpoint import load_checkpoint
from scgpt_batch.registry.signature import signature
from scgpt_batch.serving.request import RequestReader
from tests.endpoint_process import payload
from tests.helpers import random_adata

embedder = Embedder(load_checkpoint({checkpoint!r}), device="cpu")
GENES = embedder.vocabulary.tokens[:30]
good = payload(to_row(random_adata(4, 30, genes=GENES)))
good = {{name: v if isinstance(v, str) else np.asarray(v).tolist() for name, v in good.items()}}
meta = Model(signature=signature(), flavors={{"python_function": {{"loader_module": "none"}}}}, model_uuid="none")
Embedder.predict = None  # MLflow looks for it
reader = RequestReader(PyFuncModel(model_meta=meta, model_impl=Embedder), embedder, answer_bytes=16_000_000)
reader.read(orjson.dumps({{"dataframe_records": [good]}}))  # imports and caches
{attack}
body = orjson.dumps(document)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {cap}, used + {cap}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for request in reader.read(body).rows:
        if request.error is None:
            embedder.embed(request.row, request.parameters)
    outcome = "answered"
except RequestRefused as exc:
    outcome = f"refused {{exc.status}}: {{exc}}"[:200]
except MemoryError:
    sys.exit("out of memory")
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
print(f"{{grown:.0f}} MB;", outcome)
"""


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="measures memory in /proc and caps it by RLIMIT_AS, as on Linux",
)
@pytest.mark.parametrize("name", ATTACKS)
def test_small_request_cannot_use_much_memory(name):
    code = SCRIPT.format(checkpoint=str(GOLDEN / "checkpoint_flash"), attack=ATTACKS[name], cap=CAP)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert "refused 4" in done.stdout, done.stdout
