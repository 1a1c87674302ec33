"""Install the wheel in fresh environments, and there run the unit tests and the journey from files to vectors.

    python -m tests.versions.run [LEG...] [--keep FOLDER]

Without a leg all run. Each leg ends with a line of its own; a leg whose Python is not on this machine says so.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]
RUNTIMES = REPO / "tests" / "data" / "databricks-runtime-pins"
RUNTIME_LEGS = {f"databricks-{path.name.removesuffix('-gpu-ml.txt')}": path for path in RUNTIMES.glob("*.txt")}

# The tests without Spark, servers and a browser: what depends on the libraries, in a few minutes.
UNIT_TESTS = (
    "test_anndata_rows", "test_checkpoint", "test_embedder", "test_gene_names", "test_model", "test_parameters",
    "test_preprocess", "test_pyfunc", "test_samples",
)  # fmt: skip
# With a runtime's versions: torch stays the newest leg's, whose numbers these would repeat for minutes.
RUNTIME_TESTS = tuple(name for name in UNIT_TESTS if name not in ("test_embedder", "test_model"))
TEST_NEEDS = ("pytest>=8", "hypothesis>=6.100", "psutil>=6", "pytest-timeout>=2.3")

# A runtime keeps its own torch, and so do its legs keep the environment's: another costs 3 GB and is not ours to test.
TORCH = ("torch", "triton", "nvidia-", "cuda-")

PREDICT = """
import anndata, mlflow
from scgpt_batch.io.rows import to_row
mlflow.set_tracking_uri("sqlite:///.demo/mlflow.db")
row = to_row(anndata.read_h5ad("tests/data/pbmc3k.h5ad")[:5])
answer = mlflow.pyfunc.load_model("models:/scgpt_demo@champion").predict([row], params={"mode": "cell"})
assert len(answer["cell_embeddings"][0]) == 5, answer
print("predict: 5 cells of", answer["embedding_dim"][0], "numbers")
"""


@dataclass(frozen=True)
class Leg:
    """One environment: its Python, and how versions are chosen."""

    name: str
    python: str
    arguments: tuple[str, ...] = ()


LEGS = (
    Leg("pins-3.11", "3.11", ("-c", str(REPO / "constraints.txt"))),
    Leg("newest-3.11", "3.11"),
    Leg("newest-3.12", "3.12"),
    Leg("newest-3.13", "3.13"),
    Leg("lowest-3.11", "3.11", ("--resolution", "lowest-direct")),
)


class LegFailed(Exception):
    """A command of a leg failed."""


def main() -> int:
    """Run the legs that are named, or all; return 1 when one fails."""
    names = [leg.name for leg in LEGS] + sorted(RUNTIME_LEGS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("legs", nargs="*", metavar="LEG", help=", ".join(names))
    parser.add_argument("--keep", type=Path, help="make the environments in this folder, and keep them")
    arguments = parser.parse_args()
    if unknown := set(arguments.legs) - set(names):
        parser.error(f"no leg {', '.join(sorted(unknown))}; legs: {', '.join(names)}")
    wanted = arguments.legs or names
    results = {}
    with tempfile.TemporaryDirectory(prefix="versions") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        wheel = build_wheel(folder / "dist")
        for leg in LEGS:
            if leg.name in wanted:
                results[leg.name] = attempt(leg.name, leg.python, lambda leg=leg: run_leg(leg, wheel, folder))
                if not (leg.python == "3.12" or arguments.keep):
                    shutil.rmtree(folder / leg.name, ignore_errors=True)
        for name in sorted(set(wanted) & set(RUNTIME_LEGS)):
            results[name] = attempt(name, "3.12", lambda name=name: run_runtime(name, wheel, folder))
    print("\n".join(f"{name}: {result}" for name, result in results.items()))
    return int(any(result.startswith("FAILED") for result in results.values()))


def attempt(name: str, python: str, run) -> str:
    """Run a leg; return what became of it."""
    if interpreter(python) is None:
        return f"NOT RUN: no Python {python} on this machine (pyenv install {python})"
    print(f"--- {name}", flush=True)
    began = time.monotonic()
    try:
        run()
    except LegFailed as exc:
        return f"FAILED: {exc}"
    return f"passed in {time.monotonic() - began:.0f} s"


def run_leg(leg: Leg, wheel: Path, folder: Path) -> None:
    """Make the leg's environment and check it."""
    environment = make_environment(folder / leg.name, leg.python)
    install(environment, *leg.arguments, f"scgpt_batch[local] @ {wheel.as_uri()}", *TEST_NEEDS)
    check(environment, folder / f"{leg.name}-work")


def run_runtime(name: str, wheel: Path, folder: Path) -> None:
    """Put a Databricks runtime's versions, as they are after our install, into the newest environment; check it."""
    environment = folder / "newest-3.12"
    if not environment.exists():
        make_environment(environment, "3.12")
        install(environment, f"scgpt_batch[local] @ {wheel.as_uri()}", *TEST_NEEDS)
    pins = RUNTIME_LEGS[name]
    lines = replaced(pins, wheel, folder / f"{name}.txt").values()
    print(f"{name}: the install replaces {len(lines)} packages: {', '.join(lines) or 'nothing'}", flush=True)
    resolved = versions((folder / f"{name}.txt").read_text())
    kept = [f"{package}=={version}" for package, version in resolved.items() if not package.startswith(TORCH)]
    kept += [f"mlflow=={resolved['mlflow-skinny']}", f"mlflow-tracing=={resolved['mlflow-skinny']}"]
    install(environment, "--no-deps", *kept)
    check(environment, folder / f"{name}-work", RUNTIME_TESTS)


def replaced(pins: Path, wheel: Path, result: Path, *beside: str) -> dict[str, str]:
    """Return the packages of a runtime that installing our wheel replaces, each with its versions before and after.

    `beside` are further requirements of the same install. The versions after it are written to `result`.
    """
    before, after = versions(pins.read_text()), after_install(pins, wheel, result, *beside)
    changed = [name for name in sorted(before) if name in after and not same_version(before[name], after[name])]
    return {name: f"{name} {before[name]} -> {after[name]}" for name in changed}


def after_install(pins: Path, wheel: Path, result: Path, *beside: str) -> dict[str, str]:
    """Return the versions that an environment with these pins has after our wheel was installed into it."""
    needs = result.with_suffix(".in")
    lines = [f"scgpt_batch @ {wheel.as_uri()}", *versions(pins.read_text()), *beside]
    needs.write_text("".join(f"{line}\n" for line in lines))
    shutil.copyfile(pins, result)  # uv keeps the versions that its output file has, where it can
    result.chmod(0o644)
    command("uv", "pip", "compile", "-q", "--python-version", "3.12", "--no-annotate", str(needs), "-o", str(result))
    return versions(result.read_text())


def versions(text: str) -> dict[str, str]:
    """Read `name==version` lines."""
    lines = (line.split("#")[0].split(";")[0].strip() for line in text.splitlines())
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines) if version}


def same_version(one: str, other: str) -> bool:
    """Whether two spellings are one version: 0.108 is 0.108.0."""
    shortest = [re.sub(r"(\.0)+$", "", version) for version in (one, other)]
    return shortest[0] == shortest[1]


def check(environment: Path, work: Path, names: Sequence[str] = UNIT_TESTS) -> None:
    """Run these unit tests and the journey with the environment's package, in a folder without the source."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    shutil.copytree(REPO / "tests", work / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "conf", work / "conf")
    shutil.copyfile(REPO / "pyproject.toml", work / "pyproject.toml")
    python = environment / "bin" / "python"
    command(str(python), "-c", "import scgpt_batch, sys; assert sys.prefix in scgpt_batch.__file__", cwd=work)
    tests = [str(path.relative_to(work)) for name in names for path in work.glob(f"tests/*/{name}.py")]
    command(
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--durations=0",
        "--durations-min=20",
        *tests,
        cwd=work,
    )
    for step in ("demo-checkpoint", "ingest", "register", "embed", "summary"):
        command(str(environment / "bin" / "scgpt-batch"), step, "--config", "conf/local.yml", cwd=work)
    command(str(python), "-c", PREDICT, cwd=work)
    shutil.rmtree(work)


def interpreter(version: str) -> str | None:
    """Find a Python of this minor version that starts: on the PATH, or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [*sorted(map(str, pyenv.glob(f"{version}.*/bin/python"))), shutil.which(f"python{version}")]
    starts = (p for p in found if p and subprocess.run([p, "-c", ""], capture_output=True, check=False).returncode == 0)
    return next(starts, None)


def make_environment(folder: Path, python: str) -> Path:
    """Make an empty environment."""
    command("uv", "venv", "-q", "--clear", "--python", str(interpreter(python)), str(folder))
    return folder


def install(environment: Path, *arguments: str) -> None:
    """Install with uv, which links files from its cache: environments share the disk space of torch."""
    command("uv", "pip", "install", "-q", "--python", str(environment / "bin" / "python"), *arguments)


def build_wheel(folder: Path) -> Path:
    """Build the package's wheel."""
    shutil.rmtree(folder, ignore_errors=True)
    command("uv", "build", "-q", "--wheel", "--out-dir", str(folder), str(REPO))
    (wheel,) = folder.glob("*.whl")
    return wheel


def command(*words: str, cwd: Path = REPO) -> None:
    """Run a command; its output is this process's."""
    beside = Path(sys.executable).parent / "uv"
    words = (str(beside), *words[1:]) if words[0] == "uv" and beside.exists() else words
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYSPARK_PYTHON")}
    done = subprocess.run(words, cwd=cwd, env={"SPARK_LOCAL_IP": "127.0.0.1"} | environment, check=False)
    if done.returncode:
        raise LegFailed(f"exit code {done.returncode} from: {' '.join(words)[:300]}")


if __name__ == "__main__":
    sys.exit(main())
