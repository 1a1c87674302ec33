"""What `embed --plan` expects: cells per second of common machines, and the size of the output.

CPU rates are measured (benchmarks/README.md), on two cores with AVX512 and AMX. GPU rates are calculated, not measured:
40 % of the card's peak rate. All are of the published model on cells of 1,024 genes. For other models they are scaled
by the number of operations.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from scgpt_batch.models.scgpt.config import ModelConfig
from scgpt_batch.parameters import Parameters

PUBLISHED = ModelConfig(embsize=512, nheads=8, d_hid=512, nlayers=12)
GENES_PER_CELL = 1_024
STATIC_CELLS = 2_700  # per second and core: 500 cells in 0.091 s on two cores
CORE_CELLS = {"float32": 2.0, "bfloat16": 4.3}  # per second, published model
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "T4": {"float32": 8.1},  # it has no bfloat16
    "A100": {"float32": 19.5, "bfloat16": 312},
    "H100": {"float32": 67, "bfloat16": 989},
}
SHARE_OF_PEAK = 0.4
MEASURED, CALCULATED = "measured", "calculated, not measured"

GENES_PER_ROW = 3_000  # assumed where parameters do not limit them
COMPRESSED = {"static": 0.02, "contextual": 0.93, "cell": 0.93}  # equal vectors are stored once, nearly
KEY_BYTES, ID_BYTES = 20, 33  # per line: its other columns, compressed, and embedding_id, which does not compress

TEN_MILLION = 10_000_000
UNITS = ((86_400, "days"), (3_600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class Capacity:
    """How fast a machine embeds with the run's model and parameters.

    Attributes
    ----------
    compute
        The machine.
    cells_per_second
        Its rate in steady work, without the start of Spark.
    source
        Where the rate comes from.
    hours_per_ten_million_cells
        What ten million cells take at this rate.
    """

    compute: str
    cells_per_second: float
    source: str
    hours_per_ten_million_cells: float


def capacity(compute: str, cells_per_second: float, source: str) -> Capacity:
    """Return the capacity of a machine, in rounded numbers."""
    hours = TEN_MILLION / cells_per_second / 3600
    return Capacity(compute, float(f"{cells_per_second:.3g}"), source, float(f"{hours:.3g}"))


def capacities(parameters: Parameters, config: ModelConfig, cores: int | None) -> Iterator[Capacity]:
    """Yield what these CPU cores (None: unknown) and common GPUs can do."""
    if parameters.mode == "static":
        if cores:
            yield capacity(_cores(cores), cores * STATIC_CELLS, MEASURED)
        return
    scale = flop_per_cell(PUBLISHED) / flop_per_cell(config)
    if cores:
        yield capacity(_cores(cores), cores * CORE_CELLS[parameters.dtype] * scale, MEASURED)
    for card, peak in PEAK_TFLOPS.items():
        if parameters.dtype in peak:
            one = SHARE_OF_PEAK * peak[parameters.dtype] * 1e12 / flop_per_cell(config)
            for n in (1, 8):
                yield capacity(f"{n} × {card}", n * one, CALCULATED)


def _cores(n: int) -> str:
    return f"{n} CPU core{'s' if n > 1 else ''}"


def flop_per_cell(config: ModelConfig) -> float:
    """Return the operations of the transformer for a cell of `GENES_PER_CELL` genes."""
    linear = 2 * (4 * config.embsize**2 + 2 * config.embsize * config.d_hid)
    attention = 4 * config.embsize * GENES_PER_CELL
    return GENES_PER_CELL * config.nlayers * (linear + attention)


def output_bytes(parameters: Parameters, d: int, *, rows: int, cells: int) -> int:
    """Estimate the size of the embeddings on disk; with `group_by`, of one group."""
    genes = len(parameters.genes) or (parameters.need_preprocess and parameters.subset_hvg) or GENES_PER_ROW
    vectors = cells if parameters.mode == "cell" else rows * genes
    keys = ID_BYTES + KEY_BYTES * (parameters.mode != "static")
    return round(vectors * (4 * d * COMPRESSED[parameters.mode] + keys))


def duration(seconds: float) -> str:
    """Return a time in the largest unit that gives at least one: `3.5 h`."""
    size, unit = next((unit for unit in UNITS if seconds >= unit[0]), UNITS[-1])
    return f"{seconds / size:,.1f} {unit}" if size > 1 else f"{seconds:,.0f} {unit}"


def rate(cells_per_second: float) -> str:
    """Return a rate in three digits."""
    return f"{cells_per_second:,.0f}" if cells_per_second >= 100 else f"{cells_per_second:.3g}"


def size(n_bytes: float) -> str:
    """Return a number of bytes in GB or MB."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"
