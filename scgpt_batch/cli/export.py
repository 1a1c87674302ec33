"""Embeddings out of a table: into an AnnData file, or Parquet. No Spark for a table at a path."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import pyarrow.parquet as pq

from scgpt_batch.command_result import CommandResult, plural
from scgpt_batch.embedding_tables import Embeddings, load_embeddings, to_anndata
from scgpt_batch.errors import ConfigError
from scgpt_batch.io.locations import local_path
from scgpt_batch.settings import ExportSettings


@dataclass(frozen=True, kw_only=True)
class ExportResult(CommandResult):
    """What was written."""

    out: str
    cells: int
    genes: int

    def lines(self) -> list[str]:
        """Say what was written where."""
        what = plural(self.cells, "cell vector") if self.cells else plural(self.genes, "gene vector")
        return [f"{what} in {self.out}"]


def export(settings: ExportSettings) -> ExportResult:
    """Write the embeddings of a table to a file; nothing is left behind if it fails.

    Raises
    ------
    ConfigError
        The table or file cannot be read, names do not match, or `out` is neither .h5ad, .zarr nor .parquet.
    """
    out = local_path(settings.out, "out")
    if out.suffix not in (".h5ad", ".zarr", ".parquet"):
        raise ConfigError(f"out {settings.out!r} must end in .h5ad, .zarr or .parquet")
    if settings.h5ad and out.suffix == ".parquet":
        raise ConfigError("h5ad goes with an out of .h5ad or .zarr: Parquet holds the lines of the table alone")
    if out.exists():
        raise ConfigError(f"{out} exists: choose another name, or remove it")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        found = load_embeddings(
            settings.embeddings,
            mode=settings.mode or None,
            model_version=settings.model_version or None,
            run_id=settings.run_id or None,
        )
        adata = None if out.suffix == ".parquet" else to_anndata(found, _read(settings.h5ad), settings.key_added)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished{out.suffix}")
    try:
        _write(found, adata, unfinished)
        unfinished.rename(out)
    except OSError as exc:
        raise ConfigError(f"cannot write {out}: {exc}") from exc
    vectors = found.table.num_rows
    return ExportResult(out=str(out), cells=vectors * found.are_cells, genes=vectors * (not found.are_cells))


def _read(path: str) -> ad.AnnData | None:
    if not path:
        return None
    file = local_path(path, "h5ad")
    try:
        return ad.read_zarr(file) if file.is_dir() else ad.read_h5ad(file)
    except (OSError, KeyError, ValueError) as exc:
        raise ConfigError(f"cannot read {path} as .h5ad or .zarr: {exc}") from exc


def _write(found: Embeddings, adata: ad.AnnData | None, path: Path) -> None:
    if adata is None:
        pq.write_table(found.table, path)
    elif path.suffix == ".zarr":
        adata.write_zarr(path)
    else:
        adata.write_h5ad(path)
