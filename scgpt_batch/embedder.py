"""Rows in, embeddings out: static, contextual and cell mode. Knows the model and preprocessing, no MLflow, no Spark.

Every path to an embedding (batch job, endpoint, Python) ends here, so a row gets the same numbers everywhere.
"""

import base64
import logging
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch

from scgpt_batch.anndata_rows import from_row, is_empty
from scgpt_batch.errors import (
    CheckpointError,
    ConfigError,
    LowCoverage,
    NonFiniteOutput,
    PayloadError,
    PreprocessError,
    RowError,
)
from scgpt_batch.model import Checkpoint, ModelConfig, ScGPT, checkpoint_digest, load_checkpoint
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocess import (
    COLLATOR_BINS,
    Tokens,
    bin_values,
    binned_layer,
    cell_noise,
    gene_hash,
    gene_names,
    group_labels,
    preprocess,
    sample_long_cells,
    tokenize,
    value_warning,
)

logger = logging.getLogger(__name__)

BATCH_TOKENS = 16_384  # tokens that run through the model at once: some 200 MB of activations at d 512
CELL_BLOCK = 512  # cells that are made dense-sized intermediates of at once (bins, tokens)


@dataclass(frozen=True)
class RowReport:
    """What was seen of a row on the way: counts for the ledger, warnings for a person."""

    cells: int = 0  # that were embedded or averaged
    genes_in: int = 0
    genes_matched: int = 0  # names found in the vocabulary
    coverage: float | None = None  # share of the row's counts that these carry
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The embeddings of one row, or the error that stood in the way.

    Attributes
    ----------
    genes, groups, n_cells, gene_embeddings
        Static and contextual mode: one entry per gene (per group and gene with `group_by`); cells that carry the
        gene; float32, (genes, d).
    cell_ids, cell_embeddings
        Cell mode: the cells' names; float32, (cells, d), rows of norm 1.
    report, error
        What was seen of the row; the RowError, or None when well.
    """

    genes: Sequence[str] | None = None
    groups: Sequence[str] | None = None
    n_cells: np.ndarray | None = None
    gene_embeddings: np.ndarray | None = None
    cell_ids: Sequence[str] | None = None
    cell_embeddings: np.ndarray | None = None
    report: RowReport = field(default_factory=RowReport)
    error: RowError | None = None

    @property
    def embeddings(self) -> np.ndarray | None:
        """The answer's vectors, of genes or of cells, whichever the mode gives."""
        return self.gene_embeddings if self.gene_embeddings is not None else self.cell_embeddings

    def base64(self, encoding: str) -> str:
        """The vectors as one little-endian, row-major base64 string."""
        dtype = {"float32_base64": "<f4", "float16_base64": "<f2"}[encoding]
        vectors = self.embeddings
        return "" if vectors is None else base64.b64encode(vectors.astype(dtype).tobytes()).decode()


@dataclass(frozen=True)
class _Prepared:
    """A row, read and preprocessed: what the model part needs of it."""

    cell_ids: np.ndarray
    genes: np.ndarray  # names of the vocabulary's genes in the row, (G,)
    token_ids: np.ndarray  # their ids, (G,)
    counts: sp.csr_matrix  # X after filters, cells × G
    binned: sp.csr_matrix | None  # bins, cells × G; None in static mode
    noise: np.ndarray | None  # per entry of `binned`, to sample long cells; None when none is long
    groups: np.ndarray | None  # each cell's group
    report: RowReport


class Embedder:
    """A loaded checkpoint that answers rows. Safe to call from several threads: one row at a time is on the device."""

    def __init__(self, checkpoint: Checkpoint, *, device: str | None = None, roots: Sequence[str] = ()) -> None:
        """Keep the checkpoint; `device` None means the GPU if there is one; `roots` are for `input_data_path`."""
        self.config = checkpoint.config
        self.vocabulary = checkpoint.vocabulary
        self.digest = checkpoint.digest
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.roots = tuple(roots)
        self._checkpoint = checkpoint
        self._models: dict[str, ScGPT] = {}
        self._lock = threading.Lock()

    @cached_property
    def gene_table(self) -> np.ndarray:
        """Static embeddings of the whole vocabulary, float32, (tokens, d)."""
        with self._lock:
            table = self._model("float32").gene_vectors(torch.arange(len(self.vocabulary), device=self.device))
        return table.cpu().numpy()

    def embed(self, row: Mapping[str, Any], parameters: Parameters, *, min_coverage: float = 0.0) -> Answer:
        """Answer one row.

        Parameters
        ----------
        row
            The payload columns of `anndata_rows`; others are not looked at.
        parameters
            As for the PyFunc; `on_error` and `encoding` are the caller's to act on.
        min_coverage
            Least share of the row's counts in genes of the vocabulary.

        Returns
        -------
        The embeddings; a RowError is returned in the answer's `error`, never raised.

        Raises
        ------
        ConfigError
            The parameters state another model than the checkpoint's.
        """
        check_model_parameters(parameters, self.config)
        report = RowReport()
        try:
            if is_empty(row) and not parameters.need_preprocess and not parameters.input_data_path:
                return self._whole_vocabulary(parameters)
            prepared = self._prepare(row, parameters, min_coverage)
            report = prepared.report
            answer = self._answer(prepared, parameters)
            _refuse_non_finite(answer)
            return answer
        except RowError as exc:
            return Answer(report=getattr(exc, "report", report), error=exc)

    def _prepare(self, row: Mapping[str, Any], parameters: Parameters, min_coverage: float) -> _Prepared:
        """Read and preprocess; what libraries raise for a row's data costs this row, not the others."""
        try:
            return self._read_and_preprocess(row, parameters, min_coverage)
        except (RowError, MemoryError):
            raise
        except Exception as exc:
            logger.exception("a row could not be prepared")
            raise PreprocessError(f"{type(exc).__name__}: {exc}") from exc

    def _answer(self, prepared: _Prepared, parameters: Parameters) -> Answer:
        if parameters.mode == "static":
            return self._static(prepared, parameters)
        if parameters.mode == "contextual":
            return self._contextual(prepared, parameters)
        return self._cells(prepared, parameters)

    def _whole_vocabulary(self, parameters: Parameters) -> Answer:
        if parameters.mode != "static":
            raise PayloadError(f"the row is empty: mode {parameters.mode!r} needs cells")
        genes = np.array(self.vocabulary.tokens, dtype=object)
        kept = _restrict(genes, parameters)
        n_cells = np.zeros(int(kept.sum()), np.int32)
        return Answer(genes=genes[kept].tolist(), n_cells=n_cells, gene_embeddings=self.gene_table[kept])

    def _read_and_preprocess(self, row: Mapping[str, Any], parameters: Parameters, min_coverage: float) -> _Prepared:
        adata = self._read(row, parameters)
        names, name_warning = gene_names(adata.var, self.vocabulary)
        report = self._coverage(adata, names, parameters, name_warning)
        try:
            _refuse_low_coverage(report, min_coverage, name_warning)
            adata.var["_name"] = names
            if parameters.need_preprocess:
                adata = preprocess(adata, parameters, genes_only=parameters.mode == "static")
            return self._select(adata, parameters, report)
        except RowError as exc:
            exc.report = report  # type: ignore[attr-defined]  # the ledger tells it of failed rows too
            raise

    def _read(self, row: Mapping[str, Any], parameters: Parameters) -> ad.AnnData:
        if parameters.input_data_path and is_empty(row):
            adata = _read_file(allowed_path(parameters.input_data_path, self.roots), parameters.use_key)
        else:
            adata = from_row(row)
        # one type, so that both row formats and JSON give the same numbers
        with np.errstate(over="ignore"):
            adata.X = adata.X.astype(np.float32)
        if not np.isfinite(adata.X.data).all():
            raise PayloadError(f"X holds values beyond float32's {np.finfo(np.float32).max:.2g}")
        return adata

    def _coverage(
        self, adata: ad.AnnData, names: np.ndarray, parameters: Parameters, name_warning: str | None
    ) -> RowReport:
        known = self.vocabulary.ids(names) >= 0
        per_gene = np.asarray(adata.X.sum(axis=0, dtype=np.float64)).ravel()
        total = per_gene.sum()
        told = [name_warning]
        if not parameters.data_is_binned:
            told.append(value_warning(adata, data_is_raw=parameters.data_is_raw))
        return RowReport(
            cells=adata.n_obs,
            genes_in=adata.n_vars,
            genes_matched=int(known.sum()),
            coverage=float(per_gene[known].sum() / total) if total else 0.0,
            warnings=tuple(w for w in told if w),
        )

    def _select(self, adata: ad.AnnData, parameters: Parameters, report: RowReport) -> _Prepared:
        """Keep the vocabulary's genes; bin before that where upstream's Preprocessor does."""
        names = adata.var["_name"].to_numpy(dtype=object)
        ids = self.vocabulary.ids(names)
        binned = None
        if parameters.mode != "static":
            matrix = binned_layer(adata, parameters) if parameters.need_preprocess else adata.X
            if parameters.need_preprocess:
                matrix = _binned(matrix, names, parameters, parameters.binning)
        columns, extra_warning = _one_column_a_token(ids, adata.X)
        if not len(columns):
            raise PreprocessError("no gene that survives preprocessing is in the vocabulary")
        if parameters.mode != "static":
            binned = sp.csr_matrix(matrix[:, columns])
            if not (parameters.need_preprocess or parameters.data_is_binned):
                binned = _binned(binned, names[columns], parameters, COLLATOR_BINS)
        extra = [w for w in (extra_warning, _empty_cells_warning(binned)) if w]
        report = replace(report, cells=adata.n_obs, warnings=(*report.warnings, *extra))
        return _Prepared(
            cell_ids=adata.obs_names.to_numpy(dtype=object),
            genes=names[columns],
            token_ids=ids[columns],
            counts=sp.csr_matrix(adata.X[:, columns]),
            binned=binned,
            noise=None if binned is None else _sampling_noise(binned, names[columns], parameters),
            groups=group_labels(adata, parameters.group_by) if parameters.group_by else None,
            report=report,
        )

    def _static(self, prepared: _Prepared, parameters: Parameters) -> Answer:
        kept = _restrict(prepared.genes, parameters)
        return Answer(
            genes=prepared.genes[kept].tolist(),
            n_cells=prepared.counts.getnnz(axis=0)[kept].astype(np.int32),
            gene_embeddings=self.gene_table[prepared.token_ids[kept]],
            report=prepared.report,
        )

    def _contextual(self, prepared: _Prepared, parameters: Parameters) -> Answer:
        """Average the transformer's output of each gene over the cells (of each group) that carry it."""
        labels, group_of = np.unique(
            prepared.groups if prepared.groups is not None else np.array([""] * len(prepared.cell_ids), object),
            return_inverse=True,
        )
        n_genes, d = len(prepared.genes), self.config.embsize
        # position of each token id among the row's genes
        place = np.zeros(len(self.vocabulary), np.int64)
        place[prepared.token_ids] = np.arange(n_genes)
        sums = torch.zeros(len(labels) * n_genes, d, device=self.device)
        n_cells = np.zeros(len(labels) * n_genes, np.int64)
        for cells, tokens in self._batches(prepared, parameters):
            output = self._run(tokens, parameters)
            is_gene = torch.ones(len(tokens.genes), dtype=torch.bool)
            is_gene[_starts(tokens.lengths)] = False  # <cls>
            slot = np.repeat(group_of[cells], tokens.lengths) * n_genes + place[tokens.genes]
            slot = slot[is_gene.numpy()]
            sums.index_add_(0, torch.from_numpy(slot).to(self.device), output[is_gene.to(self.device)])
            n_cells += np.bincount(slot, minlength=len(n_cells))
        carried = (n_cells > 0) & np.tile(_restrict(prepared.genes, parameters), len(labels))
        where = np.flatnonzero(carried)
        means = sums[torch.from_numpy(where).to(self.device)].cpu().numpy() / n_cells[where, None]
        return Answer(
            genes=prepared.genes[where % n_genes].tolist(),
            groups=labels[where // n_genes].tolist() if prepared.groups is not None else None,
            n_cells=n_cells[where].astype(np.int32),
            gene_embeddings=means.astype(np.float32),
            report=prepared.report,
        )

    def _cells(self, prepared: _Prepared, parameters: Parameters) -> Answer:
        """Take each cell's `<cls>` output, L2-normalised, as upstream's `embed_data` does."""
        vectors = np.empty((len(prepared.cell_ids), self.config.embsize), np.float32)
        for cells, tokens in self._batches(prepared, parameters):
            starts = torch.from_numpy(_starts(tokens.lengths)).to(self.device)
            vectors[cells] = self._run(tokens, parameters)[starts].cpu().numpy()
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return Answer(cell_ids=prepared.cell_ids.tolist(), cell_embeddings=vectors, report=prepared.report)

    def _run(self, tokens: Tokens, parameters: Parameters) -> torch.Tensor:
        with self._lock:
            model = self._model(parameters.dtype)
            genes, values = (torch.from_numpy(x).to(self.device) for x in (tokens.genes, tokens.values))
            return model(genes, values, tokens.lengths.tolist()).float()

    def _model(self, dtype: str) -> ScGPT:
        if dtype not in self._models:
            self._models[dtype] = ScGPT.from_checkpoint(
                self._checkpoint, device=self.device, dtype=getattr(torch, dtype)
            )
        return self._models[dtype]

    def _batches(self, prepared: _Prepared, parameters: Parameters) -> Iterator[tuple[np.ndarray, Tokens]]:
        """Yield cells in batches of bounded tokens, sorted by length: their positions in the row, their tokens."""
        assert prepared.binned is not None
        lengths = np.minimum(np.diff(prepared.binned.indptr), parameters.max_length - 1) + 1
        order = np.argsort(lengths, kind="stable")
        ends = np.cumsum(lengths[order])
        first = 0
        while first < len(order):
            budget = (ends[first - 1] if first else 0) + BATCH_TOKENS
            last = min(max(int(np.searchsorted(ends, budget, side="right")), first + 1), first + CELL_BLOCK)
            yield order[first:last], self._tokens(prepared, order[first:last], parameters)
            first = last

    def _tokens(self, prepared: _Prepared, cells: np.ndarray, parameters: Parameters) -> Tokens:
        assert prepared.binned is not None
        block = prepared.binned[cells]
        keep = None
        if prepared.noise is not None:
            noise = sp.csr_matrix(
                (prepared.noise, prepared.binned.indices, prepared.binned.indptr), prepared.binned.shape
            )
            keep = sample_long_cells(block.indptr, noise[cells].data, parameters.max_length)
        return tokenize(
            block, prepared.token_ids, cls_id=self.vocabulary.cls_id, cls_value=self.config.pad_value, keep=keep
        )


def check_model_parameters(parameters: Parameters, config: ModelConfig) -> None:
    """Refuse parameters that state another model than the checkpoint's (ConfigError)."""
    names = {"embsize": "embsize", "nhead": "nheads", "d_hid": "d_hid", "nlayers": "nlayers"}
    for name, attribute in {**names, "n_layers_cls": "n_layers_cls"}.items():
        stated, has = getattr(parameters, name), getattr(config, attribute)
        if stated is not None and stated != has:
            raise ConfigError(f"{name} is {stated}, but the checkpoint has {has}: leave it out, or take that model")


_EMBEDDERS: dict[tuple[str, str | None, tuple[str, ...]], Embedder] = {}
_LOADING = threading.Lock()


def load_embedder(
    folder: str | Path, *, digest: str | None = None, device: str | None = None, roots: Sequence[str] = ()
) -> Embedder:
    """Return the embedder of a checkpoint folder, loaded once per process.

    Parameters
    ----------
    digest
        The checkpoint's digest where it is known (a registered model states it): it saves reading the files again,
        and weights that turn out to have another are refused.

    Raises
    ------
    CheckpointError
        As `load_checkpoint`, or the files are not those of `digest`.
    """
    with _LOADING:
        key = (digest or checkpoint_digest(folder), device, tuple(roots))
        if key not in _EMBEDDERS:
            checkpoint = load_checkpoint(folder)
            if checkpoint.digest != key[0]:
                raise CheckpointError(f"{folder} has digest {checkpoint.digest[:12]}, {key[0][:12]} was registered")
            _EMBEDDERS[key] = Embedder(checkpoint, device=device, roots=roots)
            logger.info("model %s loaded in process %d on %s", key[0][:12], os.getpid(), _EMBEDDERS[key].device)
        return _EMBEDDERS[key]


def loads_in_this_process() -> int:
    """How many models this process has loaded: one for each checkpoint, however many requests."""
    return len(_EMBEDDERS)


def allowed_path(path: str, roots: Iterable[str]) -> Path:
    """Return the real path if it lies below one of `roots`; a PayloadError otherwise.

    Links are followed before the comparison, and `..` is refused outright.
    """
    allowed = [Path(root).resolve() for root in roots]
    if not allowed:
        raise PayloadError("input_data_path is not allowed: no root was listed when the model was registered")
    real = Path(path).resolve()
    if ".." in Path(path).parts or not any(real.is_relative_to(root) for root in allowed):
        raise PayloadError(f"input_data_path {path!r} does not lie below a root listed at registration")
    if not real.is_file():
        raise PayloadError(f"input_data_path {path!r} is no file")
    return real


def _read_file(path: Path, use_key: str) -> ad.AnnData:
    """Read an .h5ad and check it as a row is checked; of its layers, the one that is used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # names given twice: the check below refuses them
            held = ad.read_h5ad(path)
    except (OSError, KeyError, ValueError) as exc:
        raise PayloadError(f"input_data_path: {path.name} cannot be read as .h5ad: {exc}") from exc

    def checked(matrix: Any, key: str) -> ad.AnnData:
        if matrix is None:
            raise PayloadError(f"input_data_path: {path.name} has no {key}")
        row = {"adata_sparsematrix": sp.csr_matrix(matrix), "adata_obs": held.obs, "adata_var": held.var}
        try:
            return from_row(row)
        except PayloadError as exc:
            raise PayloadError(f"input_data_path: {path.name}, {key}: {exc}") from exc

    adata = checked(held.X, "X")
    if use_key in held.layers:
        adata.layers[use_key] = checked(held.layers[use_key], use_key).X
    return adata


def _empty_cells_warning(binned: sp.csr_matrix | None) -> str | None:
    """Say when cells have nothing for the model to see: their answers are all alike."""
    empty = 0 if binned is None else int((np.diff(binned.indptr) == 0).sum())
    return f"{empty} cells carry no gene of the vocabulary: what they give is that of <cls> alone" if empty else None


def _binned(matrix: sp.csr_matrix, names: np.ndarray, parameters: Parameters, n_bins: int) -> sp.csr_matrix:
    matrix = sp.csr_matrix(matrix)
    hashes = gene_hash(names)[matrix.indices]
    bins = bin_values(matrix.data, matrix.indptr, hashes, parameters, n_bins=n_bins)
    return sp.csr_matrix((bins.astype(np.float32), matrix.indices, matrix.indptr), matrix.shape)


def _sampling_noise(binned: sp.csr_matrix, names: np.ndarray, parameters: Parameters) -> np.ndarray | None:
    if np.diff(binned.indptr).max(initial=0) <= parameters.max_length - 1:
        return None
    return cell_noise(binned.data, binned.indptr, gene_hash(names)[binned.indices], parameters.seed, stream=1)


def _one_column_a_token(ids: np.ndarray, x: sp.csr_matrix) -> tuple[np.ndarray, str | None]:
    """Choose the columns of the vocabulary's genes; of columns mapped to one symbol, the one with most counts."""
    columns = np.flatnonzero(ids >= 0)
    if len(np.unique(ids[columns])) == len(columns):
        return columns, None
    totals = np.asarray(x.sum(axis=0)).ravel()[columns]
    by_total = columns[np.argsort(-totals, kind="stable")]
    _, first = np.unique(ids[by_total], return_index=True)
    kept = np.sort(by_total[first])
    return kept, f"{len(columns) - len(kept)} genes map to a symbol taken by another with more counts: left out"


def _restrict(genes: np.ndarray, parameters: Parameters) -> np.ndarray:
    return np.isin(genes, parameters.genes) if parameters.genes else np.ones(len(genes), bool)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)


def _refuse_low_coverage(report: RowReport, min_coverage: float, name_warning: str | None) -> None:
    coverage = report.coverage or 0.0
    if report.genes_matched and coverage >= min_coverage:
        return
    hint = f"; {name_warning}" if name_warning else ""
    raise LowCoverage(
        f"{report.genes_matched} of {report.genes_in} gene names are in the vocabulary and carry {coverage:.1%} of "
        f"the counts, {min_coverage:.1%} are wanted{hint}"
    )


def _refuse_non_finite(answer: Answer) -> None:
    vectors = answer.embeddings
    if vectors is None or np.isfinite(vectors).all():
        return
    bad = int(np.argmin(np.isfinite(vectors).all(axis=1)))
    names = answer.genes if answer.genes is not None else answer.cell_ids
    raise NonFiniteOutput(f"the embedding of {names[bad]!r} holds NaN or infinity")  # type: ignore[index]
