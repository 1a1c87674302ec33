"""Reading 10x Genomics files: .h5 (Cell Ranger 2 and newer, Flex, CellBender) and folders of text files.

An .h5 file is read in slices of cells. A text matrix can only be read completely.
"""

import gzip
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from scgpt_batch.errors import ConfigError, FileError, listed
from scgpt_batch.io.locations import list_folder, open_binary, size_of
from scgpt_batch.io.sparse import csr_rows

MATRIX_FILE = re.compile(r"(?P<prefix>.*?)matrix\.mtx(\.gz)?")
MAX_GZIP_RATIO = 1_100  # gzip compresses at most 1,032 times
LEAST_ENTRY_BYTES = 4  # shortest line of a text matrix, such as "1 1\n"

_FEATURE_COLUMNS = ("gene_ids", "gene_symbols", "feature_types", "chromosome", "start", "end")
_RENAMED = ("name", "feature_type", "id", "_all_tag_keys")  # members of `features` that do not keep their name


def tenx_groups(root: Any) -> list[str]:
    """Return the names of the groups of an .h5 file that contain a 10x matrix: one, or one for each genome."""
    needed = {"barcodes", "data", "indices", "indptr"}
    return [name for name in root if isinstance(root[name], h5py.Group) and needed <= set(root[name])]


class TenXMatrix(ABC):
    """Base class of the 10x readers, with the interface of `AnnDataFile`. 10x files have one matrix and no obs."""

    layer, reason, is_csc = "X", "10x files contain counts", False
    uns: Mapping[str, Any] = {}
    n_obs: int
    barcodes: np.ndarray
    filtered: np.ndarray | None = None

    def columns(self, table: str) -> list[str]:
        """Return the column names of "obs" or "var"."""
        if table == "var":
            return list(self.var())
        return [] if self.filtered is None else ["filtered_barcodes"]

    def labels(self, column: str) -> pd.Series:
        """Return one obs column of all cells."""
        return self.obs(np.arange(self.n_obs))[column]

    def names(self, positions: np.ndarray) -> np.ndarray:
        """Return the barcodes of the cells at these positions."""
        return self.barcodes[positions]

    def obs(self, positions: np.ndarray) -> pd.DataFrame:
        """Return obs of the cells at these positions."""
        columns = {} if self.filtered is None else {"filtered_barcodes": self.filtered[positions]}
        return pd.DataFrame(columns, index=pd.Index(self.barcodes[positions], dtype=object))

    @abstractmethod
    def var(self) -> pd.DataFrame:
        """Return the table of features."""


class TenXH5(TenXMatrix):
    """An open 10x .h5 file. If it has a matrix for each genome, cells are joined by barcode."""

    def __init__(self, root: Any, groups: Sequence[str]) -> None:
        self.groups = [root[name] for name in groups]
        self.genomes = list(groups)
        self._check_shapes()
        lists = [_text(group["barcodes"]) for group in self.groups]
        self.barcodes = lists[0] if len(lists) == 1 else pd.unique(np.concatenate(lists))
        self.n_obs = len(self.barcodes)
        self._rows = [None if len(lists) == 1 else pd.Index(names).get_indexer(self.barcodes) for names in lists]
        filtered = self.groups[0].get("filtered_barcodes")
        if filtered is not None and len(lists) == 1 and filtered.shape == (self.n_obs,):
            self.filtered = np.asarray(filtered[...]).astype(bool)

    @property
    def stored_values(self) -> int:
        """Number of values that the matrices store."""
        return sum(int(group["data"].shape[0]) for group in self.groups)

    def var(self) -> pd.DataFrame:
        """Return the table of features, indexed by gene symbols; with several genomes, the genome is a prefix."""
        tables = [_features(group) for group in self.groups]
        if len(tables) == 1:
            return tables[0]
        for table, genome in zip(tables, self.genomes, strict=True):
            table.index = [f"{genome}_{name}" for name in table.index]
            table["genome"] = genome
        return pd.concat(tables)

    def matrices(self, rows: Sequence[np.ndarray], block_values: int) -> Iterator[sp.csr_matrix]:
        """Yield the cells × genes matrix of each row; `rows` has the positions of the cells of each."""
        for positions in rows:
            parts = [self._cells(i, positions) for i in range(len(self.groups))]
            yield parts[0] if len(parts) == 1 else sp.hstack(parts, format="csr")

    def _cells(self, i: int, positions: np.ndarray) -> sp.csr_matrix:
        group, rows = self.groups[i], self._rows[i]
        if rows is None:
            return csr_rows(group, positions, self._n_features(group))
        wanted = rows[positions]
        present = np.flatnonzero(wanted >= 0)
        order = np.argsort(wanted[present])
        found = csr_rows(group, wanted[present][order], self._n_features(group))
        place = sp.csr_matrix((np.ones(len(present), found.dtype), (present[order], np.arange(len(present)))),
                              (len(positions), len(present)))  # fmt: skip
        return place @ found

    def _n_features(self, group: Any) -> int:
        return int(group["shape"][0]) if "shape" in group else len(_features(group))

    def _check_shapes(self) -> None:
        for group in self.groups:
            cells, features = int(group["barcodes"].shape[0]), len(_features(group))
            if "shape" in group and tuple(map(int, group["shape"][...])) != (features, cells):
                raise FileError(
                    f"{group.name}: shape is {group['shape'][...].tolist()}, but there are {features} features and "
                    f"{cells} barcodes; the file is damaged, export it again"
                )
            if int(group["indptr"].shape[0]) != cells + 1 or group["data"].shape != group["indices"].shape:
                raise FileError(
                    f"{group.name}: data, indices and indptr do not match the {cells} barcodes; the file is damaged, "
                    "export it again"
                )


class TenXFolder(TenXMatrix):
    """A 10x folder, or the files with one prefix in it: matrix.mtx, features.tsv or genes.tsv, and barcodes.tsv."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = files
        self.barcodes = _table(files["barcodes"])[0].to_numpy(object)
        self.n_obs = len(self.barcodes)
        self._x: sp.csr_matrix | None = None

    @property
    def stored_values(self) -> int:
        """Number of values that the matrix stores."""
        return self._declared()[2]

    def var(self) -> pd.DataFrame:
        """Return the table of features; the file's columns are names, or ids, names, types and positions."""
        table = _table(self.files["features"])
        if table.shape[1] == 1:
            return pd.DataFrame(index=pd.Index(table[0], dtype=object))
        table = table.iloc[:, : len(_FEATURE_COLUMNS)]
        table.columns = list(_FEATURE_COLUMNS[: table.shape[1]])
        names = pd.Index(table.pop("gene_symbols"), dtype=object)
        return table.set_index(names).rename_axis(None)

    def matrices(self, rows: Sequence[np.ndarray], block_values: int) -> Iterator[sp.csr_matrix]:
        """Yield the cells × genes matrix of each row, after reading the whole file."""
        x = self._whole()
        yield from (x[positions] for positions in rows)

    def _whole(self) -> sp.csr_matrix:
        if self._x is None:
            features = len(_table(self.files["features"]))
            shape = self._declared()[:2]
            if shape not in ((features, self.n_obs), (self.n_obs, features)):
                raise FileError(
                    f"{self.files['matrix']} is {shape[0]} × {shape[1]}, but there are {features} features and "
                    f"{self.n_obs} barcodes; the files belong to different samples or are incomplete"
                )
            with _opened(self.files["matrix"]) as stream:
                x = sp.csr_matrix(scipy.io.mmread(stream))
            self._x = sp.csr_matrix(x.T) if shape == (features, self.n_obs) else x
        return self._x

    def _declared(self) -> tuple[int, int, int]:
        """Return the shape and the number of entries in the header, checked against the size of the file."""
        name = self.files["matrix"]
        with _opened(name) as stream:
            if not stream.readline().startswith(b"%%MatrixMarket matrix coordinate"):
                raise FileError(f"{name} is not a sparse Matrix Market file; export it again in coordinate format")
            line = stream.readline()
            while line.startswith(b"%") or line.strip() == b"" != line:
                line = stream.readline()
        try:
            rows, columns, entries = map(int, line.split())
        except ValueError as exc:
            raise FileError(f"{name}: the header line {line[:80]!r} is not 'rows columns entries'") from exc
        ratio = MAX_GZIP_RATIO if name.endswith(".gz") else 1
        if entries * LEAST_ENTRY_BYTES > size_of(name) * ratio:
            raise FileError(
                f"{name} declares {entries:,} entries, more than its {size_of(name):,} bytes can contain; it is "
                "incomplete, copy it again"
            )
        return rows, columns, entries


def tenx_files(folder: str, prefix: str | None = None) -> dict[str, str]:
    """Return the paths of the files "matrix", "features" and "barcodes" of a 10x folder.

    Parameters
    ----------
    folder
        The folder.
    prefix
        Start of the three file names, as in downloads from GEO. Default: the only one in the folder.

    Raises
    ------
    ConfigError
        A file is missing, or the folder contains several samples.
    """
    files = set(list_folder(folder))
    prefixes = sorted({match["prefix"] for name in files if (match := MATRIX_FILE.fullmatch(name))})
    if prefix is None:
        if len(prefixes) > 1:
            raise ConfigError(
                f"{folder} contains {len(prefixes)} samples ({listed(prefixes)}): name each matrix as an input, such "
                f"as {folder}/{prefixes[0]}matrix.mtx.gz"
            )
        prefix = prefixes[0] if prefixes else ""
    found = {}
    parts = {"barcodes": ["barcodes.tsv"], "features": ["features.tsv", "genes.tsv"], "matrix": ["matrix.mtx"]}
    for part, names in parts.items():
        candidates = [f"{prefix}{name}{end}" for name in names for end in ("", ".gz")]
        matches = [name for name in candidates if name in files]
        if not matches:
            raise ConfigError(_missing_file(folder, f"{prefix}{names[0]}.gz", files))
        found[part] = f"{folder.rstrip('/')}/{matches[0]}"
    return found


def _missing_file(folder: str, name: str, files: set[str]) -> str:
    inside = sorted(name for name in files if name.lower().endswith((".h5ad", ".h5", ".zarr", ".h5mu")))
    hint = f"; for the files in it use '{folder}/*{inside[0][inside[0].rindex('.') :]}'" if inside else ""
    return f"{folder} is neither a zarr store nor a 10x folder (it has no {name}){hint}"


def _features(group: Any) -> pd.DataFrame:
    """Return the features of a 10x matrix; probes carry the name of their gene, so that they can be summed by gene."""
    if "features" not in group:  # Cell Ranger 2, CellBender 0.1 and 0.2
        if "gene_names" not in group:
            raise FileError(f"{group.name} has neither features nor gene_names; export the file again")
        columns = {"gene_ids": _text(group["genes"])} if "genes" in group else {}
        return _feature_table(columns, _text(group["gene_names"]), group.name)
    features = group["features"]
    has_probes = "gene_id" in features and "gene_name" in features
    columns = {"gene_ids": _text(features["gene_id" if has_probes else "id"])} if "id" in features else {}
    if has_probes:
        columns["probe_ids"] = _text(features["id"])
    if "feature_type" in features:
        columns["feature_types"] = _text(features["feature_type"])
    names = _text(features["gene_name" if has_probes else "name"])
    for name, node in features.items():
        if isinstance(node, h5py.Dataset) and node.shape == names.shape and name not in _RENAMED:
            columns[name] = _text(node)
    return _feature_table(columns, names, group.name)


def _feature_table(columns: dict[str, np.ndarray], names: np.ndarray, where: str) -> pd.DataFrame:
    for name, values in columns.items():
        if len(values) != len(names):
            raise FileError(f"{where}: {name} has {len(values)} values for {len(names)} features; export it again")
    return pd.DataFrame(columns, index=pd.Index(names, dtype=object))


def _text(node: Any) -> np.ndarray:
    if h5py.check_string_dtype(node.dtype):
        return np.asarray(node.asstr("utf-8")[...]).astype(object)
    return np.asarray(node[...]).astype(object if node.dtype.kind == "O" else node.dtype)


def _table(name: str) -> pd.DataFrame:
    """Return a tab-separated table without a header; all values are strings, also "NA"."""
    with _opened(name) as stream:
        try:
            return pd.read_csv(stream, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as exc:
            raise FileError(f"{name} is not a table of tab-separated values: {exc}") from exc


def _opened(name: str) -> Any:
    """Open a file for reading, decompressed if its content (not only its name) is gzip."""
    raw = open_binary(name)
    start = raw.read(2)
    raw.seek(0)
    return gzip.open(raw) if start == b"\x1f\x8b" else io.BufferedReader(raw) if isinstance(raw, io.RawIOBase) else raw
