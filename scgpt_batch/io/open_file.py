"""Opening count files of any supported format; for other formats, errors that say how to convert them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import pandas as pd
import zarr
import zarr.storage

from scgpt_batch.errors import ConfigError, FileError, ScgptBatchError
from scgpt_batch.io.anndata_file import TABLES, AnnDataFile, anndata_group
from scgpt_batch.io.annotations import open_annotations
from scgpt_batch.io.hdf5_safety import open_hdf5
from scgpt_batch.io.layers import AUTO
from scgpt_batch.io.locations import fingerprint, is_folder, is_remote, list_folder, open_binary
from scgpt_batch.io.tenx import MATRIX_FILE, TenXFolder, TenXH5, tenx_files, tenx_groups

CountsFile = AnnDataFile | TenXH5 | TenXFolder

# these are read in slices of cells, so a wrong declared size does not allocate memory
_SLICED = ("X", "layers", "raw/X", "raw.X", "mod", "tables")
_HDF5 = (".h5ad", ".h5", ".hdf5", ".h5mu")
_ZARR_MARKS = {".zgroup", "zarr.json", ".zmetadata"}
_UNSUPPORTED = {
    ".loom": "convert it: anndata.io.read_loom(...).write_h5ad(...)",
    ".h5seurat": "convert it in R: SeuratDisk::Convert(..., dest = 'h5ad')",
    ".rds": "convert it in R, e.g. with zellkonverter::writeH5AD",
    ".csv": "convert it: anndata.io.read_csv(...).write_h5ad(...)",
}


@contextmanager
def open_counts(source: str, layer: str = AUTO) -> Iterator[CountsFile]:
    """Open a count file of any supported format, as a context manager.

    Parameters
    ----------
    source
        A path or URI, as returned by `find_sources`.
    layer
        The matrix to read: "X", "raw", the name of a layer, or "auto" (the first that contains counts).

    Raises
    ------
    ConfigError
        The format is not supported, or there is no such layer.
    FileError
        The file cannot be read.

    Examples
    --------
    >>> with open_counts("pbmc3k.h5ad") as file:
    ...     print(file.n_obs, file.layer, file.columns("obs"))
    """
    with named_errors(source):
        if _is_mtx(source):
            yield TenXFolder(_tenx_files(source))
            return
        root = _open_store(source)
        try:
            groups = tenx_groups(root) if isinstance(root, h5py.File) and "obs" not in root else []
            yield TenXH5(root, groups) if groups else AnnDataFile(anndata_group(root), layer)
        finally:
            if isinstance(root, h5py.File):
                root.close()


def read_obs(source: str) -> pd.DataFrame:
    """Return the table of cells of an AnnData file, indexed by cell name. Matrices are not read.

    Raises
    ------
    ConfigError
        The format is not supported.
    FileError
        The file cannot be read, or has no table of cells.
    """
    with named_errors(source):
        root = _open_store(source)
        try:
            group = anndata_group(root)
            if "obs" not in group:
                raise FileError("has no table of cells (obs)")
            return open_annotations(group, "obs", group.get("uns")).read()
        finally:
            if isinstance(root, h5py.File):
                root.close()


@contextmanager
def named_errors(source: str) -> Iterator[None]:
    """Convert exceptions about a file into a FileError (or ConfigError) whose message starts with the file."""
    try:
        yield
    except MemoryError:
        raise
    except ScgptBatchError as exc:
        if str(exc).startswith(source):
            raise
        kind = type(exc) if isinstance(exc, (ConfigError, FileError)) else FileError
        raise kind(f"{source}: {exc}") from exc
    except Exception as exc:  # h5py, zarr, scipy and anndata raise many exception types for damaged files
        raise FileError(f"{source}: cannot be read: {type(exc).__name__}: {exc}") from exc


def source_fingerprint(source: str) -> str:
    """Return a fingerprint that changes when the file changes; of a 10x text matrix, of all its files."""
    with named_errors(source):
        if MATRIX_FILE.fullmatch(_last(source)) and not is_folder(source):
            return " ".join(map(fingerprint, _tenx_files(source).values()))
        return fingerprint(source)


def _open_store(source: str) -> Any:
    lower = source.lower()
    if is_folder(source):
        return _open_zarr(source)
    if lower.endswith(".zip"):
        if is_remote(source):
            raise ConfigError("a remote .zip file is not supported: unpack it, or copy it to a local folder or volume")
        return zarr.open_group(zarr.storage.ZipStore(source, mode="r"), mode="r")
    if not lower.endswith(_HDF5):
        raise ConfigError(_unsupported(source))
    return open_hdf5(open_binary(source) if is_remote(source) else source, sliced=_SLICED)


def _open_zarr(source: str) -> Any:
    """Open a zarr store.

    If the table of a SpatialData store has another zarr format than the store, the store seems to have no tables. The
    table is then opened directly.
    """
    root: Any = zarr.open_group(source, mode="r")
    for folder in TABLES:
        if folder in root and not list(root[folder]):
            tables = [name for name in list_folder(f"{source}/{folder}") if is_folder(f"{source}/{folder}/{name}")]
            if len(tables) == 1 or "table" in tables:
                return zarr.open_group(f"{source}/{folder}/{'table' if 'table' in tables else tables[0]}", mode="r")
    return root


def _is_mtx(source: str) -> bool:
    if (is_remote(source) and source.lower().endswith(_HDF5)) or not is_folder(source):
        return bool(MATRIX_FILE.fullmatch(_last(source)))
    return not _ZARR_MARKS & set(list_folder(source))


def _tenx_files(source: str) -> dict[str, str]:
    match = None if is_folder(source) else MATRIX_FILE.fullmatch(_last(source))
    return tenx_files(source.rpartition("/")[0], match["prefix"]) if match else tenx_files(source)


def _last(source: str) -> str:
    return source.rstrip("/").rpartition("/")[2]


def _unsupported(source: str) -> str:
    lower = source.lower()
    if lower.endswith(".gz"):
        return "a gzip-compressed file is not supported: unpack it first, with gunzip"
    for suffix, how in _UNSUPPORTED.items():
        if lower.endswith(suffix):
            return f"{suffix} is not supported: {how}"
    return "the format is not supported: use .h5ad, .h5mu, .zarr, .zarr.zip, 10x .h5 or a 10x mtx folder"
