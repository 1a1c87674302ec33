"""Delta's jars for local sessions: resolved once through Maven, then used from a cache folder, also offline.

`python -m scgpt_batch.spark.jars` does this ahead of the first command. It prints the path of a properties file for
spark-submit that names the cached jars. Words NAME=VALUE are Spark settings, such as `spark.jars.ivySettings`.
"""

import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import pyspark

from scgpt_batch.command_result import OK, WRONG_USAGE
from scgpt_batch.errors import ConfigError, in_one_line, masked, printable
from scgpt_batch.java import require_java

logger = logging.getLogger(__name__)

LOCAL_CONF = Path(__file__).with_name("spark-local.conf")
LOG_CONF = Path(__file__).with_name("log4j2.properties")
JVM_OPTIONS = "spark.driver.extraJavaOptions"

_IVY_NAME = re.compile(r"[^_]+_(?P<artifact>.+?)-\d.*\.jar")  # org_artifact-version.jar
_MAVEN_NAME = re.compile(r"(?P<artifact>.+?)-\d.*\.jar")


def local_conf(conf: Mapping[str, str], *, verbose: bool = False, for_submit: bool = False) -> dict[str, str]:
    """Return the settings of a local session: those of spark-local.conf, overridden by `conf`, with Delta's jars.

    Delta's jars come from the cache. If `conf`, Spark's own defaults or PYSPARK_SUBMIT_ARGS name a Delta of their own,
    that is used instead.

    Parameters
    ----------
    verbose
        Keep Spark's own logging instead of errors only.
    for_submit
        The settings are for `spark-submit --properties-file`, which reads neither spark-defaults.conf nor
        PYSPARK_SUBMIT_ARGS.

    Raises
    ------
    ConfigError
        The jars are not cached and cannot be resolved.
    """
    ours = read_conf(LOCAL_CONF)
    delta = ours.pop("spark.jars.packages")
    defaults, arguments = ({}, "") if for_submit else (_spark_defaults(), os.environ.get("PYSPARK_SUBMIT_ARGS", ""))
    given = defaults | dict(conf)
    ours_logs = not (verbose or "log4j" in given.get(JVM_OPTIONS, "") or _spark_conf_file("log4j2.properties"))
    if verbose or ours_logs:
        del ours["spark.log.level"]  # Spark prints a line when it sets the level; our logging shows errors only
    merged = ours | dict(conf)
    if JVM_OPTIONS in defaults and JVM_OPTIONS not in conf:
        merged[JVM_OPTIONS] += f" {defaults[JVM_OPTIONS]}"
    named = [given.get("spark.jars", ""), given.get("spark.jars.packages", "")]
    if not any("delta-spark" in text for text in (*named, arguments)):
        if "--jars" in shlex.split(arguments):  # it replaces the setting spark.jars
            merged["spark.jars.packages"] = ",".join(filter(None, [named[1], delta]))
        else:
            merged["spark.jars"] = ",".join(filter(None, [named[0], *map(str, _delta_jars(delta, merged))]))
    if not verbose:
        merged.setdefault("spark.executorEnv.PYTHONWARNINGS", "ignore")  # of libraries; ours are in the tables
    if ours_logs:
        merged[JVM_OPTIONS] += f" -Dlog4j2.configurationFile={LOG_CONF.as_uri()}"
    return merged


def read_conf(path: Path) -> dict[str, str]:
    """Read a properties file of Spark: a name and a value per line."""
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (re.split(r"\s*[=:\s]\s*", line, maxsplit=1) for line in lines if line and not line.startswith("#"))
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _spark_defaults() -> dict[str, str]:
    """Return what the user's spark-defaults.conf sets; settings passed to a session would replace these."""
    path = _spark_conf_file("spark-defaults.conf")
    return read_conf(path) if path else {}


def _spark_conf_file(name: str) -> Path | None:
    """Return a file of the user's Spark configuration; None if there is none."""
    home = os.environ.get("SPARK_HOME")
    folder = os.environ.get("SPARK_CONF_DIR") or (home and f"{home}/conf")
    path = Path(folder, name) if folder else None
    return path if path and path.is_file() else None


def write_submit_conf(conf: Mapping[str, str]) -> Path:
    """Write the settings of a local session as a properties file for spark-submit, and return its path.

    Raises
    ------
    ConfigError
        The cache folder is not writable, or the jars cannot be resolved.
    """
    text = "".join(f"{name} {value}\n" for name, value in local_conf(conf, for_submit=True).items())
    # environments and settings that differ have files of their own
    path = cache_folder() / f"spark-local-{blake2b(text.encode(), digest_size=8).hexdigest()}.conf"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)  # in one step: a spark-submit may be reading it
    except OSError as exc:
        raise ConfigError(
            f"cannot write {path} ({in_one_line(exc)}): set XDG_CACHE_HOME to a writable folder, or use "
            "conf/spark-local.conf, with which each spark-submit resolves Delta's jars"
        ) from exc
    return path


def cache_folder() -> Path:
    """Return the package's cache folder, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scgpt_batch"


def cached_jars(coordinates: str | None = None) -> list[Path]:
    """Return the cached jars of a Maven package (default: the Delta of spark-local.conf); none if it is not cached."""
    coordinates = coordinates or read_conf(LOCAL_CONF)["spark.jars.packages"]
    jars = sorted(_folder(coordinates).glob("*.jar"))
    return jars if _contains(jars, coordinates) else []


def _contains(jars: Sequence[Path], coordinates: str) -> bool:
    return any(coordinates.split(":")[1] in jar.name for jar in jars)


def _folder(coordinates: str) -> Path:
    _, artifact, version = coordinates.split(":")
    # each Spark brings other packages itself
    return cache_folder() / "jars" / f"{artifact}-{version}-spark-{pyspark.__version__}"


def _delta_jars(coordinates: str, conf: Mapping[str, str]) -> list[Path]:
    """Return the jars, from the cache; the first call resolves them and fills it."""
    if jars := cached_jars(coordinates):
        return jars
    folder = _folder(coordinates)
    try:
        with _one_at_a_time(folder):
            return cached_jars(coordinates) or _fill(folder, coordinates, conf)
    except OSError as exc:
        logger.warning(
            "cannot write to %s (%s): Delta's jars are resolved at each start. Set XDG_CACHE_HOME to a writable folder",
            cache_folder(), in_one_line(exc),
        )  # fmt: skip
        return _resolved(coordinates, conf)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for; it is released even if this process is killed."""
    import fcntl  # not available on Windows

    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fill(folder: Path, coordinates: str, conf: Mapping[str, str]) -> list[Path]:
    """Resolve the jars into a folder, which appears only when it is complete."""
    logger.info("resolving the jars of %s through Maven, once; later commands use %s", coordinates, folder)
    jars = _resolved(coordinates, conf)
    for left in folder.parent.glob(f"{folder.name}.*/"):  # of a process that was killed while it held the lock
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as temporary:
        complete = Path(temporary, "jars")
        complete.mkdir()
        for jar in jars:
            shutil.copyfile(jar, complete / jar.name)
        shutil.rmtree(folder, ignore_errors=True)  # of jars without the package
        complete.rename(folder)
    return cached_jars(coordinates)


def _resolved(coordinates: str, conf: Mapping[str, str]) -> list[Path]:
    """Have Spark resolve a package, with the user's Ivy settings, repositories and proxies; return the files.

    Of the packages that it depends on, those that Spark has itself are left out: Spark's own classes come first anyway,
    and each start of a session copies all jars.
    """
    from pyspark import SparkConf
    from pyspark.errors import PySparkRuntimeError
    from pyspark.java_gateway import launch_gateway

    settings = {name: value for name, value in conf.items() if name not in ("spark.jars", JVM_OPTIONS)}
    spark_conf = SparkConf(loadDefaults=False).setAll(list((settings | {"spark.jars.packages": coordinates}).items()))
    with tempfile.TemporaryFile("w+") as output:
        try:
            with _submit_arguments("--jars", "", "--packages", coordinates):
                gateway = launch_gateway(spark_conf, {"stdout": output, "stderr": output})
        except PySparkRuntimeError as exc:
            output.seek(0)
            raise _unresolved(coordinates, output.read()) from exc
        named = str(gateway.jvm.System.getProperty("spark.jars"))
        gateway.proc.stdin.close()  # the JVM exits
        gateway.close()
        gateway.proc.wait()
    home = os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent
    provided = {match["artifact"] for jar in Path(home, "jars").glob("*.jar")
                if (match := _MAVEN_NAME.fullmatch(jar.name))}  # fmt: skip
    jars = [Path(jar.removeprefix("file://").removeprefix("file:")) for jar in named.split(",")]
    if not _contains(jars, coordinates):
        raise ConfigError(f"Spark did not resolve {coordinates}, but {masked(named)}: check PYSPARK_SUBMIT_ARGS")
    return [jar for jar in jars if not ((match := _IVY_NAME.fullmatch(jar.name)) and match["artifact"] in provided)]


@contextmanager
def _submit_arguments(*more: str) -> Iterator[None]:
    """Add arguments after those of PYSPARK_SUBMIT_ARGS; of a repeated argument, spark-submit uses the last one."""
    given = os.environ.get("PYSPARK_SUBMIT_ARGS")
    *words, last = shlex.split(given or "pyspark-shell")
    os.environ["PYSPARK_SUBMIT_ARGS"] = shlex.join([*words, *more, last])
    try:
        yield
    finally:
        if given is None:
            del os.environ["PYSPARK_SUBMIT_ARGS"]
        else:
            os.environ["PYSPARK_SUBMIT_ARGS"] = given


def _unresolved(coordinates: str, output: str) -> ConfigError:
    lines = [printable(line.strip()) for line in output.splitlines() if line.strip()]
    problem = next(
        (line for line in lines if re.search(r"not found|Exception|[Ee]rror", line)),
        lines[-1] if lines else "Spark printed nothing",
    )
    return ConfigError(
        f"cannot resolve {coordinates} through Maven: {masked(problem)}. Connect to the internet once, or name a "
        "mirror by --spark-conf spark.jars.ivySettings=FILE or spark.jars.repositories=URL"
    )


def main(words: Sequence[str]) -> int:
    """Resolve the jars, and print the path of the properties file; the words are Spark settings, NAME=VALUE."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        conf = dict(word.split("=", 1) for word in words)
    except ValueError:
        print("usage: python -m scgpt_batch.spark.jars [NAME=VALUE ...]", file=sys.stderr)
        return WRONG_USAGE
    try:
        require_java()
        print(write_submit_conf(conf))
    except ConfigError as exc:
        print(in_one_line(exc), file=sys.stderr)
        return WRONG_USAGE
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
