"""The inference engine: embeddings of rows in static, contextual and cell mode.

The batch job, the endpoint and the Python API all use it, so a row gets the same embeddings everywhere.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scgpt_batch.errors import PayloadError, RowError
from scgpt_batch.inference.aggregate import CellAccumulator, FinishedRow, GeneAccumulator, RowAccumulator
from scgpt_batch.inference.batching import Batch, batches, prefetched
from scgpt_batch.inference.model_parameters import check_model_parameters
from scgpt_batch.inference.results import RowReport, RowResult
from scgpt_batch.inference.row_reader import PreparedRow, RowReader
from scgpt_batch.inference.sample_rows import Row, with_decisions
from scgpt_batch.io.rows import PAYLOAD_COLUMNS, is_empty
from scgpt_batch.models.device import choose_device
from scgpt_batch.models.interface import Encoder, Tokens
from scgpt_batch.models.scgpt.checkpoint import Checkpoint, build_model, checkpoint_digest
from scgpt_batch.models.scgpt.config import ModelConfig
from scgpt_batch.near_misses import GENE_CUTOFF, did_you_mean
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.sample_selection import Decisions
from scgpt_batch.preprocessing.tokens import ScgptTokenizer

logger = logging.getLogger(__name__)

CPU_TOKENS = 16_384  # tokens per batch on the CPU: about 200 MB of activations at d 512; larger batches are no faster
GPU_TOKENS = 131_072  # tokens per batch on a GPU with enough memory; larger batches are no faster
GPU_SHARE = 0.5  # share of the free GPU memory that a batch may use
NAMED = 20  # maximum number of genes that a warning names


class Embedder:
    """Computes embeddings with one checkpoint. Thread-safe; the device computes one batch at a time.

    The weights are read when they are first needed. Static mode without vectors only needs the vocabulary.

    Parameters
    ----------
    checkpoint
        The checkpoint.
    device
        Device of the model, such as "cuda:0". Default: the GPU if there is one, else the CPU.
    roots
        Folders below which `input_data_path` may name files. Default: none.

    Attributes
    ----------
    config, vocabulary, digest
        Dimensions, vocabulary and SHA-256 of the checkpoint.
    reader
        Reads and tokenizes rows for this model.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str | None = None, roots: Sequence[str] = ()) -> None:
        self.config = checkpoint.config
        self.vocabulary = checkpoint.vocabulary
        self.digest = checkpoint.digest
        self.device = device or choose_device()
        self.reader = RowReader(ScgptTokenizer(checkpoint.vocabulary, checkpoint.config.pad_value), roots)
        self._checkpoint = checkpoint
        self._requested = lru_cache(maxsize=4)(self._look_up)  # all rows of a request have the same `genes`
        self._models: dict[str, Encoder] = {}
        self._budget: int | None = None  # maximum tokens per batch; set when a model is on the device
        self._lock = threading.Lock()

    @cached_property
    def gene_table(self) -> np.ndarray:
        """Static embeddings of the whole vocabulary, float32, (tokens, d)."""
        with self._lock:
            table = self._model("float32").gene_vectors(torch.arange(len(self.vocabulary), device=self.device))
        return table.cpu().numpy()

    def embed(
        self,
        row: Mapping[str, Any],
        parameters: Parameters,
        *,
        min_coverage: float | None = None,
        with_vectors: bool = True,
    ) -> RowResult:
        """Return the embeddings of one row; see `embed_rows` for parameters and errors.

        Examples
        --------
        >>> embedder = load_embedder("checkpoints/scgpt-human")
        >>> result = embedder.embed(to_row(adata), Parameters(mode="cell", need_preprocess=False))
        >>> result.cell_embeddings.shape
        (2638, 512)
        """
        (result,) = self.embed_rows([row], parameters, min_coverage=min_coverage, with_vectors=with_vectors)
        return result

    def embed_rows(
        self,
        rows: Iterable[Mapping[str, Any]],
        parameters: Parameters,
        *,
        min_coverage: float | None = None,
        with_vectors: bool = True,
        sums: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Generator[RowResult, None, None]:
        """Return an iterator over the results of rows, in order. Small rows are computed together on the device.

        A thread reads and preprocesses rows a few batches ahead of the device. Close the iterator if you do not exhaust
        it.

        Parameters
        ----------
        rows
            Dicts with the payload columns of `io.rows`; other columns are ignored. In a list or tuple, rows with the
            same `sample_id` are one sample, as in the batch job. In any other iterable, each row is its own sample.
        parameters
            The parameters; `on_error` and `encoding` are ignored here.
        min_coverage
            Overrides `parameters.min_coverage`.
        with_vectors
            If False, static mode returns no vectors (they are rows of `gene_table`) and does not read the weights.
        sums
            In contextual mode, return sums over cells instead of means, so that rows of a sample can be added up.
        wanted
            Called before each batch; the iterator ends when it returns False.

        Returns
        -------
        Iterator with a result for each row. A RowError is not raised, but returned in the result's `error`.

        Raises
        ------
        ConfigError
            A parameter contradicts the checkpoint, or none of `genes` is in the vocabulary.
        """
        check_model_parameters(parameters, self.config, self.vocabulary)
        if min_coverage is not None:
            parameters = Parameters.create(parameters.model_dump(), {"min_coverage": min_coverage})
        decided = (
            with_decisions(self.reader, rows, parameters)
            if isinstance(rows, (list, tuple))
            else zip(rows, repeat(None))
        )
        return self._embed(decided, parameters, with_vectors, sums, wanted)

    def embed_sample_rows(
        self,
        rows: Iterable[tuple[Row, Decisions | None]],
        parameters: Parameters,
        *,
        with_vectors: bool = True,
        sums: bool = False,
    ) -> Generator[RowResult, None, None]:
        """Return results as `embed_rows` does, for pairs of a row and the decisions of its sample (or None)."""
        check_model_parameters(parameters, self.config, self.vocabulary)
        return self._embed(rows, parameters, with_vectors, sums, lambda: True)

    def _embed(
        self,
        rows: Iterable[tuple[Row, Decisions | None]],
        parameters: Parameters,
        with_vectors: bool,
        sums: bool,
        wanted: Callable[[], bool],
    ) -> Generator[RowResult, None, None]:
        prepared = (self._prepare(row, decisions, parameters, with_vectors, sums) for row, decisions in rows)
        return self._results(prepared, parameters, wanted)

    def _results(
        self, rows: Iterator[RowAccumulator | FinishedRow], parameters: Parameters, wanted: Callable[[], bool]
    ) -> Generator[RowResult, None, None]:
        pending: deque[RowAccumulator | FinishedRow] = deque()
        with closing(prefetched(batches(rows, lambda: self._tokens_per_batch(parameters.dtype)))) as prepared_batches:
            for batch in prepared_batches:
                if not wanted():
                    return
                pending.extend(batch.rows)
                if batch.pieces:
                    self._run(batch, parameters)
                while pending and not pending[0].remaining:
                    yield pending.popleft().result()

    def _prepare(
        self, row: Row, decisions: Decisions | None, parameters: Parameters, with_vectors: bool, sums: bool
    ) -> RowAccumulator | FinishedRow:
        """Return a row that is prepared for the device, or finished: in static mode, or after an error."""
        try:
            if is_empty(row) and not parameters.input_data_path:
                raise PayloadError(f"the row is empty: {', '.join(PAYLOAD_COLUMNS)} are null or missing")
            prepared = self.reader.prepare(row, parameters, decisions)
        except RowError as exc:
            return FinishedRow(RowResult(report=exc.report or RowReport(), error=exc))
        if parameters.mode == "cell":
            return CellAccumulator(prepared, self.config.embsize)
        wanted = self._wanted(prepared.genes, parameters)
        prepared = self._with_missing_genes(prepared, wanted, parameters)
        if parameters.mode == "contextual":
            return GeneAccumulator(prepared, wanted, sums=sums)
        return FinishedRow(self._static(prepared, wanted, with_vectors))

    def whole_vocabulary(self, parameters: Parameters) -> RowResult:
        """Return the static embeddings of the whole vocabulary, or of `parameters.genes` if given.

        Raises
        ------
        PayloadError
            The mode is not "static".
        ConfigError
            A parameter contradicts the checkpoint, or none of `genes` is in the vocabulary.
        """
        check_model_parameters(parameters, self.config, self.vocabulary)
        if parameters.mode != "static":
            raise PayloadError(f"mode {parameters.mode!r} needs cells: without input, only mode 'static' is possible")
        genes = np.array(self.vocabulary.tokens, dtype=object)
        kept = self._wanted(genes, parameters)
        unknown, _ = self._requested(parameters.genes)
        report = RowReport(warnings=tuple(filter(None, [unknown])))
        n_cells = np.zeros(int(kept.sum()), np.int32)
        return RowResult(genes[kept].tolist(), n_cells=n_cells, gene_embeddings=self.gene_table[kept], report=report)

    def _wanted(self, genes: np.ndarray, parameters: Parameters) -> np.ndarray:
        """Return which of the genes the parameter `genes` selects, bool, (genes,)."""
        if not parameters.genes:
            return np.ones(len(genes), bool)
        _, names = self._requested(parameters.genes)
        return np.fromiter((gene in names for gene in genes), bool, len(genes))

    def _look_up(self, genes: tuple[str, ...]) -> tuple[str | None, frozenset[str]]:
        """Return a warning about requested genes that are not in the vocabulary, and the other requested genes."""
        known = frozenset(gene for gene in genes if gene in self.vocabulary)
        unknown = [gene for gene in dict.fromkeys(genes) if gene not in known]
        warning = _genes_warning(unknown, "is not in the model's vocabulary", "are not in the model's vocabulary")
        return warning and warning + did_you_mean(unknown[0], self.vocabulary.tokens, cutoff=GENE_CUTOFF), known

    def _with_missing_genes(self, prepared: PreparedRow, wanted: np.ndarray, parameters: Parameters) -> PreparedRow:
        """Add warnings that name the requested genes without a vector in the result."""
        if not parameters.genes:
            return prepared
        unknown, known = self._requested(parameters.genes)
        if prepared.cells is not None:  # in contextual mode, only expressed genes have a vector
            wanted = wanted & prepared.cells.expressed
        embedded = set(prepared.genes[wanted])
        missing = [gene for gene in dict.fromkeys(parameters.genes) if gene in known and gene not in embedded]
        what = "no vector: not among the row's genes after preprocessing"
        warnings = (unknown, _genes_warning(missing, f"has {what}", f"have {what}"))
        report = replace(prepared.report, warnings=(*prepared.report.warnings, *filter(None, warnings)))
        return replace(prepared, report=report)

    def _static(self, prepared: PreparedRow, kept: np.ndarray, with_vectors: bool) -> RowResult:
        return RowResult(
            genes=prepared.genes[kept].tolist(),
            n_cells=prepared.n_cells[kept],
            gene_embeddings=self.gene_table[prepared.token_ids[kept]] if with_vectors else None,
            report=prepared.report,
        ).checked()

    def _run(self, batch: Batch, parameters: Parameters) -> None:
        """Compute a batch, and add the output of each piece to its row."""
        is_cell_mode = parameters.mode == "cell"
        with self._lock:
            output = self._forward(batch.tokens, parameters)
            sizes = [piece.last - piece.first if is_cell_mode else len(piece.tokens.genes) for piece in batch.pieces]
            for piece, part in zip(batch.pieces, output.split(sizes), strict=True):
                piece.row.add(piece, part)

    def _forward(self, tokens: Tokens, parameters: Parameters) -> torch.Tensor:
        """Return the output of the model. If memory runs out, compute halves, and use smaller batches from then on."""
        model = self._model(parameters.dtype)
        genes, values = torch.from_numpy(tokens.genes), torch.from_numpy(tokens.values)
        try:
            return model(genes, values, tokens.lengths.tolist(), cls_only=parameters.mode == "cell")
        except RuntimeError as exc:  # base class of torch.OutOfMemoryError; raised itself if CPU memory runs out
            if len(tokens.lengths) == 1 or not _is_out_of_memory(exc):
                raise
        self._budget = max(1, len(tokens.genes) // 2)
        logger.warning("out of memory with %d tokens; batches now have at most %d", len(tokens.genes), self._budget)
        if self.device != "cpu":
            torch.cuda.empty_cache()
        return torch.cat([self._forward(half, parameters) for half in tokens.halves()])

    def _tokens_per_batch(self, dtype: str) -> int:
        if self._budget is None:
            with self._lock:
                self._model(dtype)  # loaded first, because the budget depends on the memory that is still free
                self._budget = token_budget(torch.device(self.device), self.config)
                logger.info("up to %d tokens per batch on %s", self._budget, self.device)
        return self._budget

    def _model(self, dtype: str) -> Encoder:
        if dtype not in self._models:
            self._models[dtype] = build_model(self._checkpoint, device=self.device, dtype=getattr(torch, dtype))
        return self._models[dtype]


def token_budget(device: torch.device, config: ModelConfig) -> int:
    """Return the maximum number of tokens per batch: the fastest size, or less if little GPU memory is free."""
    if device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    # at the peak of a layer: x, its sum and norm; q, k, v and the attention output; the feed-forward activations
    bytes_per_token = 4 * (8 * config.embsize + 2 * config.d_hid)
    return max(1, min(GPU_TOKENS, int(free * GPU_SHARE) // bytes_per_token))


_EMBEDDERS: dict[tuple[str, str | None, tuple[str, ...]], Embedder] = {}
_LOADING = threading.Lock()


def load_embedder(
    folder: str | Path, *, digest: str | None = None, device: str | None = None, roots: Sequence[str] = ()
) -> Embedder:
    """Return the embedder of a checkpoint folder, created once per process. The weights are read when first needed.

    Parameters
    ----------
    folder
        The checkpoint folder.
    digest
        Digest of the checkpoint, if known, as for a registered model. The files are then not read to compute it now;
        it is verified when the weights are read.
    device, roots
        See `Embedder`.

    Raises
    ------
    CheckpointError
        args.json or vocab.json is missing, unreadable or not supported.

    Examples
    --------
    >>> embedder = load_embedder("checkpoints/scgpt-human")
    >>> genes = embedder.whole_vocabulary(Parameters(genes=["CD3D", "LYZ"]))
    >>> genes.gene_embeddings.shape
    (2, 512)
    """
    with _LOADING:
        key = (digest or checkpoint_digest(folder), device, tuple(roots))
        if key not in _EMBEDDERS:
            _EMBEDDERS[key] = Embedder(Checkpoint(folder, digest=digest), device=device, roots=roots)
            logger.info("checkpoint %s opened in process %d on %s", key[0][:12], os.getpid(), _EMBEDDERS[key].device)
        return _EMBEDDERS[key]


def opened_embedder(digest: str, device: str | None = None) -> Embedder | None:
    """Return the embedder of a checkpoint if this process has created it, else None."""
    return _EMBEDDERS.get((digest, device, ()))


def loads_in_this_process() -> int:
    """Return the number of embedders that this process has created, one for each checkpoint and device."""
    return len(_EMBEDDERS)


def _genes_warning(genes: Sequence[str], one: str, several: str) -> str | None:
    """Return a warning that names some of the genes, or None if there are none."""
    if not genes:
        return None
    named = ", ".join(genes[:NAMED]) + (", …" if len(genes) > NAMED else "")
    return f"{len(genes)} requested gene{'s'[: len(genes) > 1]} {several if len(genes) > 1 else one}: {named}"


def _is_out_of_memory(exc: RuntimeError) -> bool:
    return "out of memory" in str(exc) or "can't allocate memory" in str(exc) or "not enough memory" in str(exc)
