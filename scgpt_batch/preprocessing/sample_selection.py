"""What a sample's rows share: the genes that are kept, decided over all of its cells.

`samples` makes decisions, pass by pass; `preprocess` applies them to a row.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class BatchFit:
    """The standard deviation that seurat_v3 expects of each gene in one batch.

    Attributes
    ----------
    cells
        Cells of the batch.
    mean, reg_std
        Mean and regularised standard deviation of each gene, float64, (genes,).
    """

    cells: int
    mean: np.ndarray
    reg_std: np.ndarray

    @property
    def bounds(self) -> np.ndarray:
        """Largest value of each gene that counts, float64, (genes,)."""
        return self.reg_std * np.sqrt(self.cells) + self.mean


@dataclass(frozen=True)
class Decisions:
    """The genes that a sample's rows keep. Grows from pass to pass until it is `final`.

    Attributes
    ----------
    genes
        Names of the genes that pass the gene filter, in the joined AnnData's order, (genes,).
    variable
        Mask of the variable genes among them, (genes,); None: no choice was made, or not yet.
    fits
        seurat_v3: each batch's fit, between the pass that makes them and the one that uses them.
    left_out
        Rows of the sample that could not be read and so had no say.
    error
        Why the sample has no answer; "" when well.
    """

    genes: np.ndarray
    variable: np.ndarray | None = None
    fits: Mapping[str, BatchFit] = field(default_factory=dict)
    left_out: int = 0
    final: bool = False
    error: str = ""

    @classmethod
    def failed(cls, error: str) -> Self:
        """Decide that no row of the sample can be answered."""
        return cls(np.zeros(0, object), final=True, error=error)

    @property
    def warning(self) -> str | None:
        """Say that rows had no part in the decisions."""
        return f"{self.left_out} rows of the sample had no part in choosing its genes" if self.left_out else None

    def to_bytes(self) -> bytes:
        """Write as an Arrow stream; some 5 bytes a gene."""
        columns = {"gene": self.genes, "variable": self.variable}
        for i, fit in enumerate(self.fits.values()):
            columns |= {f"mean {i}": fit.mean, f"reg_std {i}": fit.reg_std}
        held = {name: values for name, values in columns.items() if values is not None}
        notes = {"left_out": self.left_out, "final": self.final, "error": self.error}
        return write_columns(held, notes | {"batches": [(batch, fit.cells) for batch, fit in self.fits.items()]})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote."""
        columns, notes = read_columns(data)
        batches = notes.pop("batches")
        fits = {
            batch: BatchFit(cells, columns[f"mean {i}"], columns[f"reg_std {i}"])
            for i, (batch, cells) in enumerate(batches)
        }
        return cls(columns["gene"], columns.get("variable"), fits, **notes)


def write_columns(columns: Mapping[str, np.ndarray], notes: Mapping[str, object]) -> bytes:
    """Write arrays of one length, of numbers or strings, and notes in JSON as a compressed Arrow stream."""
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    table = table.cast(pa.schema([f.with_type(pa.string()) if pa.types.is_null(f.type) else f for f in table.schema]))
    table = table.replace_schema_metadata({"notes": json.dumps(notes)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_columns(data: bytes) -> tuple[dict[str, np.ndarray], dict]:
    """Read the arrays and notes that `write_columns` wrote."""
    table = pa.ipc.open_stream(data).read_all()
    columns = {name: table[name].to_numpy() for name in table.column_names}
    return columns, json.loads(table.schema.metadata[b"notes"])
