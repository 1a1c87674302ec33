"""The model against the published package's golden outputs, and packing against padding."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scgpt_batch.errors import ConfigError
from scgpt_batch.models import attention as attention_module
from scgpt_batch.models.attention import BACKENDS, LONG, Packing, attention, choose_backend
from scgpt_batch.models.scgpt.checkpoint import build_model, load_checkpoint
from scgpt_batch.models.scgpt.transformer import SelfAttention, distinct
from tests.helpers import assert_close
from tests.paths import GOLDEN


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module", params=["checkpoint_flash", "checkpoint_torch"])
def checkpoint(request):
    return load_checkpoint(GOLDEN / request.param)


@pytest.fixture(scope="module")
def model(checkpoint):
    return build_model(checkpoint)


@pytest.fixture(scope="module")
def cells():
    """Each golden cell: its token ids and its values, padding left out."""
    wanted = golden("transformer")
    genes, values = torch.from_numpy(wanted["gene_ids"]).long(), torch.from_numpy(wanted["values"])
    return [(genes[i, :n], values[i, :n]) for i, n in enumerate(wanted["lengths"])]


def encode(model, cells):
    """Run cells packed, and give each cell's output."""
    lengths = [len(genes) for genes, _ in cells]
    genes, values = (torch.cat(parts) for parts in zip(*cells, strict=True))
    return [part.cpu().numpy() for part in model(genes, values, lengths).split(lengths)]


def cosine(a, b):
    return (a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.numbers
def test_gene_vectors_are_upstreams(model):
    wanted = golden("static")
    assert_close(model.gene_vectors(torch.from_numpy(wanted["token_ids"])), wanted["embeddings"], atol=1e-5)


@pytest.mark.numbers
def test_value_vectors_are_upstreams_also_beyond_the_clamp(model):
    wanted = golden("static")
    assert_close(model.value_encoder(torch.from_numpy(wanted["value_inputs"])), wanted["value_embeddings"], atol=1e-5)


@pytest.mark.numbers
def test_output_is_upstreams_for_every_real_token(model, cells):
    wanted = golden("transformer")
    found = np.concatenate(encode(model, cells))
    assert_close(found, wanted["output"][~wanted["key_padding_mask"]], atol=1e-4)


@pytest.mark.numbers
def test_cls_is_upstreams_raw_and_normalised(model, cells):
    wanted = golden("transformer")
    cls = np.stack([output[0] for output in encode(model, cells)])
    assert_close(cls, wanted["cls"], atol=1e-4)
    assert_close(cls / np.linalg.norm(cls, axis=1, keepdims=True), wanted["cls_l2"], atol=1e-5)


@pytest.mark.numbers
def test_cls_follows_the_value_it_carries(model, cells):
    zeroed = [(genes, torch.cat([torch.zeros(1), values[1:]])) for genes, values in cells]
    cls = np.stack([output[0] for output in encode(model, zeroed)])
    assert_close(cls, golden("transformer")["cls_value0"], atol=1e-4)


@pytest.mark.numbers
def test_each_layer_is_upstreams(model, cells):
    wanted = golden("transformer")
    layers = model.transformer_encoder["layers"]
    seen = []
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))]
    hooks += [layer.register_forward_hook(lambda _, __, output: seen.append(output.clone())) for layer in layers]
    encode(model, [cells[int(wanted["layer_cell"])]])
    for hook in hooks:
        hook.remove()
    assert_close(np.stack(seen), wanted["layer_outputs"], atol=1e-4)


@pytest.mark.numbers
def test_bfloat16_stays_near_float32(checkpoint, cells):
    wanted = golden("transformer")
    wanted = wanted["output"][~wanted["key_padding_mask"]]
    found = np.concatenate(encode(build_model(checkpoint, dtype=torch.bfloat16), cells))
    assert_close(found, wanted, atol=0.02)
    assert cosine(found, wanted).min() > 0.9999


def test_both_key_layouts_hold_one_model():
    flash, plain = (load_checkpoint(GOLDEN / f"checkpoint_{layout}") for layout in ("flash", "torch"))
    assert flash.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(flash.tensors[name], plain.tensors[name]) for name in flash.tensors)


@pytest.mark.numbers
def test_a_cell_has_the_same_output_alone_and_in_a_batch(model, cells):
    for cell, together in zip(cells, encode(model, cells), strict=True):
        assert_close(encode(model, [cell])[0], together, atol=1e-5)


@pytest.mark.numbers
def test_order_of_cells_does_not_matter(model, cells):
    order = np.random.default_rng(0).permutation(len(cells))
    together = encode(model, cells)
    for i, output in zip(order, encode(model, [cells[i] for i in order]), strict=True):
        assert_close(output, together[i], atol=1e-5)


@pytest.mark.numbers
def test_order_of_genes_does_not_matter_to_cls(model, cells):
    genes, values = cells[0]
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(len(genes) - 1)])
    assert_close(encode(model, [(genes[order], values[order])])[0][0], encode(model, [cells[0]])[0][0], atol=1e-5)


@pytest.mark.numbers
@pytest.mark.parametrize(
    "lengths", [[1], [3, 3, 3], [1, 5, 9], [9, 1, 5, 5, 1]], ids=["one token", "equal", "rising", "mixed"]
)
def test_packed_attention_equals_padded_attention_with_a_mask(lengths):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 2, 8, generator=generator) for _ in range(3))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (B, L)
    padded = []
    for x in (q, k, v):
        padded.append(torch.full((*real.shape, 2, 8), 7.0))  # what stands in the padding must not show
        padded[-1][real] = x
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in padded), attn_mask=real[:, None, None, :])
    assert_close(attention(q, k, v, Packing(lengths, q.device, "sdpa")), wanted.transpose(1, 2)[real], atol=1e-6)


@pytest.mark.numbers
@pytest.mark.parametrize("lengths", [[1], [3, 3, 3], [9, 1, 5, 5, 1]], ids=["one token", "equal", "mixed"])
def test_attention_from_the_first_token_alone_is_that_of_all(lengths):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 2, 8, generator=generator) for _ in range(3))
    cells = Packing(lengths, q.device, "sdpa")
    assert_close(attention(q[cells.starts], k, v, cells), attention(q, k, v, cells)[cells.starts], atol=1e-6)


@pytest.mark.numbers
def test_bfloat16_head_by_head_is_the_fused_attention():
    lengths = [LONG, LONG, LONG + 50]
    q, k, v = torch.randn(3, sum(lengths), 2, 16, generator=torch.Generator().manual_seed(0))
    cells = Packing(lengths, q.device, "sdpa")
    found = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cells)
    assert_close(found.float(), attention(q, k, v, cells), atol=0.01)


@pytest.mark.numbers
def test_cls_alone_is_that_of_the_whole_output(model, cells):
    lengths = [len(genes) for genes, _ in cells]
    genes, values = (torch.cat(parts) for parts in zip(*cells, strict=True))
    found = model(genes, values, lengths, cls_only=True)
    assert_close(found, np.stack([output[0] for output in encode(model, cells)]), atol=1e-5)


# Which attention runs

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_cpu_runs_sdpa_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO):
        assert choose_backend(CPU, torch.float32) == "sdpa"
    assert "attention: sdpa (chosen) for torch.float32 on cpu" in caplog.text


@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_error_says_why_a_selected_backend_cannot_run(monkeypatch, backend):
    monkeypatch.setenv("SCGPT_BATCH_ATTENTION", backend)
    with pytest.raises(ConfigError, match=f"is '{backend}', which needs a CUDA GPU, not cpu"):
        choose_backend(CPU, torch.bfloat16)
    with pytest.raises(ConfigError, match="needs half precision"):
        choose_backend(GPU, torch.float32)


def test_an_unknown_backend_is_rejected(monkeypatch, checkpoint):
    monkeypatch.setenv("SCGPT_BATCH_ATTENTION", "fast")
    with pytest.raises(ConfigError, match="'fast', but must be one of 'auto', 'flash', 'varlen', 'fa3', 'fa4', 'sdpa'"):
        build_model(checkpoint)


def test_an_old_gpu_supports_float32_but_not_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_backend(GPU, torch.float32) == "sdpa"
    with pytest.raises(
        ConfigError, match=r"bfloat16 needs a GPU of compute capability 8\.0 or higher, but this one has 7\.5"
    ):
        choose_backend(GPU, torch.bfloat16)


def test_a_new_gpu_runs_packed_attention_in_bfloat16_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_backend(GPU, torch.bfloat16) in ("flash", "varlen")
    assert choose_backend(GPU, torch.float32) == "sdpa"


@pytest.mark.parametrize(("backend", "module"), [("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")])
def test_fa3_and_fa4_need_hopper_and_their_package(monkeypatch, backend, module):
    monkeypatch.setenv("SCGPT_BATCH_ATTENTION", backend)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"needs compute capability 9\.0; an older card has 8\.6"):
        choose_backend(GPU, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match=f"needs the module {module}, which is not installed"):
        choose_backend(GPU, torch.bfloat16)


def test_fa3_is_used_only_if_selected(monkeypatch, caplog):
    activated = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_module, "_is_installed", lambda module: module != "flash_attn.flash_attn_interface")
    with caplog.at_level(logging.INFO):
        assert choose_backend(GPU, torch.bfloat16) == "varlen" and activated == []
    assert "fa3 is available too; select it with SCGPT_BATCH_ATTENTION=fa3" in caplog.text
    monkeypatch.setenv("SCGPT_BATCH_ATTENTION", "fa3")
    assert choose_backend(GPU, torch.bfloat16) == "fa3" and activated == ["FA3"]
    monkeypatch.setenv("SCGPT_BATCH_ATTENTION", "auto")
    monkeypatch.setitem(attention_module.ORDER, 9, ("fa4", "varlen", "sdpa"))
    assert choose_backend(GPU, torch.bfloat16) == "fa4" and activated == ["FA3", "FA4"]


@pytest.mark.parametrize(
    "values",
    [[-2.0, 1, 50, 1], [0.5, 3, 0.5], [1e6, 1, -2], [3e38, 1], []],
    ids=["bins", "halves", "far", "max", "none"],
)
def test_distinct_values_and_positions_give_the_values_back(values):
    given = torch.tensor(values)
    found, at = distinct(given)
    assert torch.equal(found[at], given) and len(found) <= 513 and at.dtype == torch.int64


def on_gpu(test):
    """Mark a test that needs CUDA kernels. On the CPU, the tests above check the same numbers; run `pytest -m gpu`."""
    reason = "needs a CUDA GPU: run `pytest -m gpu` on a machine that has one"
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)(test))


def backends_of_this_gpu():
    """Those that can run in bfloat16; all names where there is no GPU, for which the tests are skipped."""
    found = torch.cuda.is_available()
    return [name for name in BACKENDS if not (found and attention_module.obstacle(name, GPU, torch.bfloat16))]


@on_gpu
@pytest.mark.parametrize("backend", backends_of_this_gpu())
def test_every_backend_of_a_gpu_gives_upstreams_output(monkeypatch, checkpoint, cells, backend):
    monkeypatch.setenv("SCGPT_BATCH_ATTENTION", backend)
    wanted = golden("transformer")
    wanted = wanted["output"][~wanted["key_padding_mask"]]
    model = build_model(checkpoint, device="cuda", dtype=torch.bfloat16)
    found = np.concatenate(encode(model, cells))
    assert_close(found, wanted, atol=0.02)
    assert cosine(found, wanted).min() > 0.9999


@on_gpu
def test_float32_on_a_gpu_gives_upstreams_output(checkpoint, cells):
    wanted = golden("transformer")
    found = np.concatenate(encode(build_model(checkpoint, device="cuda"), cells))
    assert_close(found, wanted["output"][~wanted["key_padding_mask"]], atol=1e-4)


@pytest.mark.numbers
def test_self_attention_is_torchs_multihead_attention():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    ours = SelfAttention(16, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 6, 16)
    with torch.no_grad():
        assert_close(ours(x[0], Packing([6], x.device, "sdpa")), theirs(x, x, x, need_weights=False)[0][0], atol=1e-6)


def test_model_has_neither_gradients_nor_dropout(model):
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
