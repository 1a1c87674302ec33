"""What all tests share: one local Spark session, real cells, the golden outputs."""

import fcntl
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import pytest
import torch

from tests.paths import DATA, PRELOAD

# before any Spark session: paths and ports of this machine stay on it
os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")

# small models on few cores: a second thread costs more than it brings, most of all beside Spark's workers
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of golden files and real cells."""
    return DATA


@pytest.fixture(scope="session")
def golden() -> Path:
    """The golden outputs of scgpt 0.2.4."""
    return DATA / "golden"


@pytest.fixture(scope="session")
def pbmc3k() -> ad.AnnData:
    """Real counts, 2,700 cells × 32,738 genes; copy before changing."""
    return ad.read_h5ad(DATA / "pbmc3k.h5ad")


# For a few rows Spark compiles longer than it works: no generated code. (Commands in processes of their own compile.)
SMALL_DATA = {
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.driver.extraJavaOptions": "-XX:+UseSerialGC",
}


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """The suite's one Spark session, as the commands build it, with its tables in a temporary folder."""
    from scgpt_batch.spark.session import get_spark

    folder = tmp_path_factory.mktemp("spark")
    places = [str(PRELOAD), os.environ.get("PYTHONPATH")]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))  # of Spark's Python daemon
        session = get_spark({"spark.sql.warehouse.dir": str(folder), "spark.master": "local[2]"} | SMALL_DATA)
    yield session
    session.stop()


@pytest.fixture(scope="session")
def registered_once(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Path:
    """The folder of an MLflow store in which the command line registered the golden checkpoint as `scgpt`.

    The processes of pytest-xdist share it. The model may read files below its subfolder `data`.
    """
    from scgpt_batch.cli.main import OK, main
    from tests.helpers import mlflow_store

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "registered"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "data").is_dir():
            with mlflow_store(folder):
                words = ["--checkpoint", str(golden / "checkpoint_flash"), "--input-roots", str(folder / "data")]
                assert main(["register", *words, "--name", "scgpt", "--alias", "champion"]) == OK
            (folder / "data").mkdir()
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, registered_once: Path) -> Iterator[Path]:
    """A folder with an MLflow store of the module's own, in which `scgpt` is registered; MLflow uses it."""
    from tests.helpers import mlflow_store

    folder = tmp_path_factory.mktemp("jobs")
    with mlflow_store(folder, copy_of=registered_once):
        yield folder


@pytest.fixture(scope="module")
def model(home: Path) -> str:
    """The golden checkpoint, as the command line registered it."""
    return "models:/scgpt@champion"


@pytest.fixture(scope="module")
def registered(home: Path) -> Any:
    """The same, resolved."""
    from scgpt_batch.registry.resolve import resolve

    return resolve("models:/scgpt@champion")


@pytest.fixture
def run(capfd: pytest.CaptureFixture) -> Callable:
    """Run a command; give its exit code, its JSON line and its standard error."""

    from scgpt_batch.cli.main import main

    def call(*argv: object) -> tuple[int, dict, str]:
        capfd.readouterr()
        code = main([str(arg) for arg in argv])
        output = capfd.readouterr()
        last = output.out.strip().splitlines()[-1] if output.out.strip() else "{}"
        return code, json.loads(last), output.err

    return call
