"""The genes that all rows of a sample keep, and their serialization.

`sample_statistics` computes the decisions in several passes over the rows; `pipeline` applies them to each row.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class BatchFit:
    """The standard deviation of each gene in one batch that seurat_v3's fit predicts.

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
        """Upper bound of each gene; larger values are clipped. float64, (genes,)."""
        return self.reg_std * np.sqrt(self.cells) + self.mean


@dataclass(frozen=True)
class Decisions:
    """The genes that the rows of a sample keep. Each pass adds to it, until it is `final`.

    Attributes
    ----------
    genes
        Names of the genes that pass the gene filter, in the order of the concatenated AnnData, (genes,).
    variable
        Which of them are variable, bool, (genes,); None if all are kept, or before the last pass.
    fits
        seurat_v3: the fit of each batch, between the second and the third pass.
    left_out
        Number of rows that could not be read and were not considered.
    final
        Whether no further pass is needed.
    error
        Why the sample cannot be preprocessed; empty if it can.
    """

    genes: np.ndarray
    variable: np.ndarray | None = None
    fits: Mapping[str, BatchFit] = field(default_factory=dict)
    left_out: int = 0
    final: bool = False
    error: str = ""

    @classmethod
    def failed(cls, error: str) -> Self:
        """Return the decisions of a sample that cannot be preprocessed."""
        return cls(np.zeros(0, object), final=True, error=error)

    @property
    def warning(self) -> str | None:
        """A warning if rows were not considered."""
        if not self.left_out:
            return None
        return f"{self.left_out} rows of the sample failed and were not used to select its genes"

    def to_bytes(self) -> bytes:
        """Return the decisions as an Arrow stream, about 5 bytes per gene."""
        columns = {"gene": self.genes, "variable": self.variable}
        for i, fit in enumerate(self.fits.values()):
            columns |= {f"mean {i}": fit.mean, f"reg_std {i}": fit.reg_std}
        present = {name: values for name, values in columns.items() if values is not None}
        notes = {"left_out": self.left_out, "final": self.final, "error": self.error}
        return write_columns(present, notes | {"batches": [(batch, fit.cells) for batch, fit in self.fits.items()]})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the decisions that `to_bytes` wrote."""
        columns, notes = read_columns(data)
        batches = notes.pop("batches")
        fits = {
            batch: BatchFit(cells, columns[f"mean {i}"], columns[f"reg_std {i}"])
            for i, (batch, cells) in enumerate(batches)
        }
        return cls(columns["gene"], columns.get("variable"), fits, **notes)


def write_columns(columns: Mapping[str, np.ndarray], notes: Mapping[str, object]) -> bytes:
    """Return arrays of equal length (numbers or strings) and notes (JSON) as a compressed Arrow stream."""
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    table = table.cast(pa.schema([f.with_type(pa.string()) if pa.types.is_null(f.type) else f for f in table.schema]))
    table = table.replace_schema_metadata({"notes": json.dumps(notes)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_columns(data: bytes) -> tuple[dict[str, np.ndarray], dict]:
    """Return the arrays and notes that `write_columns` wrote."""
    table = pa.ipc.open_stream(data).read_all()
    columns = {name: table[name].to_numpy() for name in table.column_names}
    return columns, json.loads(table.schema.metadata[b"notes"])
