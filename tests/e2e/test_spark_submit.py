"""The job files, as spark-submit runs them."""

import json
import subprocess
import sys
from pathlib import Path

import mlflow

from scgpt_batch.cli.main import OK
from scgpt_batch.spark.jars import write_submit_conf
from tests.cluster import environment
from tests.helpers import small_rows, write_rows
from tests.paths import REPO


def test_spark_submit_runs_the_job_file(spark, home, model, golden):
    """The same from outside: a JVM of its own, flags, the JSON line last."""
    rows = f"delta.`{home}/rows`"
    write_rows(spark, small_rows(4, golden), rows)
    command = [
        Path(sys.executable).with_name("spark-submit"), "--properties-file", write_submit_conf({}),
        REPO / "jobs/embed_genes.py",
        "--model-uri", model, "--input-table", rows, "--output-table", f"delta.`{home}/submitted`",
        "--tracking-uri", mlflow.get_tracking_uri(), "--need-preprocess", "false",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(PYTHONPATH=str(REPO)), timeout=600, check=False
    )
    assert done.returncode == OK, done.stderr[-2000:]
    result = json.loads(done.stdout)  # nothing else: logs go to standard error
    assert (result["rows_ok"], result["embeddings"]) == (4, 160)
    noise = ("resolving dependencies", "log4j", "log level", "NativeCodeLoader", "FutureWarning")
    assert [text for text in noise if text in done.stderr] == []
    assert " INFO " in done.stderr
