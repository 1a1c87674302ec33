"""Security checks of an HDF5 file before its content is read.

An HDF5 file can refer to other files (external storage, external links, virtual datasets), so a malicious file could
return the content of any file that this process may read. It can also declare a dataset of any size in a few bytes, for
which a reader would allocate memory. Count files need neither, so both are rejected.
"""

import math
from pathlib import Path
from typing import Any

import h5py

from scgpt_batch.errors import FileError

MAX_OBJECTS = 1_000_000  # objects per file; checking one takes a few microseconds
FREE_BYTES = 64 * 2**20  # declared size up to which a dataset is not compared with what it stores
MAX_RATIO = 1_100  # declared to stored bytes; gzip compresses at most 1,032 times

_HARD = h5py.h5l.TYPE_HARD
_LINKS = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "a link to another file"}


def open_hdf5(path: Path | Any, *, sliced: tuple[str, ...] = ()) -> h5py.File:
    """Open an HDF5 file for reading, after the security checks.

    Parameters
    ----------
    path
        A path, or an open binary file.
    sliced
        Names of datasets and groups whose declared size is not checked, because they are only read in bounded slices.

    Raises
    ------
    FileError
        The file is not HDF5, refers to other files, or declares more data than it can contain.
    """
    try:
        file = h5py.File(path, "r")
    except OSError as exc:
        raise FileError(f"cannot be opened as HDF5: {exc}") from exc
    try:
        check_hdf5(file, sliced=sliced)
    except BaseException:
        file.close()
        raise
    return file


def check_hdf5(file: h5py.File, *, sliced: tuple[str, ...] = ()) -> None:
    """Check that a file does not refer to other files, and declares no more data than it can contain.

    Raises
    ------
    FileError
        A check failed; the message names the object.
    """
    n_objects = 0

    # Both callbacks return the problem instead of raising: h5py then stops, and does not always pass exceptions on.
    def check_link(name: bytes, info: Any) -> str | None:
        nonlocal n_objects
        n_objects += 1
        quoted = repr(name.decode(errors="replace"))
        if n_objects > MAX_OBJECTS:
            return f"it contains more than {MAX_OBJECTS:,} objects (at {quoted}); export the counts to a new file"
        if info.type != _HARD:
            kind = _LINKS.get(info.type, "a link of an unknown kind")
            return f"{quoted} is {kind}, which can point to data outside the file: copy the data into the file"
        return None

    def check_dataset(name: str, node: Any) -> str | None:
        if not isinstance(node, h5py.Dataset):
            return None
        return _problem(name, node, check_size=not _is_sliced(name, node, sliced))

    problem = file.id.links.visit(check_link, info=True) or file.visititems(check_dataset)
    if problem:
        raise FileError(f"rejected for security: {problem}")


def _is_sliced(name: str, node: h5py.Dataset, sliced: tuple[str, ...]) -> bool:
    return node.ndim == 2 and any(name == prefix or name.startswith(f"{prefix}/") for prefix in sliced)


def _problem(name: str, node: h5py.Dataset, *, check_size: bool) -> str | None:
    creation = node.id.get_create_plist()
    if creation.get_external_count():
        return f"{name!r} stores its values in another file: copy the data into the file"
    if node.is_virtual:
        return f"{name!r} is a virtual dataset, which refers to other files: copy the data into the file"
    declared = (node.size or 0) * node.dtype.itemsize
    if node.chunks:
        declared = max(declared, math.prod(node.chunks) * node.dtype.itemsize)
    stored = node.id.get_storage_size()
    if check_size and declared > max(FREE_BYTES, MAX_RATIO * stored):
        return f"{name!r} declares {declared / 2**20:,.0f} MB, but stores only {stored:,} bytes: write the file again"
    return None
