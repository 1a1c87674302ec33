"""What several tests share: one comparison of numbers, generators of AnnData and of table rows."""

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import mlflow
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgpt_batch.io.rows import to_row

CELL = ["--mode", "cell", "--need-preprocess", "false", "--data-is-raw", "true"]  # the shortest way to cell vectors


def assert_close(found: Any, wanted: Any, *, atol: float = 0.0, rtol: float = 0.0) -> None:
    """Compare numbers; NaN equals NaN, and infinity itself. Fails with the largest difference and its place."""
    found, wanted = np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert found.shape == wanted.shape, f"shape {found.shape}, wanted {wanted.shape}"
    same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    difference = np.where(same, 0.0, np.inf)
    np.subtract(found, wanted, out=difference, where=~same & np.isfinite(found) & np.isfinite(wanted))
    difference = np.abs(difference)
    excess = difference - (atol + rtol * np.abs(np.nan_to_num(wanted, posinf=0, neginf=0)))
    if (excess > 0).any():
        at = np.unravel_index(np.argmax(np.where(excess > 0, difference, -1.0)), found.shape)
        place = tuple(map(int, at))
        raise AssertionError(
            f"{int((excess > 0).sum())} of {found.size} differ by more than atol {atol:g}, rtol {rtol:g}; largest "
            f"difference {difference[at]:g} at {place}: found {found[at]}, wanted {wanted[at]}"
        )


@contextmanager
def mlflow_store(folder: Path, *, copy_of: Path | None = None) -> Iterator[None]:
    """An MLflow store in sqlite, in `folder`, with an experiment "tests"; MLflow uses it until the block ends.

    `copy_of` is the folder of another store, whose models the new one also has; only its database is copied.
    """
    before = mlflow.get_tracking_uri()
    if copy_of:
        shutil.copyfile(copy_of / "mlflow.db", folder / "mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    if not copy_of:
        mlflow.create_experiment("tests", (folder / "artifacts").as_uri())
    mlflow.set_experiment("tests")
    try:
        yield
    finally:
        mlflow.set_experiment(experiment_id="0")  # the one that every store has; MLflow remembers it for the next
        mlflow.set_tracking_uri(before)


def summary_of(*words: str) -> dict[str, Any]:
    """Run a command, which must succeed; return its JSON line. For fixtures of a module, which cannot use `run`."""
    from scgpt_batch.cli.main import OK, main

    output = io.StringIO()
    with redirect_stdout(output):
        assert main(list(words)) == OK
    return json.loads(output.getvalue().splitlines()[-1])


def name_version(name: str, version: str, alias: str) -> None:
    """Make `version` of a model `name` of the files that are registered as `scgpt` 1, and let `alias` stand for it."""
    client = mlflow.MlflowClient()
    if version == "1":
        client.create_registered_model(name)
    made = client.create_model_version(name, client.get_model_version("scgpt", "1").source)
    assert str(made.version) == version
    client.set_registered_model_alias(name, alias, version)


def random_adata(
    n_obs: int,
    n_vars: int,
    *,
    seed: int = 0,
    dtype: Any = np.float32,
    layout: Literal["sparse", "dense"] = "sparse",
    genes: Sequence[str] | None = None,
) -> ad.AnnData:
    """Make small counts, two thirds of them zero (quarters of counts for float types), with obs of every type."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    x = rng.poisson(4, (n_obs, n_vars)) * (rng.random((n_obs, n_vars)) < 1 / 3)
    x = (x / 4 if dtype.kind == "f" else x).astype(dtype)
    obs = pd.DataFrame(
        {
            "donor": [f"donor {i % 3}" for i in range(n_obs)],
            "cell_type": pd.Categorical(rng.choice(["B", "NK", "CD4 T"], n_obs)),
            "n_genes": rng.integers(0, 5000, n_obs),
            "score": np.where(np.arange(n_obs) % 4 == 1, np.nan, rng.normal(size=n_obs)),
            "kept": rng.random(n_obs) < 0.5,
        },
        index=[f"CELL{i}-1" for i in range(n_obs)],
    )
    var = pd.DataFrame(index=list(genes) if genes is not None else [f"GENE{i}" for i in range(n_vars)])
    return ad.AnnData(sp.csr_matrix(x) if layout == "sparse" else x, obs=obs, var=var)


def small_rows(n: int, golden: Path, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of three cells with forty of the golden vocabulary's genes."""
    vocabulary = json.loads((golden / "checkpoint_flash/vocab.json").read_text())
    genes = [name for name in vocabulary if not name.startswith("<")][:40]
    rng = np.random.default_rng(seed)
    for i in range(n):
        counts = sp.csr_matrix(rng.poisson(1.0, (3, 40)).astype(np.float32) + np.eye(3, 40, dtype=np.float32))
        adata = ad.AnnData(counts, obs=pd.DataFrame(index=["a", "b", "c"]), var=pd.DataFrame(index=genes))
        yield to_row(adata) | {"adata_id": f"good-{i:03}"}


def write_rows(spark: Any, rows: Any, table: str) -> None:
    """Append rows to an `adata_rows` table, made if it is not there."""
    from scgpt_batch.spark import tables
    from scgpt_batch.spark.local_frame import local_frame

    tables.create(spark, table, tables.ADATA_ROWS)
    schema = spark.table(table).schema
    append(local_frame(spark, [[row.get(field.name) for field in schema] for row in rows], schema), table)


def append(rows: Any, table: str) -> None:
    """Append a DataFrame to a Delta table."""
    rows.write.format("delta").mode("append").saveAsTable(table)
