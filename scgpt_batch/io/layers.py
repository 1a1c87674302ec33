"""Choice of the matrix of an AnnData file that contains the counts: X, raw or a layer."""

from typing import Any, NamedTuple

import numpy as np

from scgpt_batch.errors import ConfigError, FileError, listed
from scgpt_batch.io.annotations import is_array

AUTO = "auto"
SAMPLED_VALUES = 300_000  # values read, from three places of a matrix, to tell counts from other values


class StoredMatrix(NamedTuple):
    """A matrix of a file. The table of its genes is `home[genes]`."""

    node: Any
    home: Any
    genes: str


def stored_matrices(group: Any) -> dict[str, StoredMatrix]:
    """Return the matrices of an AnnData group by name, in the order in which they are searched for counts."""
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
    """Return the name of the matrix to read, and the reason for the choice in words.

    Parameters
    ----------
    group
        An AnnData group.
    wanted
        "X", "raw", the name of a layer, or "auto": the first matrix with counts, else the first without negative
        values.

    Raises
    ------
    ConfigError
        There is no such matrix, or `wanted` is "auto" and all matrices contain negative values.
    FileError
        The file has no matrix.
    """
    matrices = stored_matrices(group)
    if not matrices:
        raise FileError(f"there is no X, raw or layer; the file has only {listed(sorted(group))}")
    if wanted != AUTO:
        if wanted not in matrices:
            raise ConfigError(f"there is no layer {wanted!r}; set --layer to auto or one of {listed(matrices, wanted)}")
        return wanted, "as set by --layer"
    kinds: dict[str, str] = {}
    for name, matrix in matrices.items():
        kinds[name] = kind_of_values(matrix.node)
        if kinds[name] == "counts":
            others = "".join(f"; {other} contains {kind}" for other, kind in kinds.items() if other != name)
            return name, f"it contains counts (whole numbers){others}"
    for name, kind in kinds.items():
        if kind == "fractions":
            return name, f"no matrix contains counts: {_described(kinds)}. These values look normalised"
    raise ConfigError(
        f"no matrix contains counts: {_described(kinds)}. Scaled values cannot be embedded; add the counts to the file "
        "as a layer and name it with --layer"
    )


def kind_of_values(node: Any) -> str:
    """Return "counts", "fractions" or "negative values", judged by a bounded sample of a matrix."""
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
    """Return whether a node is a matrix; newer versions of anndata store a missing X as a null."""
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


def _described(kinds: dict[str, str]) -> str:
    return ", ".join(f"{name} contains {kind}" for name, kind in kinds.items())
