"""Checks of an HDF5 file before anything of it is read.

HDF5 lets a file refer to others: by external raw storage, external links and virtual datasets. A file that somebody
else wrote could so return the content of any file that this process may read. And a few bytes can declare a dataset of
any size, for which a reader would allocate memory. Files of counts need none of this, so it is refused.
"""

import math
from pathlib import Path
from typing import Any

import h5py

from scgpt_batch.errors import FileError

MAX_OBJECTS = 1_000_000  # of one file; each takes some microseconds to check
FREE_BYTES = 64 * 2**20  # a dataset may declare this much, whatever it stores
MAX_RATIO = 1_100  # gzip compresses at most 1,032 times

_HARD = h5py.h5l.TYPE_HARD
_LINKS = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "a link to another file"}


def open_hdf5(path: Path | Any, *, sliced: tuple[str, ...] = ()) -> h5py.File:
    """Open an HDF5 file for reading after checking it.

    Parameters
    ----------
    path
        A path, or an open binary file.
    sliced
        Names of datasets and groups that are read in bounded slices only, so that their declared size does not matter.

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
    """Refuse a file that refers to other files, or declares more data than it can contain.

    Raises
    ------
    FileError
        Names the object and what is wrong with it.
    """
    seen = 0

    # both return what is wrong: h5py stops there (an exception from a callback is not always passed on)
    def link(name: bytes, info: Any) -> str | None:
        nonlocal seen
        seen += 1
        named = repr(name.decode(errors="replace"))
        if seen > MAX_OBJECTS:
            return f"contains more than {MAX_OBJECTS:,} objects (at {named})"
        if info.type != _HARD:
            kind = _LINKS.get(info.type, "a link of an unknown kind")
            return f"{named} is {kind}, which can point to data outside the file: copy the data into the file"
        return None

    def dataset(name: str, node: Any) -> str | None:
        if not isinstance(node, h5py.Dataset):
            return None
        return _fault_of(name, node, check_size=not _is_sliced(name, node, sliced))

    wrong = file.id.links.visit(link, info=True) or file.visititems(dataset)
    if wrong:
        raise FileError(f"refused: {wrong}")


def _is_sliced(name: str, node: h5py.Dataset, sliced: tuple[str, ...]) -> bool:
    return node.ndim == 2 and any(name == prefix or name.startswith(f"{prefix}/") for prefix in sliced)


def _fault_of(name: str, node: h5py.Dataset, *, check_size: bool) -> str | None:
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
        return f"{name!r} declares {declared / 2**20:,.0f} MB, but stores {stored:,} bytes"
    return None
