"""Rows in, embeddings out: golden parity, independence of chunks and formats, and what is refused."""

import base64
import json
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import anndata as ad
import numba
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scgpt_batch.cli.demo import write_demo_checkpoint
from scgpt_batch.errors import (
    CheckpointError,
    ConfigError,
    InternalError,
    LowCoverage,
    NonFiniteOutput,
    PayloadError,
    PreprocessError,
)
from scgpt_batch.inference import aggregate
from scgpt_batch.inference import engine as embedder_module
from scgpt_batch.inference.engine import Embedder, load_embedder, loads_in_this_process, token_budget
from scgpt_batch.inference.row_reader import RowReader, allowed_path
from scgpt_batch.io.rows import PAYLOAD_COLUMNS, to_row
from scgpt_batch.models.scgpt.checkpoint import Checkpoint, load_checkpoint
from scgpt_batch.models.scgpt.transformer import ScGPT
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing import tokens as tokens_module
from scgpt_batch.preprocessing.tokens import ScgptTokenizer
from tests.helpers import assert_close, random_adata
from tests.paths import DATA, GOLDEN

UNPROCESSED = {"need_preprocess": False}
CELLS = {"need_preprocess": False, "mode": "cell"}
BINNED = {"need_preprocess": False, "mode": "contextual", "data_is_binned": True}


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


@cache
def pbmc():
    return ad.read_h5ad(DATA / "pbmc3k.h5ad")


@cache
def known_genes(n=400):
    """Genes of the data and of the golden vocabulary, most counts first."""
    vocabulary = Vocabulary.from_file(GOLDEN / "checkpoint_flash" / "vocab.json")
    totals = np.asarray(pbmc().X.sum(axis=0)).ravel()
    return [pbmc().var_names[i] for i in np.argsort(-totals) if pbmc().var_names[i] in vocabulary][:n]


def small(n_cells, start=0):
    """Real cells, known genes and some unknown ones."""
    genes = [*known_genes(), "not-a-gene"]
    adata = pbmc()[start : start + n_cells, known_genes()]
    x = sp.hstack([adata.X, np.ones((n_cells, 1), np.float32)], format="csr")
    return ad.AnnData(x, obs=adata.obs.copy(), var=pd.DataFrame(index=genes))


def small_logs(n_cells):
    adata = small(n_cells)
    adata.X.data = np.log1p(adata.X.data)
    return adata


@pytest.fixture(scope="module")
def embedder():
    return Embedder(load_checkpoint(GOLDEN / "checkpoint_flash"), device="cpu")


@pytest.fixture
def embed(embedder):
    """Answer an AnnData; an error in the answer fails the test."""

    def embed(adata, layout="csr", **parameters):
        answer = embedder.embed(to_row(adata, layout=layout), Parameters(**parameters))
        assert answer.error is None, answer.error
        return answer

    return embed


@pytest.fixture
def refuse(embedder):
    """Answer an AnnData that must come back with an error."""

    def refuse(adata, **parameters):
        return embedder.embed(to_row(adata), Parameters(**parameters)).error

    return refuse


def golden_cells():
    """The cells of transformer.npz, binned as they were for upstream."""
    wanted, tokens = golden("transformer"), Vocabulary.from_file(GOLDEN / "checkpoint_flash" / "vocab.json").tokens
    genes = [tokens[i] for i in golden("contextual")["gene_ids"]]
    x = np.zeros((len(wanted["lengths"]), len(genes)), np.float32)
    place = {token_id: j for j, token_id in enumerate(golden("contextual")["gene_ids"])}
    for i, n in enumerate(wanted["lengths"]):
        x[i, [place[g] for g in wanted["gene_ids"][i, 1:n]]] = wanted["values"][i, 1:n]
    names = [f"cell {i}" for i in range(len(x))]
    return ad.AnnData(sp.csr_matrix(x), obs=pd.DataFrame(index=names), var=pd.DataFrame(index=genes))


def golden_raw():
    """The cells of embed_data.npz, all genes, raw counts."""
    return pbmc()[golden("embed_data")["cell_index"]].copy()


def golden_log1p():
    given = golden("preprocess_input")
    raw = pbmc()[given["cell_index"]]
    x = sp.csr_matrix((given["log1p_data"], raw.X.indices, given["indptr"]), raw.shape)
    return ad.AnnData(x, obs=raw.obs.copy(), var=raw.var.copy())[: len(golden("embed_data")["cell_index"])].copy()


def cosine(a, b):
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# Golden parity


@pytest.mark.numbers
def test_contextual_means_are_upstreams(embed):
    wanted = golden("contextual")
    answer = embed(golden_cells(), **BINNED)
    assert answer.genes == wanted["tokens"].tolist()
    assert answer.n_cells.tolist() == wanted["count"].tolist()
    assert_close(answer.gene_embeddings, wanted["mean"], atol=1e-4)


@pytest.mark.numbers
@pytest.mark.parametrize("tie_break", ["upper", "lower"])
def test_cell_vectors_are_embed_datas(embed, tie_break):
    wanted = golden("embed_data")
    answer = embed(golden_raw(), **CELLS, tie_break=tie_break)
    assert answer.cell_ids == wanted["cell_names"].tolist()
    assert_close(answer.cell_embeddings, wanted[f"x_1200_{tie_break}"], atol=1e-5)


@pytest.mark.numbers
def test_log_values_give_the_same_cell_vectors_as_counts(embed):
    found = embed(golden_log1p(), **CELLS, tie_break="upper").cell_embeddings
    assert_close(found, golden("embed_data")["x_1200_log1p_upper"], atol=1e-5)


def test_random_ties_stay_within_upstreams_own_noise(embed):
    found = embed(golden_raw(), **CELLS).cell_embeddings
    assert cosine(found, golden("embed_data")["x_1200_mean_of_5_seeds"]).min() > 0.998


def test_sampled_long_cells_stay_within_upstreams_own_noise(embed):
    found = embed(golden_raw(), **CELLS, max_length=128).cell_embeddings
    assert cosine(found, golden("embed_data")["x_128_seed0"]).mean() > 0.98


@pytest.mark.numbers
def test_static_vectors_are_the_vocabularys_rows(embed, embedder):
    answer = embed(small(3), **UNPROCESSED)
    assert answer.genes == known_genes()
    assert_close(
        answer.gene_embeddings, golden("static")["embeddings"][embedder.vocabulary.ids(answer.genes)], atol=1e-5
    )
    assert answer.n_cells.tolist() == small(3)[:, known_genes()].X.getnnz(axis=0).tolist()


@pytest.mark.numbers
def test_whole_vocabulary_has_a_static_vector_for_each_token(embedder):
    answer = embedder.whole_vocabulary(Parameters())
    assert answer.genes == list(embedder.vocabulary.tokens)
    assert_close(answer.gene_embeddings, golden("static")["embeddings"], atol=1e-5)


def test_whole_vocabulary_needs_static_mode(embedder):
    with pytest.raises(PayloadError, match="mode 'cell' needs cells"):
        embedder.whole_vocabulary(Parameters(**CELLS))


@pytest.mark.parametrize("mode", ["static", "contextual", "cell"])
@pytest.mark.parametrize("need_preprocess", [True, False])
def test_row_without_payload_fails(embedder, mode, need_preprocess):
    parameters = Parameters(mode=mode, need_preprocess=need_preprocess)
    for row in ({}, dict.fromkeys(PAYLOAD_COLUMNS)):
        answer = embedder.embed(row, parameters)
        assert isinstance(answer.error, PayloadError) and "the row is empty" in str(answer.error)


# A cell's vector depends on the cell, the model and the parameters alone


def split(adata, size):
    return [adata[i : i + size].copy() for i in range(0, adata.n_obs, size)]


@pytest.mark.parametrize("max_length", [1200, 100], ids=["whole cells", "sampled cells"])
def test_chunks_do_not_change_tokens_or_bins(embedder, max_length):
    parameters = Parameters(**CELLS, max_length=max_length)

    def tokens(adata):
        prepared = RowReader(ScgptTokenizer(embedder.vocabulary), []).prepare(to_row(adata), parameters)
        return prepared.cells.tokens(np.arange(len(prepared.cell_ids)))[0]

    whole = tokens(small(1000))
    assert 99 < whole.lengths.max() <= max_length
    for size in (100, 333):
        parts = [tokens(part) for part in split(small(1000), size)]
        for field in ("genes", "values", "lengths"):
            assert np.array_equal(np.concatenate([getattr(part, field) for part in parts]), getattr(whole, field))


@pytest.mark.numbers
@pytest.mark.parametrize("max_length", [1200, 100], ids=["whole cells", "sampled cells"])
def test_chunks_do_not_change_cell_vectors(embed, max_length):
    whole = embed(small(15), **CELLS, max_length=max_length)
    for size in (8, 4, 1):
        parts = [embed(part, **CELLS, max_length=max_length) for part in split(small(15), size)]
        assert [name for part in parts for name in part.cell_ids] == whole.cell_ids
        assert_close(np.concatenate([part.cell_embeddings for part in parts]), whole.cell_embeddings, atol=1e-5)


@pytest.mark.numbers
def test_order_of_cells_and_genes_does_not_change_cell_vectors(embed):
    adata, rng = small(16), np.random.default_rng(0)
    cells = rng.permutation(adata.n_obs)
    shuffled = adata[cells][:, rng.permutation(adata.n_vars)].copy()
    assert_close(embed(shuffled, **CELLS).cell_embeddings, embed(adata, **CELLS).cell_embeddings[cells], atol=1e-5)


@pytest.mark.numbers
def test_batch_size_does_not_change_cell_vectors(embed, embedder, monkeypatch):
    whole = embed(small(16), **CELLS).cell_embeddings
    monkeypatch.setattr(embedder, "_budget", 500)
    assert_close(embed(small(16), **CELLS).cell_embeddings, whole, atol=1e-5)


@pytest.mark.numbers
def test_repeated_calls_are_bit_identical(embed):
    first, second = (embed(small(20), **CELLS).cell_embeddings for _ in range(2))
    assert np.array_equal(first, second)


def test_another_seed_draws_other_ties(embed):
    first, second = (embed(small(20), **CELLS, seed=seed).cell_embeddings for seed in (0, 1))
    assert not np.array_equal(first, second)
    assert cosine(first, second).min() > 0.9


@pytest.mark.parametrize("mode", ["static", "contextual", "cell"])
@pytest.mark.parametrize("need_preprocess", [True, False])
def test_both_row_formats_give_identical_embeddings(embed, mode, need_preprocess):
    parameters = {"mode": mode, "need_preprocess": need_preprocess, "subset_hvg": 0}
    csr, dense = (embed(small(20), layout, **parameters) for layout in ("csr", "dense"))
    assert (csr.genes, csr.cell_ids) == (dense.genes, dense.cell_ids)
    assert np.array_equal(csr.embeddings, dense.embeddings)


# Many rows at once


def mixed_rows():
    """Rows of different sizes, one of which cannot be read."""
    rows = [to_row(small(n, start)) for n, start in [(3, 0), (1, 50), (12, 60), (2, 7), (5, 300)]]
    return [*rows[:2], rows[0] | {"x_indptr": [0, 9, 3]}, *rows[2:]]


@pytest.fixture(scope="module")
def alone(embedder):
    """A function that embeds each of the rows alone in a mode, once."""
    return cache(lambda mode: [embedder.embed(row, Parameters(**UNPROCESSED, mode=mode)) for row in mixed_rows()])


@pytest.mark.parametrize("mode", ["static", "contextual", "cell"])
@pytest.mark.parametrize("budget", [1, 700, 10**6], ids=["cell by cell", "across rows", "all at once"])
def test_results_keep_order_and_equal_single_rows(embedder, alone, monkeypatch, mode, budget):
    single = alone(mode)
    monkeypatch.setattr(embedder, "_budget", budget)
    answers = embedder.embed_rows(mixed_rows(), Parameters(**UNPROCESSED, mode=mode))
    for found, wanted in zip(answers, single, strict=True):
        assert (found.genes, found.cell_ids, found.report) == (wanted.genes, wanted.cell_ids, wanted.report)
        if wanted.error:
            assert str(found.error) == str(wanted.error)
        else:
            assert_close(found.embeddings, wanted.embeddings, atol=1e-5)


def test_rows_are_read_a_little_ahead_until_closed(embedder):
    drawn = []
    rows = (drawn.append(i) or to_row(small(2)) for i in range(100))
    answers = embedder.embed_rows(rows, Parameters(**UNPROCESSED))
    next(answers)
    answers.close()
    assert 1 <= len(drawn) <= 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scgpt-prepare")]


def test_rows_are_prepared_on_the_callers_share_of_the_cores(embedder):
    """Spark's tasks lie side by side: numba's threads of one, spinning on another's core, doubled the time of a row."""
    seen, all_cores = [], numba.get_num_threads()
    rows = (seen.append(numba.get_num_threads()) or to_row(small(2)) for _ in range(3))
    try:
        numba.set_num_threads(1)
        list(embedder.embed_rows(rows, Parameters(**UNPROCESSED)))
    finally:
        numba.set_num_threads(all_cores)
    assert all_cores == 1 or seen == [1, 1, 1]


def test_error_of_the_rows_iterator_reaches_the_caller(embedder):
    def rows():
        yield to_row(small(2))
        raise OSError("the table is gone")

    answers = embedder.embed_rows(rows(), Parameters(**UNPROCESSED))
    assert next(answers).error is None
    with pytest.raises(OSError, match="the table is gone"):
        next(answers)


def test_several_threads_can_embed_at_once(embedder):
    rows, parameters = [to_row(small(20, start)) for start in range(0, 80, 20)], Parameters(mode="cell", subset_hvg=0)
    alone = [embedder.embed(row, parameters).cell_embeddings for row in rows]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda row: embedder.embed(row, parameters).cell_embeddings, rows))
    for one, other in zip(alone, together, strict=True):
        assert_close(other, one, atol=1e-6)  # torch may use another number of threads, and so another kernel


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate", "DefaultCPUAllocator: can't allocate memory"]
)
@pytest.mark.parametrize("mode", ["contextual", "cell"])
def test_a_batch_that_needs_too_much_memory_runs_in_halves(embedder, monkeypatch, caplog, message, mode):
    parameters, whole_forward = Parameters(**UNPROCESSED, mode=mode), ScGPT.forward
    wanted = embedder.embed(to_row(small(30)), parameters).embeddings

    sizes = []

    def forward(model, genes, values, lengths, **options):
        sizes.append(sum(lengths))
        if sizes[-1] > 700:
            raise RuntimeError(message)
        return whole_forward(model, genes, values, lengths, **options)

    monkeypatch.setattr(ScGPT, "forward", forward)
    embedder = Embedder(load_checkpoint(GOLDEN / "checkpoint_flash"), device="cpu")
    assert_close(embedder.embed(to_row(small(30)), parameters).embeddings, wanted, atol=1e-5)
    assert max(sizes) > 700 and "out of memory with" in caplog.text
    sizes.clear()
    embedder.embed(to_row(small(30)), parameters)
    assert max(sizes) <= 700  # later batches are smaller from the start


def test_a_model_that_fails_otherwise_is_not_tried_again(embedder, monkeypatch):
    def forward(*_, **__):
        raise RuntimeError("expected scalar type Float")

    monkeypatch.setattr(ScGPT, "forward", forward)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        embedder.embed(to_row(small(3)), Parameters(**CELLS))


def test_a_gpus_batch_is_what_half_of_its_free_memory_holds(monkeypatch, embedder):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**20, 0))
    few = token_budget(torch.device("cuda"), embedder.config)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 2**20, 0))
    assert 0 < token_budget(torch.device("cuda"), embedder.config) - 2 * few < 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 0))
    assert token_budget(torch.device("cuda"), embedder.config) == embedder_module.GPU_TOKENS


# What a caller may ask for


@pytest.mark.numbers
def test_groups_are_averaged_apart(embed):
    adata = small(60)
    answer = embed(adata, **UNPROCESSED, mode="contextual", group_by="cell_type")
    assert sorted(set(answer.groups)) == sorted(adata.obs["cell_type"].unique())
    for name in adata.obs["cell_type"].unique():
        alone = embed(adata[adata.obs["cell_type"] == name].copy(), **UNPROCESSED, mode="contextual")
        of_group = np.array(answer.groups) == name
        assert np.array(answer.genes)[of_group].tolist() == alone.genes
        assert answer.n_cells[of_group].tolist() == alone.n_cells.tolist()
        assert_close(answer.gene_embeddings[of_group], alone.gene_embeddings, atol=1e-5)


def test_groups_that_take_turns_give_what_they_give_at_once(embed, monkeypatch):
    adata = small(60)
    adata.obs["donor"] = [f"donor {i % 7}" for i in range(60)]
    parameters = UNPROCESSED | {"mode": "contextual", "group_by": "donor", "genes": tuple(known_genes(50))}
    whole = embed(adata, **parameters)
    monkeypatch.setattr(aggregate, "VECTORS_ON_DEVICE", 100)  # two groups a turn
    found = embed(adata, **parameters)
    assert (found.genes, found.groups) == (whole.genes, whole.groups)
    assert np.array_equal(found.n_cells, whole.n_cells)
    assert_close(found.gene_embeddings, whole.gene_embeddings, atol=1e-5)


@pytest.mark.numbers
def test_contextual_means_are_the_same_bits_from_run_to_run(embed):
    first, second = (embed(small(60), **UNPROCESSED, mode="contextual").gene_embeddings for _ in range(2))
    assert np.array_equal(first, second)


def peak_mb_of(call):
    """What a call needs on top of what the process holds, at its peak, in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now

    def resident(name):
        return int(next(line for line in Path("/proc/self/status").open() if line.startswith(name)).split()[1]) / 1000

    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


@pytest.mark.parametrize("mode", ["contextual", "cell"])
def test_memory_of_a_large_row_is_bounded(embed, mode):
    n_cells, n_genes = 100_000, 4  # 500,000 tokens, of which one layer's activations alone take 1,000 MB
    x = sp.random(n_cells, len(known_genes()), density=n_genes / 400, format="csr", dtype=np.float32, random_state=0)
    obs = pd.DataFrame({"donor": np.arange(n_cells) % 300}, index=[str(i) for i in range(n_cells)])
    adata = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=known_genes()))
    grouped = {"group_by": "donor"} if mode == "contextual" else {}
    embed(adata[:1000].copy(), **UNPROCESSED, mode=mode)
    answers = []
    peak = peak_mb_of(lambda: answers.append(embed(adata, **UNPROCESSED, mode=mode, **grouped)))
    assert answers[0].report.cells == n_cells
    carried = np.unique(obs["donor"].to_numpy()[x.nonzero()[0]] * 400 + x.indices)
    assert len(answers[0].embeddings) == (n_cells if mode == "cell" else len(carried))
    assert peak < 400


def test_static_genes_without_vectors_read_no_weights(tmp_path, embed):
    folder = shutil.copytree(GOLDEN / "checkpoint_flash", tmp_path / "checkpoint")
    (folder / "best_model.pt").write_bytes(b"cannot be read")
    reader = Embedder(Checkpoint(folder), device="cpu")
    found, whole = (
        reader.embed(to_row(small(5)), Parameters(**UNPROCESSED), with_vectors=False),
        embed(small(5), **UNPROCESSED),
    )
    assert found.gene_embeddings is None and found.error is None
    assert (found.genes, found.n_cells.tolist(), found.report) == (whole.genes, whole.n_cells.tolist(), whole.report)
    with pytest.raises(CheckpointError, match="cannot be read"):
        reader.embed(to_row(small(5)), Parameters(**UNPROCESSED))


def test_contextual_means_count_only_cells_that_carry_the_gene(embed):
    adata = small(20)
    answer = embed(adata, **UNPROCESSED, mode="contextual")
    carried = adata[:, answer.genes].X.getnnz(axis=0)
    assert answer.n_cells.tolist() == carried.tolist() and carried.min() > 0


def test_group_by_names_a_column_that_must_exist(refuse):
    error = refuse(small(3), **UNPROCESSED, mode="contextual", group_by="batch")
    assert isinstance(error, PayloadError) and "'batch'" in str(error) and "'cell_type'" in str(error)


@pytest.mark.parametrize("mode", ["static", "contextual"])
def test_genes_restrict_the_result_not_the_computation(embed, mode):
    wanted = (known_genes()[5], known_genes()[2], "not-a-gene")
    answer, whole = (embed(small(10), **UNPROCESSED, mode=mode, genes=genes) for genes in (wanted, ()))
    assert answer.genes == [known_genes()[2], known_genes()[5]]
    places = [whole.genes.index(gene) for gene in answer.genes]
    assert np.array_equal(answer.gene_embeddings, whole.gene_embeddings[places])


def test_genes_restrict_the_whole_vocabulary(embedder):
    answer = embedder.whole_vocabulary(Parameters(genes=(known_genes()[0], "not-a-gene")))
    assert answer.genes == [known_genes()[0]]
    assert answer.gene_embeddings.shape == (1, embedder.config.embsize)
    assert answer.report.warnings == ("1 requested gene is not in the model's vocabulary: not-a-gene",)


def test_misspelt_gene_gets_a_suggestion(embedder):
    answer = embedder.whole_vocabulary(Parameters(genes=("CD3D", "ms4a1")))
    assert answer.report.warnings == (
        "1 requested gene is not in the model's vocabulary: ms4a1: did you mean 'MS4A1'?",
    )


@pytest.mark.parametrize("mode", ["static", "contextual"])
def test_requested_genes_without_a_vector_are_named(embed, mode):
    present, absent = known_genes()[:300], known_genes()[350:352]
    adata = small(10)[:, present]
    answer = embed(adata, **UNPROCESSED, mode=mode, genes=(present[0], "not-a-gene", *absent, "nor-this"))
    assert answer.genes == [present[0]]
    assert answer.report.warnings[-2:] == (
        "2 requested genes are not in the model's vocabulary: not-a-gene, nor-this",
        f"2 requested genes have no vector: not among the row's genes after preprocessing: {', '.join(absent)}",
    )


def test_unexpressed_gene_has_no_contextual_mean(embed):
    adata = small(10)
    zero = known_genes()[3]
    adata.X[:, 3] = 0
    answer = embed(adata, **UNPROCESSED, mode="contextual", genes=(known_genes()[0], zero))
    assert answer.genes == [known_genes()[0]] and zero in answer.report.warnings[-1]


@pytest.mark.parametrize("mode", ["static", "contextual", "cell"])
def test_genes_that_are_all_unknown_are_an_error(embedder, mode):
    parameters = Parameters(mode=mode, genes=("cd3d", "not-a-gene"))
    with pytest.raises(ConfigError, match="none of the 2 names is in the model's vocabulary \\(first: 'cd3d'"):
        embedder.embed(to_row(small(3)), parameters)
    if mode == "static":
        with pytest.raises(ConfigError, match="first: 'cd3d': did you mean 'CD3D'"):
            embedder.whole_vocabulary(parameters)


def test_result_has_the_genes_left_after_preprocessing(embed):
    answer = embed(golden_log1p())
    assert 0 < len(answer.genes) < 1200
    assert set(answer.genes) < set(embed(golden_log1p(), **UNPROCESSED).genes)


@pytest.mark.parametrize("name", ["embsize", "nhead", "d_hid", "nlayers", "n_layers_cls"])
def test_a_size_that_contradicts_the_checkpoint_is_rejected(embedder, name):
    with pytest.raises(ConfigError, match=f"{name} is 7, but the checkpoint has"):
        embedder.embed(to_row(small(1)), Parameters(**UNPROCESSED, **{name: 7}))


def test_stated_sizes_that_agree_change_nothing(embed):
    sizes = {"embsize": 64, "nhead": 4, "d_hid": 128, "nlayers": 3, "n_layers_cls": 3}
    stated, silent = embed(small(2), **UNPROCESSED, **sizes), embed(small(2), **UNPROCESSED)
    assert np.array_equal(stated.gene_embeddings, silent.gene_embeddings)


@pytest.mark.parametrize("encoding", ["float32_base64", "float16_base64"])
def test_base64_holds_the_vectors_little_endian_row_by_row(embed, encoding):
    answer = embed(small(2), **UNPROCESSED)
    decoded = np.frombuffer(
        base64.b64decode(answer.base64(encoding)), "<f4" if encoding.startswith("float32") else "<f2"
    )
    assert_close(
        decoded.reshape(len(answer.genes), -1), answer.gene_embeddings, atol=0 if decoded.itemsize == 4 else 2e-3
    )


# What is said about a row, and what is refused


def with_names(adata, names):
    return ad.AnnData(adata.X, obs=adata.obs, var=pd.DataFrame(index=names))


def test_report_has_cells_matched_genes_and_coverage(embed):
    adata = small(10)
    report = embed(adata, **UNPROCESSED, data_is_raw=True).report
    assert (report.cells, report.genes_in, report.genes_matched) == (10, 401, 400)
    assert_close(report.coverage, 1 - 10 / adata.X.sum(), atol=1e-6)
    assert report.warnings == ()


@pytest.mark.parametrize(
    "values", [[2.0**24, 1.0], [3e38, 3e38]], ids=["2^24 and ones", "outside the range of float32 together"]
)
def test_coverage_is_summed_in_float64(embedder, values):
    x = np.full((1000, 2), values[1], np.float32)
    x[0, 0] = values[0]
    adata = ad.AnnData(sp.csr_matrix(x), var=pd.DataFrame(index=[known_genes()[0], "unknown"]))
    report = embedder.reader.open(to_row(adata), Parameters(min_coverage=0)).report
    known, unknown = x.astype(np.float64).sum(axis=0)
    assert_close(report.coverage, known / (known + unknown), rtol=1e-12)


@pytest.mark.parametrize("min_coverage", [0.0, 0.2], ids=["ungated", "gated"])
def test_a_row_without_a_known_gene_is_low_coverage(refuse, min_coverage):
    error = refuse(random_adata(4, 6), **UNPROCESSED, min_coverage=min_coverage)
    assert isinstance(error, LowCoverage) and "0 of 6 gene names" in str(error)


def test_rows_below_min_coverage_fail(refuse):
    adata = small(10)
    coverage = 1 - 10 / float(adata.X.sum(dtype=np.float64))
    assert isinstance(refuse(adata, **UNPROCESSED, min_coverage=coverage + 1e-6), LowCoverage)
    assert refuse(adata, **UNPROCESSED, min_coverage=coverage - 1e-6) is None


def test_min_coverage_of_a_call_replaces_the_parameters(embedder):
    row = to_row(small(10))
    assert embedder.embed(row, Parameters(**UNPROCESSED)).error is None
    assert isinstance(embedder.embed(row, Parameters(**UNPROCESSED), min_coverage=1.0).error, LowCoverage)


def test_a_failed_row_keeps_its_report(embedder):
    answer = embedder.embed(to_row(random_adata(4, 6)), Parameters(**UNPROCESSED))
    assert (answer.report.cells, answer.report.genes_in, answer.report.genes_matched) == (4, 6, 0)


@pytest.mark.parametrize(
    ("adata", "data_is_raw", "said"),
    [
        (small, False, "data_is_raw is false, but X looks like counts"),
        (small, True, None),
        (small_logs, True, "data_is_raw is true, but X looks log-transformed"),
        (small_logs, False, None),
    ],
    ids=["counts unsaid", "counts said", "logs called counts", "logs"],
)
def test_values_that_contradict_data_is_raw_are_warned_of(embed, adata, data_is_raw, said):
    warnings = embed(adata(5), **UNPROCESSED, data_is_raw=data_is_raw).report.warnings
    assert [str(said) in warning for warning in warnings] == ([True] if said else [])


def test_bins_are_not_warned_of_as_counts(embed):
    assert embed(golden_cells(), **BINNED).report.warnings == ()


def ensembl(n, version=""):
    return [f"ENSG{i:011d}{version}" for i in range(n)]


def test_ensembl_ids_are_mapped_by_the_rows_symbol_column(embed):
    adata = with_names(small(5), ensembl(401))
    adata.var["gene_symbol"] = small(1).var_names
    mapped, plain = embed(adata, **CELLS, data_is_raw=True), embed(small(5), **CELLS)
    assert mapped.report.warnings == (
        "gene names taken from var column 'gene_symbol' (matches 400 of 401 genes; var's index matches 0)",
    )
    assert np.array_equal(mapped.cell_embeddings, plain.cell_embeddings)


def test_unmapped_ensembl_ids_fail_with_a_hint(refuse):
    error = refuse(with_names(small(5), ensembl(401)), **UNPROCESSED)
    assert isinstance(error, LowCoverage) and "unknown gene names look like Ensembl ids" in str(error)


def test_columns_that_map_to_one_symbol_are_added_up(embed):
    adata = with_names(small(5), ensembl(401))
    symbols = small(1).var_names.to_numpy(dtype=object)
    symbols[399] = symbols[0]
    adata.var["gene_symbol"] = symbols
    answer = embed(adata, **UNPROCESSED, data_is_raw=True)
    assert answer.genes == known_genes()[:399]
    assert answer.n_cells[0] == ((adata.X[:, 0] + adata.X[:, 399]) > 0).sum()
    assert any(warning.startswith("1 columns repeat the name of an earlier gene") for warning in answer.report.warnings)


def without_known_genes(adata, cells):
    x = adata.X.tolil()
    x[cells, :400] = 0
    return ad.AnnData(x.tocsr(), obs=adata.obs, var=adata.var)


def test_cell_without_known_genes_gets_a_warning(embed):
    adata = without_known_genes(small(6), [0, 5])
    answer, whole = embed(adata, **CELLS, data_is_raw=True), embed(small(6), **CELLS)
    assert np.array_equal(answer.cell_embeddings[0], answer.cell_embeddings[5])
    assert_close(np.linalg.norm(answer.cell_embeddings, axis=1), np.ones(6), atol=1e-6)
    assert_close(answer.cell_embeddings[1:5], whole.cell_embeddings[1:5], atol=1e-5)
    assert any("2 cells express no gene" in warning for warning in answer.report.warnings)


def test_cell_without_known_genes_counts_for_no_gene(embed):
    adata = without_known_genes(small(6), [0])
    answer, others = (embed(a, **UNPROCESSED, mode="contextual") for a in (adata, small(6)[1:].copy()))
    assert (answer.genes, answer.n_cells.tolist()) == (others.genes, others.n_cells.tolist())
    assert_close(answer.gene_embeddings, others.gene_embeddings, atol=1e-5)


@pytest.mark.parametrize("mode", ["static", "contextual", "cell"])
def test_a_row_of_zeros_does_not_crash(embed, mode):
    adata = small(3)
    zeros = ad.AnnData(sp.csr_matrix(adata.shape, dtype=np.float32), obs=adata.obs, var=adata.var)
    answer = embed(zeros, **UNPROCESSED, mode=mode, min_coverage=0)
    assert np.isfinite(answer.embeddings).all()
    assert answer.report.coverage == 0


@pytest.mark.parametrize("parameters", [UNPROCESSED, CELLS], ids=["static", "cell"])
def test_nan_in_the_output_fails_the_row(parameters):
    checkpoint = load_checkpoint(GOLDEN / "checkpoint_flash")
    gene = known_genes()[3]
    checkpoint.tensors["encoder.embedding.weight"][checkpoint.vocabulary.ids([gene])] = np.nan
    answer = Embedder(checkpoint, device="cpu").embed(to_row(small(3)), Parameters(**parameters))
    assert isinstance(answer.error, NonFiniteOutput)
    assert (gene if parameters is UNPROCESSED else small(1).obs_names[0]) in str(answer.error)
    assert answer.embeddings is None


def test_an_unreadable_row_is_a_result_not_an_exception(embedder):
    answer = embedder.embed(to_row(small(2)) | {"x_indptr": [0, 9, 3]}, Parameters(**UNPROCESSED))
    assert isinstance(answer.error, PayloadError) and "x_indptr" in str(answer.error)


def test_values_outside_float32_are_rejected(embedder):
    row = to_row(small(1), layout="dense")
    row["adata_sparsematrix"][0][0] = 1e39
    answer = embedder.embed(row, Parameters(**UNPROCESSED))
    assert isinstance(answer.error, PayloadError) and "float32" in str(answer.error)


def test_a_fault_of_the_code_is_an_internal_error_of_the_row(refuse, monkeypatch, caplog):
    def broken(*_, **__):
        raise IndexError("deep inside")

    monkeypatch.setattr(tokens_module, "preprocess", broken)
    with caplog.at_level(logging.CRITICAL):
        error = refuse(small(2))
    assert isinstance(error, InternalError) and str(error).startswith("IndexError: deep inside")


def test_a_row_without_remaining_genes_fails(refuse):
    error = refuse(small(2), filter_gene_by_counts=10**6)
    assert isinstance(error, PreprocessError) and "filter_gene_by_counts" in str(error)


# Files that a request may name


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cells.h5ad").touch()
    (tmp_path / "secret.h5ad").touch()
    return tmp_path / "data"


def test_no_file_is_read_without_roots(root):
    with pytest.raises(PayloadError, match="registered without roots"):
        allowed_path(str(root / "cells.h5ad"), [])


def test_a_file_below_a_root_is_read(root):
    (root / "deep").mkdir()
    (root / "deep" / "more.h5ad").touch()
    for name in ("cells.h5ad", "deep/more.h5ad"):
        assert allowed_path(str(root / name), ["/nowhere", str(root)]) == root / name


def test_a_linked_root_is_resolved(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert allowed_path(str(tmp_path / "link" / "cells.h5ad"), [str(tmp_path / "link")]) == root / "cells.h5ad"


@pytest.mark.parametrize("path", ["../secret.h5ad", "../data/cells.h5ad", "deep/../cells.h5ad", "..", "."])
def test_dots_and_folders_are_rejected(root, path):
    with pytest.raises(PayloadError):
        allowed_path(f"{root}/{path}", [str(root)])


def test_links_out_of_the_root_are_rejected(root, tmp_path):
    (root / "link.h5ad").symlink_to(tmp_path / "secret.h5ad")
    (root / "folder").symlink_to(tmp_path)
    for name in ("link.h5ad", "folder/secret.h5ad"):
        with pytest.raises(PayloadError, match="is not below one of the --input-roots"):
            allowed_path(str(root / name), [str(root)])


def test_a_sibling_with_the_prefix_of_a_root_is_rejected(root, tmp_path):
    (tmp_path / "database").mkdir()
    (tmp_path / "database" / "cells.h5ad").touch()
    with pytest.raises(PayloadError, match="is not below one of the --input-roots"):
        allowed_path(str(tmp_path / "database" / "cells.h5ad"), [str(root)])


def test_a_missing_file_is_named(root):
    with pytest.raises(PayloadError, match=r"nothing\.h5ad.*not an \.h5ad file"):
        allowed_path(str(root / "nothing.h5ad"), [str(root)])


def test_a_file_has_the_result_of_its_row(tmp_path, embed):
    small(5).write_h5ad(tmp_path / "cells.h5ad")
    reader = Embedder(load_checkpoint(GOLDEN / "checkpoint_flash"), device="cpu", roots=[str(tmp_path)])
    answer = reader.embed({}, Parameters(**CELLS, input_data_path=str(tmp_path / "cells.h5ad")))
    assert answer.error is None and answer.cell_ids == small(5).obs_names.tolist()
    assert np.array_equal(answer.cell_embeddings, embed(small(5), **CELLS).cell_embeddings)


@pytest.mark.parametrize("damage", ["no h5ad", "negative", "nan"])
def test_a_file_is_checked_as_a_row_is(tmp_path, damage):
    adata, path = small(3), tmp_path / "cells.h5ad"
    if damage == "negative":
        adata.X.data[0] = -1
    elif damage == "nan":
        adata.X.data[0] = np.nan
    if damage == "no h5ad":
        path.write_text("not HDF5")
    else:
        adata.write_h5ad(path)
    reader = Embedder(load_checkpoint(GOLDEN / "checkpoint_flash"), device="cpu", roots=[str(tmp_path)])
    answer = reader.embed({}, Parameters(**CELLS, input_data_path=str(path)))
    assert isinstance(answer.error, PayloadError) and "cells.h5ad" in str(answer.error)


def test_a_layer_of_a_file_may_be_what_is_normalised(tmp_path):
    adata = small_logs(40)
    adata.layers["counts"] = small(40).X
    adata.write_h5ad(tmp_path / "cells.h5ad")
    reader = Embedder(load_checkpoint(GOLDEN / "checkpoint_flash"), device="cpu", roots=[str(tmp_path)])
    same = {"mode": "cell", "subset_hvg": 0, "filter_gene_by_counts": 0, "tie_break": "upper"}
    found = reader.embed({}, Parameters(**same, input_data_path=str(tmp_path / "cells.h5ad"), use_key="counts"))
    assert_close(found.cell_embeddings, reader.embed(to_row(small(40)), Parameters(**same)).cell_embeddings, atol=1e-6)


def test_a_layer_of_a_file_replaces_x_without_preprocessing(tmp_path, embed):
    adata = small(5)
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * -1.0  # scaled values are not looked at
    adata.write_h5ad(tmp_path / "cells.h5ad")
    reader = Embedder(load_checkpoint(GOLDEN / "checkpoint_flash"), device="cpu", roots=[str(tmp_path)])
    parameters = {**CELLS, "input_data_path": str(tmp_path / "cells.h5ad")}
    found = reader.embed({}, Parameters(**parameters, use_key="counts"))
    assert found.error is None, found.error
    assert np.array_equal(found.cell_embeddings, embed(small(5), **CELLS).cell_embeddings)
    missing = reader.embed({}, Parameters(**parameters, use_key="nowhere")).error
    assert isinstance(missing, PayloadError) and "no layer 'nowhere'; its layers: 'counts'" in str(missing)


def test_a_row_has_no_layers_to_use(refuse):
    error = refuse(small(2), **CELLS, use_key="counts")
    assert isinstance(error, PayloadError) and "use_key 'counts' is not a layer of the row" in str(error)


@pytest.mark.parametrize(("base", "said"), [(2, True), (10.0, True), (np.e, False), (None, False)])
def test_logarithms_to_another_base_are_warned_of(tmp_path, base, said):
    adata = small_logs(3)
    adata.uns["log1p"] = {"base": base} if base is not None else {}
    adata.write_h5ad(tmp_path / "cells.h5ad")
    reader = Embedder(load_checkpoint(GOLDEN / "checkpoint_flash"), device="cpu", roots=[str(tmp_path)])
    answer = reader.embed({}, Parameters(**CELLS, input_data_path=str(tmp_path / "cells.h5ad")))
    assert [f"logarithms to base {base:g}" in w for w in answer.report.warnings] == ([True] if said else [])


# Loading


def test_a_checkpoint_is_loaded_once_per_process():
    first = load_embedder(GOLDEN / "checkpoint_torch")
    loads = loads_in_this_process()
    assert load_embedder(GOLDEN / "checkpoint_torch") is first
    assert load_embedder("/gone/since", digest=first.digest) is first
    assert loads_in_this_process() == loads


def test_weights_with_another_digest_are_rejected():
    embedder = load_embedder(GOLDEN / "checkpoint_torch", digest="0" * 64)
    with pytest.raises(CheckpointError, match="was registered"):
        embedder.whole_vocabulary(Parameters())


# The demo checkpoint


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    write_demo_checkpoint(DATA / "pbmc3k.h5ad", folder)
    return folder


def test_the_demo_checkpoint_has_the_published_layout_and_loads(demo):
    assert sorted(path.name for path in demo.iterdir()) == ["args.json", "best_model.pt", "vocab.json"]
    checkpoint = load_checkpoint(demo)
    assert checkpoint.ignored == ()
    assert len(checkpoint.vocabulary) == pbmc().n_vars + 3


def test_demo_checkpoint_says_it_is_not_the_published_one(demo):
    assert "NOT the published scGPT weights" in json.loads((demo / "args.json").read_text())["data_source"]


def test_the_demo_checkpoint_does_not_overwrite_another(tmp_path):
    (tmp_path / "args.json").write_text('{"data_source": "mine"}')
    with pytest.raises(ConfigError, match="holds another checkpoint"):
        write_demo_checkpoint(DATA / "pbmc3k.h5ad", tmp_path)


def test_marker_genes_of_a_cell_type_are_neighbours(demo):
    markers = {
        "T": "CD3D CD3E CD2 IL7R",
        "B": "MS4A1 CD79A CD79B",
        "Mono": "LYZ S100A9 FCN1",
        "NK": "NKG7 GNLY GZMB PRF1",
    }
    genes = {gene: kind for kind, names in markers.items() for gene in names.split()}
    answer = Embedder(load_checkpoint(demo), device="cpu").whole_vocabulary(Parameters(genes=tuple(genes)))
    unit = answer.gene_embeddings / np.linalg.norm(answer.gene_embeddings, axis=1, keepdims=True)
    similarity, kinds = unit @ unit.T, np.array([genes[gene] for gene in answer.genes])
    for i, kind in enumerate(kinds):
        same = (kinds == kind) & (np.arange(len(kinds)) != i)
        assert similarity[i, same].mean() > similarity[i, kinds != kind].max(), answer.genes[i]


@pytest.mark.parametrize("mode", ["cell", "contextual"])
def test_demo_vectors_depend_on_expression_values(demo, mode):
    embedder, cells = Embedder(load_checkpoint(demo), device="cpu"), pbmc()[:5]
    other = cells.copy()
    other.X.data = np.random.default_rng(0).permutation(other.X.data)
    parameters = Parameters(mode=mode, need_preprocess=False, tie_break="upper", max_length=5000)
    first, second = (embedder.embed(to_row(adata), parameters).embeddings for adata in (cells, other))
    assert abs(first - second).max() > 0.01
