"""Cells of 10x Genomics files: .h5 (Cell Ranger 2 and newer, Flex, CellBender) and folders of text files.

An .h5 is read in slices of cells; a text matrix cannot be, so one task reads all of it.
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

from scgpt_batch.errors import ConfigError, FileError
from scgpt_batch.io.locations import list_folder, open_binary, size_of
from scgpt_batch.io.sparse import csr_rows

MATRIX_FILE = re.compile(r"(?P<prefix>.*?)matrix\.mtx(\.gz)?")
MAX_GZIP_RATIO = 1_100  # gzip compresses at most 1,032 times
LEAST_ENTRY_BYTES = 4  # a line of a text matrix, such as "1 1" and its end

_FEATURE_COLUMNS = ("gene_ids", "gene_symbols", "feature_types", "chromosome", "start", "end")
_NAMED_OTHERWISE = ("name", "feature_type", "id", "_all_tag_keys")


def tenx_groups(root: Any) -> list[str]:
    """Name the groups of an .h5 that hold a 10x matrix: one, or one a genome."""
    needed = {"barcodes", "data", "indices", "indptr"}
    return [name for name in root if isinstance(root[name], h5py.Group) and needed <= set(root[name])]


class TenXMatrix(ABC):
    """What 10x files have in common: no table of cells, one matrix."""

    layer, reason, is_csc = "X", "10x files contain counts", False
    uns: Mapping[str, Any] = {}
    n_obs: int
    barcodes: np.ndarray
    filtered: np.ndarray | None = None

    def columns(self, table: str) -> list[str]:
        """Name the columns of obs or var."""
        if table == "var":
            return list(self.var())
        return [] if self.filtered is None else ["filtered_barcodes"]

    def labels(self, column: str) -> pd.Series:
        """Read one column of obs."""
        return self.obs(np.arange(self.n_obs))[column]

    def names(self, positions: np.ndarray) -> np.ndarray:
        """Return the barcodes of these cells."""
        return self.barcodes[positions]

    def obs(self, positions: np.ndarray) -> pd.DataFrame:
        """Return the table of these cells."""
        columns = {} if self.filtered is None else {"filtered_barcodes": self.filtered[positions]}
        return pd.DataFrame(columns, index=pd.Index(self.barcodes[positions], dtype=object))

    @abstractmethod
    def var(self) -> pd.DataFrame:
        """Return the table of features."""


class TenXH5(TenXMatrix):
    """A 10x .h5: one matrix, or one a genome, whose cells are then joined by barcode."""

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
        """How many values the matrices store."""
        return sum(int(group["data"].shape[0]) for group in self.groups)

    def var(self) -> pd.DataFrame:
        """Read the table of features, named by gene symbols; of several genomes with the genome as prefix."""
        tables = [_features(group) for group in self.groups]
        if len(tables) == 1:
            return tables[0]
        for table, genome in zip(tables, self.genomes, strict=True):
            table.index = [f"{genome}_{name}" for name in table.index]
            table["genome"] = genome
        return pd.concat(tables)

    def matrices(self, rows: Sequence[np.ndarray], block_values: int) -> Iterator[sp.csr_matrix]:
        """Read the matrix of each row's cells."""
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
                raise FileError(f"{group.name} states another shape than {features} features × {cells} barcodes")
            if int(group["indptr"].shape[0]) != cells + 1 or group["data"].shape != group["indices"].shape:
                raise FileError(f"data, indices and indptr of {group.name} do not fit its {cells} barcodes")


class TenXFolder(TenXMatrix):
    """A folder (or the files of one prefix in it) of matrix.mtx, features.tsv or genes.tsv, and barcodes.tsv."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = files
        self.barcodes = _table(files["barcodes"])[0].to_numpy(object)
        self.n_obs = len(self.barcodes)
        self._x: sp.csr_matrix | None = None

    @property
    def stored_values(self) -> int:
        """How many values the matrix stores."""
        return self._declared()[2]

    def var(self) -> pd.DataFrame:
        """Read the table of features: from one column (names), two (ids, names) or more (types, positions)."""
        table = _table(self.files["features"])
        if table.shape[1] == 1:
            return pd.DataFrame(index=pd.Index(table[0], dtype=object))
        table = table.iloc[:, : len(_FEATURE_COLUMNS)]
        table.columns = list(_FEATURE_COLUMNS[: table.shape[1]])
        names = pd.Index(table.pop("gene_symbols"), dtype=object)
        return table.set_index(names).rename_axis(None)

    def matrices(self, rows: Sequence[np.ndarray], block_values: int) -> Iterator[sp.csr_matrix]:
        """Return the matrix of each row's cells; the whole file is read first."""
        x = self._whole()
        yield from (x[positions] for positions in rows)

    def _whole(self) -> sp.csr_matrix:
        if self._x is None:
            features = len(_table(self.files["features"]))
            shape = self._declared()[:2]
            if shape not in ((features, self.n_obs), (self.n_obs, features)):
                raise FileError(
                    f"{self.files['matrix']} is {shape[0]} × {shape[1]}, but there are {features} features and "
                    f"{self.n_obs} barcodes"
                )
            with _opened(self.files["matrix"]) as stream:
                x = sp.csr_matrix(scipy.io.mmread(stream))
            self._x = sp.csr_matrix(x.T) if shape == (features, self.n_obs) else x
        return self._x

    def _declared(self) -> tuple[int, int, int]:
        """Read the matrix's header, and refuse one that declares more entries than the file can contain."""
        name = self.files["matrix"]
        with _opened(name) as stream:
            if not stream.readline().startswith(b"%%MatrixMarket matrix coordinate"):
                raise FileError(f"{name} is not a sparse Matrix Market file")
            line = stream.readline()
            while line.startswith(b"%") or line.strip() == b"" != line:
                line = stream.readline()
        try:
            rows, columns, entries = map(int, line.split())
        except ValueError as exc:
            raise FileError(f"{name} does not state its shape: {line[:80]!r}") from exc
        ratio = MAX_GZIP_RATIO if name.endswith(".gz") else 1
        if entries * LEAST_ENTRY_BYTES > size_of(name) * ratio:
            raise FileError(f"{name} declares {entries:,} entries, more than {size_of(name):,} bytes can contain")
        return rows, columns, entries


def tenx_files(folder: str, prefix: str | None = None) -> dict[str, str]:
    """Find matrix, features and barcodes in a folder, also those of one prefix, as GEO names them.

    Raises
    ------
    ConfigError
        Some are missing, or there are several samples.
    """
    there = set(list_folder(folder))
    prefixes = sorted({match["prefix"] for name in there if (match := MATRIX_FILE.fullmatch(name))})
    if prefix is None:
        if len(prefixes) > 1:
            raise ConfigError(
                f"{folder} contains {len(prefixes)} samples ({', '.join(map(repr, prefixes[:5]))}): name each matrix "
                f"as an input, such as {folder}/{prefixes[0]}matrix.mtx.gz"
            )
        prefix = prefixes[0] if prefixes else ""
    found = {}
    parts = {"barcodes": ["barcodes.tsv"], "features": ["features.tsv", "genes.tsv"], "matrix": ["matrix.mtx"]}
    for part, names in parts.items():
        candidates = [f"{prefix}{name}{end}" for name in names for end in ("", ".gz")]
        matches = [name for name in candidates if name in there]
        if not matches:
            raise ConfigError(_no_tenx(folder, f"{prefix}{names[0]}.gz", there))
        found[part] = f"{folder.rstrip('/')}/{matches[0]}"
    return found


def _no_tenx(folder: str, lacking: str, there: set[str]) -> str:
    inside = sorted(name for name in there if name.lower().endswith((".h5ad", ".h5", ".zarr", ".h5mu")))
    hint = f"; for the files in it use '{folder}/*{inside[0][inside[0].rindex('.') :]}'" if inside else ""
    return f"{folder} is not a zarr store, and as a 10x folder it holds no {lacking}{hint}"


def _features(group: Any) -> pd.DataFrame:
    """Read the features of a 10x matrix. Probes are named by their gene, so that a gene's probes can be added up."""
    held = group.get("features", group)
    if "features" not in group:  # Cell Ranger 2, CellBender 0.1 and 0.2
        if "gene_names" not in held:
            raise FileError(f"{group.name} has neither features nor gene_names")
        columns = {"gene_ids": _text(held["genes"])} if "genes" in held else {}
        return _feature_table(columns, _text(held["gene_names"]), group.name)
    probes = "gene_id" in held and "gene_name" in held
    columns = {"gene_ids": _text(held["gene_id" if probes else "id"])} if "id" in held else {}
    if probes:
        columns["probe_ids"] = _text(held["id"])
    if "feature_type" in held:
        columns["feature_types"] = _text(held["feature_type"])
    names = _text(held["gene_name" if probes else "name"])
    for name, node in held.items():
        if isinstance(node, h5py.Dataset) and node.shape == names.shape and name not in _NAMED_OTHERWISE:
            columns[name] = _text(node)
    return _feature_table(columns, names, group.name)


def _feature_table(columns: dict[str, np.ndarray], names: np.ndarray, where: str) -> pd.DataFrame:
    for name, values in columns.items():
        if len(values) != len(names):
            raise FileError(f"{where}: {name} has {len(values)} values for {len(names)} features")
    return pd.DataFrame(columns, index=pd.Index(names, dtype=object))


def _text(node: Any) -> np.ndarray:
    if h5py.check_string_dtype(node.dtype):
        return np.asarray(node.asstr("utf-8")[...]).astype(object)
    return np.asarray(node[...]).astype(object if node.dtype.kind == "O" else node.dtype)


def _table(name: str) -> pd.DataFrame:
    """Read a table of tab-separated texts without a header; every value stays a string, "NA" too."""
    with _opened(name) as stream:
        try:
            return pd.read_csv(stream, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as exc:
            raise FileError(f"{name} is not a table of tab-separated values: {exc}") from exc


def _opened(name: str) -> Any:
    """Open a file, unpack if its content is gzip, whatever it is called."""
    raw = open_binary(name)
    start = raw.read(2)
    raw.seek(0)
    return gzip.open(raw) if start == b"\x1f\x8b" else io.BufferedReader(raw) if isinstance(raw, io.RawIOBase) else raw
