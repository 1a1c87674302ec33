"""Rows in, embeddings out: static, contextual and cell mode. Knows the model and preprocessing, no MLflow, no Spark.

Every path to an embedding (batch job, endpoint, Python) ends here, so a row gets the same numbers everywhere.
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

from scgpt_batch.errors import ConfigError, PayloadError, RowError
from scgpt_batch.inference.aggregate import CellAccumulator, FinishedRow, GeneAccumulator, RowAccumulator
from scgpt_batch.inference.batching import Batch, batches, prefetched
from scgpt_batch.inference.results import RowReport, RowResult
from scgpt_batch.inference.row_reader import PreparedRow, RowReader
from scgpt_batch.inference.sample_rows import Row, with_decisions
from scgpt_batch.io.rows import PAYLOAD_COLUMNS, is_empty
from scgpt_batch.models.interface import Encoder, Tokens
from scgpt_batch.models.scgpt import Checkpoint, ModelConfig, Vocabulary, build_model, checkpoint_digest
from scgpt_batch.near_misses import GENE_CUTOFF, did_you_mean
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.sample_selection import Decisions
from scgpt_batch.preprocessing.tokens import ScgptTokenizer

logger = logging.getLogger(__name__)

CPU_TOKENS = 16_384  # in a batch: some 200 MB of activations at d 512; larger ones are no faster
GPU_TOKENS = 131_072  # likewise, where memory allows
GPU_SHARE = 0.5  # of the free memory that a batch may take
NAMED = 20  # genes that a warning names


class Embedder:
    """A loaded checkpoint that answers rows. Safe to call from several threads: one batch at a time is on the device.

    Weights are read when a vector is first asked for: static genes without vectors need the vocabulary alone.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str | None = None, roots: Sequence[str] = ()) -> None:
        """Keep the checkpoint; `device` None means the GPU if there is one; `roots` are for `input_data_path`."""
        self.config = checkpoint.config
        self.vocabulary = checkpoint.vocabulary
        self.digest = checkpoint.digest
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.reader = RowReader(ScgptTokenizer(checkpoint.vocabulary, checkpoint.config.pad_value), roots)
        self._checkpoint = checkpoint
        self._requested = lru_cache(maxsize=4)(self._look_up)  # the genes of a request are those of each of its rows
        self._models: dict[str, Encoder] = {}
        self._budget: int | None = None  # tokens of a batch; known once a model is on the device
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
        """Answer one row, as `embed_rows` does."""
        (answer,) = self.embed_rows([row], parameters, min_coverage=min_coverage, with_vectors=with_vectors)
        return answer

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
        """Answer rows in their order, small ones together on the device.

        Rows are drawn, read and preprocessed in a thread, a few batches ahead of the device; close the iterator if it
        is not drawn to its end.

        Parameters
        ----------
        rows
            Each has the payload columns of `io.rows`. In a list or tuple, rows that share a `sample_id` are one
            sample, as in the batch job; each row of an iterator is a sample by itself. Other columns are ignored.
        parameters
            As for the PyFunc; `on_error` and `encoding` are the caller's to act on.
        min_coverage
            If given, takes the place of `parameters.min_coverage`.
        with_vectors
            False leaves out static mode's vectors, which are rows of `gene_table`: the weights are not read.
        sums
            Contextual mode: sums over the cells instead of means, to be added up over the rows of a sample.
        wanted
            Asked before each batch; answers end early once it returns False.

        Returns
        -------
        An answer for each row; a RowError is returned in the answer's `error`, never raised.

        Raises
        ------
        ConfigError
            The parameters state another model than the checkpoint's.
        """
        check_model_parameters(parameters, self.config, self.vocabulary)
        if min_coverage is not None:
            parameters = Parameters.create(parameters.model_dump(), {"min_coverage": min_coverage})
        given = (
            with_decisions(self.reader, rows, parameters)
            if isinstance(rows, (list, tuple))
            else zip(rows, repeat(None))
        )
        return self._embed(given, parameters, with_vectors, sums, wanted)

    def embed_sample_rows(
        self,
        rows: Iterable[tuple[Row, Decisions | None]],
        parameters: Parameters,
        *,
        with_vectors: bool = True,
        sums: bool = False,
    ) -> Generator[RowResult, None, None]:
        """Answer rows as `embed_rows` does, each with the decisions of its sample, or None."""
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
        works = (self._work(row, decisions, parameters, with_vectors, sums) for row, decisions in rows)
        return self._answers(works, parameters, wanted)

    def _answers(
        self, works: Iterator[RowAccumulator | FinishedRow], parameters: Parameters, wanted: Callable[[], bool]
    ) -> Generator[RowResult, None, None]:
        waiting: deque[RowAccumulator | FinishedRow] = deque()
        with closing(prefetched(batches(works, lambda: self._tokens_a_batch(parameters.dtype)))) as ready:
            for batch in ready:
                if not wanted():
                    return
                waiting.extend(batch.works)
                if batch.pieces:
                    self._run(batch, parameters)
                while waiting and not waiting[0].remaining:
                    yield waiting.popleft().answer()

    def _work(
        self, row: Row, decisions: Decisions | None, parameters: Parameters, with_vectors: bool, sums: bool
    ) -> RowAccumulator | FinishedRow:
        """Prepare a row for the device; static mode and errors are answered at once."""
        try:
            if is_empty(row) and not parameters.input_data_path:
                raise PayloadError(f"the row is empty: {', '.join(PAYLOAD_COLUMNS)} are null or not given")
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
        """Return the static vectors of all tokens, or of the `genes` asked for: the answer to a call without input.

        Raises
        ------
        PayloadError
            The mode needs cells.
        ConfigError
            The parameters state another model than the checkpoint's, or genes of which it knows none.
        """
        check_model_parameters(parameters, self.config, self.vocabulary)
        if parameters.mode != "static":
            raise PayloadError(f"mode {parameters.mode!r} needs cells: without input, only mode 'static' has an answer")
        genes = np.array(self.vocabulary.tokens, dtype=object)
        kept = self._wanted(genes, parameters)
        unknown, _ = self._requested(parameters.genes)
        report = RowReport(warnings=tuple(filter(None, [unknown])))
        n_cells = np.zeros(int(kept.sum()), np.int32)
        return RowResult(genes[kept].tolist(), n_cells=n_cells, gene_embeddings=self.gene_table[kept], report=report)

    def _wanted(self, genes: np.ndarray, parameters: Parameters) -> np.ndarray:
        """Mask the genes that the caller wants answered."""
        if not parameters.genes:
            return np.ones(len(genes), bool)
        _, names = self._requested(parameters.genes)
        return np.fromiter((gene in names for gene in genes), bool, len(genes))

    def _look_up(self, genes: tuple[str, ...]) -> tuple[str | None, frozenset[str]]:
        """Return what to say of requested genes that are unknown, and the others."""
        known = frozenset(gene for gene in genes if gene in self.vocabulary)
        unknown = [gene for gene in dict.fromkeys(genes) if gene not in known]
        warning = _genes_warning(unknown, "is not in the model's vocabulary", "are not in the model's vocabulary")
        return warning and warning + did_you_mean(unknown[0], self.vocabulary.tokens, cutoff=GENE_CUTOFF), known

    def _with_missing_genes(self, prepared: PreparedRow, wanted: np.ndarray, parameters: Parameters) -> PreparedRow:
        """Add warnings that name the requested genes without a vector in the answer."""
        if not parameters.genes:
            return prepared
        unknown, known = self._requested(parameters.genes)
        if prepared.cells is not None:  # a contextual mean needs a cell that expresses the gene
            wanted = wanted & prepared.cells.expressed
        answered = set(prepared.genes[wanted])
        missing = [gene for gene in dict.fromkeys(parameters.genes) if gene in known and gene not in answered]
        what = "no vector: not among the row's genes after preprocessing"
        told = (unknown, _genes_warning(missing, f"has {what}", f"have {what}"))
        report = replace(prepared.report, warnings=(*prepared.report.warnings, *filter(None, told)))
        return replace(prepared, report=report)

    def _static(self, prepared: PreparedRow, kept: np.ndarray, with_vectors: bool) -> RowResult:
        return RowResult(
            genes=prepared.genes[kept].tolist(),
            n_cells=prepared.n_cells[kept],
            gene_embeddings=self.gene_table[prepared.token_ids[kept]] if with_vectors else None,
            report=prepared.report,
        ).checked()

    def _run(self, batch: Batch, parameters: Parameters) -> None:
        """Run a batch and hand each row what is its own."""
        cells = parameters.mode == "cell"
        with self._lock:
            output = self._forward(batch.tokens, parameters)
            sizes = [piece.last - piece.first if cells else len(piece.tokens.genes) for piece in batch.pieces]
            for piece, part in zip(batch.pieces, output.split(sizes), strict=True):
                piece.work.add(piece, part)

    def _forward(self, tokens: Tokens, parameters: Parameters) -> torch.Tensor:
        """Run the model; where memory does not suffice, run both halves of the cells and ask for half from now on."""
        model = self._model(parameters.dtype)
        genes, values = torch.from_numpy(tokens.genes), torch.from_numpy(tokens.values)
        try:
            return model(genes, values, tokens.lengths.tolist(), cls_only=parameters.mode == "cell")
        except RuntimeError as exc:  # torch.OutOfMemoryError is one, and the CPU's has no class of its own
            if len(tokens.lengths) == 1 or not _is_out_of_memory(exc):
                raise
        self._budget = max(1, len(tokens.genes) // 2)
        logger.warning("out of memory with %d tokens: %d a batch from now on", len(tokens.genes), self._budget)
        if self.device != "cpu":
            torch.cuda.empty_cache()
        return torch.cat([self._forward(half, parameters) for half in tokens.halves()])

    def _tokens_a_batch(self, dtype: str) -> int:
        if self._budget is None:
            with self._lock:
                self._model(dtype)  # what it takes is not free
                self._budget = token_budget(torch.device(self.device), self.config)
                logger.info("%d tokens a batch on %s", self._budget, self.device)
        return self._budget

    def _model(self, dtype: str) -> Encoder:
        if dtype not in self._models:
            self._models[dtype] = build_model(self._checkpoint, device=self.device, dtype=getattr(torch, dtype))
        return self._models[dtype]


def token_budget(device: torch.device, config: ModelConfig) -> int:
    """Return how many tokens to run at once: a number that suffices to be fast, if so much memory is free."""
    if device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    # at the peak of a layer: x, its sum and norm, q, k, v and what they attend to, the feed-forward layer's inside
    bytes_a_token = 4 * (8 * config.embsize + 2 * config.d_hid)
    return max(1, min(GPU_TOKENS, int(free * GPU_SHARE) // bytes_a_token))


def check_model_parameters(parameters: Parameters, config: ModelConfig, vocabulary: Vocabulary) -> None:
    """Reject parameters of another model than the checkpoint, or genes of which it knows none (ConfigError)."""
    names = {"embsize": "embsize", "nhead": "nheads", "d_hid": "d_hid", "nlayers": "nlayers"}
    for name, attribute in {**names, "n_layers_cls": "n_layers_cls"}.items():
        stated, has = getattr(parameters, name), getattr(config, attribute)
        if stated is not None and stated != has:
            raise ConfigError(f"{name} is {stated}, but the checkpoint has {has}: leave it out, or take that model")
    if parameters.genes and not any(gene in vocabulary for gene in parameters.genes):
        end = did_you_mean(parameters.genes[0], vocabulary.tokens, cutoff=GENE_CUTOFF)
        raise ConfigError(
            f"genes: none of the {len(parameters.genes)} names is in the model's vocabulary (first: "
            f"{parameters.genes[0]!r}{end}); give the names that the vocabulary uses, e.g. human gene symbols"
        )


_EMBEDDERS: dict[tuple[str, str | None, tuple[str, ...]], Embedder] = {}
_LOADING = threading.Lock()


def load_embedder(
    folder: str | Path, *, digest: str | None = None, device: str | None = None, roots: Sequence[str] = ()
) -> Embedder:
    """Return the embedder of a checkpoint folder, made once per process; it reads the weights when it needs them.

    Parameters
    ----------
    digest
        The checkpoint's digest where it is known (a registered model states it): it saves reading the files again,
        and files that turn out to have another are refused when the weights are read.

    Raises
    ------
    CheckpointError
        args.json or vocab.json is missing, unreadable or not built here.
    """
    with _LOADING:
        key = (digest or checkpoint_digest(folder), device, tuple(roots))
        if key not in _EMBEDDERS:
            _EMBEDDERS[key] = Embedder(Checkpoint(folder, digest=digest), device=device, roots=roots)
            logger.info("model %s opened in process %d on %s", key[0][:12], os.getpid(), _EMBEDDERS[key].device)
        return _EMBEDDERS[key]


def opened_embedder(digest: str, device: str | None = None) -> Embedder | None:
    """Return the embedder of a checkpoint that this process has opened; None if it has not."""
    return _EMBEDDERS.get((digest, device, ()))


def loads_in_this_process() -> int:
    """How many models this process has loaded: one for each checkpoint, however many requests."""
    return len(_EMBEDDERS)


def _genes_warning(genes: Sequence[str], one: str, several: str) -> str | None:
    """Name some requested genes and what is the matter with them; None where there are none."""
    if not genes:
        return None
    named = ", ".join(genes[:NAMED]) + (", …" if len(genes) > NAMED else "")
    return f"{len(genes)} requested gene{'s'[: len(genes) > 1]} {several if len(genes) > 1 else one}: {named}"


def _is_out_of_memory(exc: RuntimeError) -> bool:
    return "out of memory" in str(exc) or "can't allocate memory" in str(exc) or "not enough memory" in str(exc)
