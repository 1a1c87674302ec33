"""What the package says of itself: one version, typed, and the same versions of Spark and Delta everywhere."""

import re
import tomllib

import scgpt_batch
from tests.paths import REPO

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


def test_version_has_one_source():
    assert "version" not in PROJECT["project"] and PROJECT["project"]["dynamic"] == ["version"]
    source = REPO / PROJECT["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{scgpt_batch.__version__}"' in source.read_text()


def test_package_is_marked_as_typed():
    assert (REPO / "scgpt_batch/py.typed").read_text() == ""


def pinned(name: str, text: str) -> str:
    (version,) = re.findall(rf"^{name}==(\S+)$", text, re.MULTILINE | re.IGNORECASE)
    return version


def test_spark_and_delta_versions_agree():
    local = "\n".join(PROJECT["project"]["optional-dependencies"]["local"])
    spark, delta = pinned("pyspark", local), pinned("delta-spark", local)
    constraints = (REPO / "constraints.txt").read_text()
    assert (pinned("pyspark", constraints), pinned("delta[-_]spark", constraints)) == (spark, delta)
    jar = f"io.delta:delta-spark_{spark.rpartition('.')[0]}_2.13:{delta}"
    for path in ("scgpt_batch/spark/spark-local.conf", "benchmarks/delta_session.py"):
        assert re.findall(r"io\.delta:[\w.:-]+", (REPO / path).read_text()) == [jar], path


def test_documents_name_these_versions_of_spark_and_delta():
    local = "\n".join(PROJECT["project"]["optional-dependencies"]["local"])
    known = {"pyspark": pinned("pyspark", local), "delta-spark": pinned("delta-spark", local)}
    for path in (REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").glob("*.md")):
        named = re.findall(r"\b(pyspark|delta-spark)(?:==| )(\d+\.\d+\.\d+)\b", path.read_text())
        assert [(name, version) for name, version in named if known[name] != version] == [], path
