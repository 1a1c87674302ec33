"""What a session prints on standard error, and how it starts without Maven: in processes of their own."""

import subprocess
import sys

import pytest

from scgpt_batch.spark import jars

# Ivy finds nothing with these settings.
NOWHERE = "<ivysettings><settings defaultResolver='x'/><resolvers><filesystem name='x'/></resolvers></ivysettings>"
QUERY = """
import sys
from scgpt_batch.cli.main import _set_up_logs
from scgpt_batch.errors import ConfigError
from scgpt_batch.spark.session import get_spark

settings, table, *words = sys.argv[1:]
_set_up_logs(verbose="--verbose" in words)
try:
    ivy = {"spark.jars.ivySettings": settings, "spark.jars.ivy": f"{table}.ivy"}
    spark = get_spark({"spark.master": "local[1]"} | ivy)
except ConfigError as exc:
    sys.exit(str(exc))
spark.range(3).write.format("delta").save(table)
print(spark.read.format("delta").load(table).count())
"""


@pytest.fixture
def query(tmp_path, monkeypatch):
    """Write and read a Delta table in a process whose Ivy finds nothing."""
    settings = tmp_path / "ivy.xml"
    settings.write_text(NOWHERE)

    def query(*words):
        command = [sys.executable, "-c", QUERY, str(settings), str(tmp_path / "table"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    return query


def test_a_cached_session_works_offline_and_prints_nothing(query):
    jars.local_conf({})
    done = query()
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_verbose_shows_what_spark_prints(query):
    jars.local_conf({})
    done = query("--verbose")
    assert done.returncode == 0 and "log4j" in done.stderr.lower()


def test_without_cache_and_maven_the_error_names_a_mirror(query, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = query()
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("cannot resolve io.delta:"), done.stderr
    assert "--spark-conf spark.jars.ivySettings=FILE" in last
