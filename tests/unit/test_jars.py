"""Delta's jars: resolved once into a cache folder, whatever happens beside or in between."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scgpt_batch.spark import jars


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and Spark's defaults and variables left out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("SPARK_HOME", "SPARK_CONF_DIR", "PYSPARK_SUBMIT_ARGS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "scgpt_batch"


@pytest.fixture
def maven(tmp_path, monkeypatch):
    """In place of Maven, one jar; the list of calls."""
    calls = []
    jar = tmp_path / "io.delta_delta-spark_4.1_2.13-4.4.0.jar"
    jar.write_bytes(b"jar")

    def resolved(coordinates, conf):
        calls.append((coordinates, dict(conf)))
        return [jar]

    monkeypatch.setattr(jars, "_resolved", resolved)
    return calls


def test_jars_are_resolved_once(cache, maven):
    first, second = jars.local_conf({}), jars.local_conf({})
    assert len(maven) == 1 and first == second
    (path,) = first["spark.jars"].split(",")
    assert Path(path).is_relative_to(cache) and Path(path).read_bytes() == b"jar"
    assert "spark.jars.packages" not in first


def test_package_comes_from_the_properties_file(cache, maven):
    jars.local_conf({})
    assert maven[0][0] == jars.read_conf(jars.LOCAL_CONF)["spark.jars.packages"]


def test_concurrent_first_commands_resolve_once(cache, maven):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: jars.local_conf({})["spark.jars"], range(16)))
    assert len(maven) == 1 and len(set(found)) == 1


def test_an_interrupted_resolution_leaves_no_partial_cache(cache, maven, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(jars.shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jars.local_conf({})
    assert jars.cached_jars() == []


def test_what_a_killed_resolution_left_is_removed(cache, maven):
    jars.local_conf({})
    folder = jars.cached_jars()[0].parent
    left = folder.with_name(f"{folder.name}.killed")
    folder.rename(left)
    jars.local_conf({})
    assert not left.exists() and jars.cached_jars()


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, maven, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert jars.local_conf({})["spark.jars"].endswith(".jar")
    assert "XDG_CACHE_HOME" in caplog.text


def test_jars_of_the_user_are_kept(cache, maven):
    found = jars.local_conf({"spark.jars": "/mine.jar", "spark.jars.packages": "a:b:1"})
    assert found["spark.jars"].split(",")[0] == "/mine.jar" and len(found["spark.jars"].split(",")) == 2
    assert found["spark.jars.packages"] == "a:b:1"


def test_jars_of_spark_defaults_are_kept(cache, maven, tmp_path, monkeypatch):
    (tmp_path / "spark-defaults.conf").write_text("# ours\nspark.jars = /mine.jar\n")
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    assert jars.local_conf({})["spark.jars"].split(",")[0] == "/mine.jar"


@pytest.mark.parametrize(
    "conf",
    [
        {"spark.jars": "/jars/delta-spark_4.1_2.13-4.5.0.jar"},
        {"spark.jars.packages": "io.delta:delta-spark_4.1_2.13:5"},
    ],
)
def test_a_delta_of_the_user_is_used_instead(cache, maven, conf):
    found = jars.local_conf(conf)
    assert maven == [] and {name: found.get(name) for name in conf} == conf


def test_delta_is_a_package_beside_jars_of_the_arguments(cache, maven, monkeypatch):
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", "--jars /mine.jar pyspark-shell")  # they replace the setting spark.jars
    found = jars.local_conf({"spark.jars.packages": "a:b:1"})
    assert "spark.jars" not in found and found["spark.jars.packages"].startswith("a:b:1,io.delta:delta-spark")


def test_a_cache_without_the_package_is_filled_again(cache, maven):
    jars.local_conf({})
    (jar,) = jars.cached_jars()
    jar.rename(jar.with_name("org.postgresql_postgresql-42.7.3.jar"))
    assert jars.cached_jars() == []
    jars.local_conf({})
    assert [path.name for path in jars.cached_jars()] == [jar.name] and len(list(jar.parent.iterdir())) == 1


def test_jvm_options_and_logging_of_spark_defaults_are_kept(cache, maven, tmp_path, monkeypatch):
    (tmp_path / "spark-defaults.conf").write_text(f"{jars.JVM_OPTIONS} -Dlog4j2.configurationFile=/mine.properties\n")
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    options = jars.local_conf({})[jars.JVM_OPTIONS]
    assert options.endswith(" -Dlog4j2.configurationFile=/mine.properties") and options.count("log4j2.conf") == 1


def test_log4j_file_of_the_user_is_kept(cache, maven, tmp_path, monkeypatch):
    (tmp_path / "log4j2.properties").write_text("")
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    assert "log4j2.configurationFile" not in jars.local_conf({})[jars.JVM_OPTIONS]


def test_settings_of_the_user_reach_the_resolution(cache, maven):
    jars.local_conf({"spark.jars.ivySettings": "/etc/ivy.xml"})
    assert maven[0][1]["spark.jars.ivySettings"] == "/etc/ivy.xml"


def test_verbose_keeps_sparks_own_logging(cache, maven):
    quiet, verbose = jars.local_conf({}), jars.local_conf({}, verbose=True)
    assert "log4j2.configurationFile" in quiet[jars.JVM_OPTIONS]
    assert "log4j2" not in verbose[jars.JVM_OPTIONS] and "spark.log.level" not in {*quiet, *verbose}


def test_properties_file_for_spark_submit_names_the_cached_jars(cache, maven, capsys):
    assert jars.main([]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.is_relative_to(cache) and jars.read_conf(path) == jars.local_conf({})


def test_properties_file_has_delta_whatever_the_defaults_name(cache, maven, tmp_path, monkeypatch):
    """With a properties file, spark-submit reads neither spark-defaults.conf nor PYSPARK_SUBMIT_ARGS."""
    (tmp_path / "spark-defaults.conf").write_text("spark.jars.packages io.delta:delta-spark_4.1_2.13:5\n")
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", "--jars /delta-spark.jar pyspark-shell")
    assert "delta-spark" in jars.read_conf(jars.write_submit_conf({}))["spark.jars"]


def test_other_settings_have_a_properties_file_of_their_own(cache, maven):
    first, second = jars.write_submit_conf({}), jars.write_submit_conf({"spark.ui.port": "4050"})
    assert first != second and "spark.ui.port" not in jars.read_conf(first)
