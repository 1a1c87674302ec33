"""The jobs where they run in earnest: a standalone cluster, Spark Connect, executors without the driver's files."""

import json
import subprocess
import sys

import mlflow
import pytest

from scgpt_batch.cli.main import OK, main
from scgpt_batch.registry.register import register
from tests.cluster import CONF, REPO, SPARK_HOME, connect_server, environment, mlflow_server, package_zip, standalone

BINS_ONLY = ["--need-preprocess", "false", "--data-is-raw", "true"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def tracking_uri(home, golden):
    """An MLflow server that holds the golden checkpoint as models:/scgpt/1."""
    before = mlflow.get_tracking_uri()
    with mlflow_server(home) as uri:
        mlflow.set_tracking_uri(uri)
        register(str(golden / "checkpoint_flash"), "scgpt")
        mlflow.set_tracking_uri(before)
        yield uri


@pytest.fixture(scope="module")
def cells(home, pbmc3k):
    path = home / "cells.h5ad"
    pbmc3k[:60].write_h5ad(path)
    return path


def summary(command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == OK, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_cluster_without_shared_folder_uses_one_gpu_per_task(spark, home, tracking_uri, cells):
    rows, out = f"delta.`{home}/rows`", f"delta.`{home}/out`"
    assert (
        main(["ingest", "--input", str(cells), "--table", rows, "--cells-per-row", "10", "--sample-id", "none"]) == OK
    )
    with standalone(home) as cluster:
        result = summary(
            [SPARK_HOME / "bin/spark-submit", "--master", cluster.url, "--properties-file", CONF,
             "--py-files", package_zip(home), "--conf", "spark.driver.memory=1g",
             "--conf", "spark.executor.memory=600m",
             "--conf", "spark.executor.resource.gpu.amount=1", "--conf", "spark.task.resource.gpu.amount=1",
             "--conf", "spark.scheduler.minRegisteredResourcesRatio=1.0",
             REPO / "tests/cluster_driver.py", "embed",
             "--model-uri", "models:/scgpt/1", "--tracking-uri", tracking_uri,
             "--input-table", rows, "--output-table", out, "--mode", "cell", *BINS_ONLY],
            env=environment(SURROUNDINGS=str(home / "surroundings.json")), cwd=home,
        )  # fmt: skip
    assert (result["rows_ok"], result["rows_failed"], result["cells"]) == (6, 0, 60)
    assert spark.table(out).select("cell_id").distinct().count() == 60
    folders, packages, devices, addresses = zip(*json.loads((home / "surroundings.json").read_text()), strict=True)
    assert sorted(addresses) == ["0", "1"] and len(set(folders)) == 2  # each task a GPU of its own
    assert all("scgpt_batch.zip" in package for package in packages)  # from --py-files
    assert set(devices) <= {"None", "cpu", "cuda:0", "cuda:1"}


def test_spark_connect_ingests_and_embeds(spark, home, tracking_uri, cells):
    rows, out = f"delta.`{home}/connect_rows`", f"delta.`{home}/connect_out`"
    steps = [
        ["ingest", "--input", cells, "--table", rows, "--cells-per-row", "10", "--split-by", "cell_type",
         "--sample-id", "none"],
        ["embed", "--model-uri", "models:/scgpt/1", "--tracking-uri", tracking_uri, "--input-table", rows,
         "--output-table", out, *BINS_ONLY],
    ]  # fmt: skip
    words = [list(map(str, step)) for step in steps]
    both = f"import sys; from scgpt_batch.cli.main import main; sys.exit(any(map(main, {words})))"
    temporary = home / "temporary"
    temporary.mkdir()
    with connect_server(home) as remote:
        env = environment(SPARK_REMOTE=remote, PYTHONPATH=str(REPO), TMPDIR=str(temporary))
        result = summary([sys.executable, "-c", both], env=env, cwd=home)
    n_rows = spark.table(rows).count()
    assert (result["rows_ok"], result["rows_failed"], result["cells"]) == (n_rows, 0, 60)
    assert spark.table(out).count() == result["embeddings"] == n_rows * 2200
    assert not list(temporary.rglob("MLmodel"))  # the files that were fetched from the server
