"""Which matrix of an AnnData file holds the counts: X, raw or a layer."""

from typing import Any, NamedTuple

import numpy as np

from scgpt_batch.errors import ConfigError, FileError
from scgpt_batch.io.annotations import is_array

AUTO = "auto"
SAMPLED_VALUES = 300_000  # of a matrix, from three places, to tell counts from other values


class StoredMatrix(NamedTuple):
    """A matrix of a file, and the table of its genes: `home[genes]`."""

    node: Any
    home: Any
    genes: str


def stored_matrices(group: Any) -> dict[str, StoredMatrix]:
    """List the matrices of an AnnData group by name, in the order in which counts are looked for."""
    found = {}
    if "X" in group and _is_matrix(group["X"]):
        found["X"] = StoredMatrix(group["X"], group, "var")
    layers = group.get("layers", {})
    names = sorted(layers, key=lambda name: (name != "counts", name))
    if "raw" in group and "X" in group["raw"]:
        raw = StoredMatrix(group["raw"]["X"], group["raw"], "var")
    elif "raw.X" in group:  # anndata 0.6
        raw = StoredMatrix(group["raw.X"], group, "raw.var")
    else:
        raw = None
    if "counts" in names:
        found["counts"] = StoredMatrix(layers["counts"], group, "var")
    if raw is not None:
        found["raw"] = raw
    for name in names:
        found.setdefault(name, StoredMatrix(layers[name], group, "var"))
    return found


def choose_layer(group: Any, wanted: str) -> tuple[str, str]:
    """Choose the matrix to read: its name, and the reason for a person to read.

    Raises
    ------
    ConfigError
        There is no such matrix, or (`auto`) each contains negative values.
    FileError
        The file has no matrix at all.
    """
    matrices = stored_matrices(group)
    if not matrices:
        members = ", ".join(sorted(group)) or "nothing"
        raise FileError(f"there is no X, raw or layer: it contains {members}")
    if wanted != AUTO:
        if wanted not in matrices:
            raise ConfigError(f"there is no layer {wanted!r}; --layer can be {', '.join(matrices)} or auto")
        return wanted, "as set by --layer"
    kinds: dict[str, str] = {}
    for name, matrix in matrices.items():
        kinds[name] = kind_of_values(matrix.node)
        if kinds[name] == "counts":
            others = "".join(f"; {other} contains {kind}" for other, kind in kinds.items() if other != name)
            return name, f"it contains counts (whole numbers){others}"
    for name, kind in kinds.items():
        if kind == "fractions":
            return name, f"no matrix contains counts: {_listed(kinds)}. These values look normalised"
    raise ConfigError(
        f"no matrix contains counts: {_listed(kinds)}. Negative values are scaled and cannot be embedded; add the "
        "counts to the file as a layer and name it with --layer"
    )


def kind_of_values(node: Any) -> str:
    """Tell by a bounded sample whether a matrix contains "counts", "fractions" or "negative values"."""
    values = _sample(node)
    if not values.size:
        return "counts"
    if values.dtype.kind == "b":
        return "counts"
    if values.dtype.kind not in "iuf":
        return f"values of type {values.dtype}"
    if values.min() < 0:
        return "negative values"
    return "counts" if values.dtype.kind in "iu" or (values == np.floor(values)).all() else "fractions"


def _is_matrix(node: Any) -> bool:
    """Tell whether X is there: newer anndata stores its absence as a null."""
    return node.attrs.get("encoding-type") != "null" and (not is_array(node) or len(node.shape) == 2)


def _sample(node: Any) -> np.ndarray:
    array = node if is_array(node) else node["data"]
    length = array.shape[0]
    width = max(1, int(np.prod(array.shape[1:])))
    block = max(1, SAMPLED_VALUES // 3 // width)
    starts = sorted({0, max(0, length // 2 - block // 2), max(0, length - block)})
    columns = (slice(0, SAMPLED_VALUES),) if array.ndim == 2 else ()
    parts = [np.asarray(array[(slice(start, start + block), *columns)]).ravel() for start in starts]
    return np.concatenate(parts)


def _listed(kinds: dict[str, str]) -> str:
    return ", ".join(f"{name} contains {kind}" for name, kind in kinds.items())
