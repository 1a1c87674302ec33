"""Checkpoint folders: both published layouts load, and one that would give wrong numbers is refused by name."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scgpt_batch.errors import CheckpointError
from scgpt_batch.models.scgpt.checkpoint import build_model, checkpoint_digest, load_checkpoint
from scgpt_batch.models.scgpt.config import ModelConfig
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from tests.helpers import assert_close
from tests.paths import GOLDEN

LAYOUTS = ("flash", "torch")
EMBEDDING = "encoder.embedding.weight"
WQKV = "transformer_encoder.layers.1.self_attn.Wqkv.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the checkpoint in the published key layout, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "checkpoint_flash", tmp_path / "checkpoint"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "best_model.pt", weights_only=True)


def change_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    state = tensors(folder)
    change(state)
    torch.save(state, folder / "best_model.pt")


def change_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def assert_same_weights(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_close(found[name], wanted[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layout_loads(layout):
    checkpoint = load_checkpoint(GOLDEN / f"checkpoint_{layout}")
    assert checkpoint.config == ModelConfig(embsize=64, nheads=4, d_hid=128, nlayers=3, n_layers_cls=3, pad_value=-2)
    assert len(checkpoint.vocabulary) == 2503
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float32}
    build_model(checkpoint)


def test_both_key_layouts_hold_the_same_weights():
    flash, plain = (load_checkpoint(GOLDEN / f"checkpoint_{layout}") for layout in LAYOUTS)
    assert_same_weights(flash.tensors, plain.tensors)
    assert flash.digest != plain.digest
    wanted = tensors(GOLDEN / "checkpoint_flash")[WQKV]
    assert_close(flash.tensors["transformer_encoder.layers.1.self_attn.in_proj_weight"], wanted)


@pytest.mark.parametrize("name", ["model.safetensors", "best_model.safetensors"])
def test_safetensors_hold_the_same_weights(folder, name):
    wanted = load_checkpoint(folder).tensors
    save_file(tensors(folder), folder / name)
    (folder / "best_model.pt").unlink()
    assert_same_weights(load_checkpoint(folder).tensors, wanted)


def test_half_precision_weights_are_widened(folder):
    wanted = load_checkpoint(folder).tensors
    change_tensors(folder, lambda state: state.update({name: tensor.half() for name, tensor in state.items()}))
    found = load_checkpoint(folder).tensors
    assert found[EMBEDDING].dtype == torch.float32
    assert_close(found[EMBEDDING], wanted[EMBEDDING], rtol=1e-3, atol=1e-6)


# Tensors


@pytest.mark.parametrize(
    "name",
    [EMBEDDING, "encoder.enc_norm.bias", "value_encoder.linear2.weight", WQKV],
    ids=["embedding", "norm", "value encoder", "attention"],
)
def test_missing_tensor_is_named(folder, name):
    change_tensors(folder, lambda state: state.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks 1 of 45 tensors, first: '{name.replace('Wqkv.', 'in_proj_')}'"):
        load_checkpoint(folder)


def test_missing_layer_is_named(folder):
    change_json(folder / "args.json", nlayers=4)
    with pytest.raises(CheckpointError, match=r"lacks 12 of 57 tensors, first: 'transformer_encoder\.layers\.3\."):
        load_checkpoint(folder)


def test_more_layers_than_stated_are_rejected(folder):
    change_json(folder / "args.json", nlayers=2)
    with pytest.raises(CheckpointError, match=r"has 3 layers, but args\.json has nlayers 2"):
        load_checkpoint(folder)


def test_a_whole_pad_value_may_be_written_as_a_float(folder):
    change_json(folder / "args.json", pad_value=-2.0)
    assert load_checkpoint(folder).config.pad_value == -2


@pytest.mark.parametrize(("name", "args"), [(WQKV, {}), ("linear1", {"d_hid": 64})], ids=["tensor", "args.json"])
def test_wrong_shape_is_named(folder, name, args):
    change_json(folder / "args.json", **args)
    if not args:
        change_tensors(folder, lambda state: state.update({name: state[name].T}))
    with pytest.raises(CheckpointError, match=f"{name.replace('Wqkv.', 'in_proj_')}.* has the shape .* require"):
        load_checkpoint(folder)


def test_tensor_in_both_key_layouts_is_rejected(folder):
    twin = WQKV.replace("Wqkv.", "in_proj_")
    change_tensors(folder, lambda state: state.update({twin: state[WQKV]}))
    with pytest.raises(CheckpointError, match=f"contains '{twin}' twice"):
        load_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_tensor_that_is_not_finite_is_named(folder, value):
    change_tensors(folder, lambda state: state[WQKV].__setitem__((3, 5), value))
    with pytest.raises(CheckpointError, match=r"'transformer_encoder.layers.1.self_attn.in_proj_weight' contains NaN"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("bn.weight", "batch normalisation"),
        ("dsbn.bns.0.weight", "domain-specific batch normalisation"),
        ("batch_encoder.embedding.weight", "batch labels"),
    ],
)
def test_tensor_of_a_part_that_is_not_built_is_named(folder, name, part):
    change_tensors(folder, lambda state: state.update({name: torch.ones(64)}))
    with pytest.raises(CheckpointError, match=f"{name}.*{part} is not supported"):
        load_checkpoint(folder)


def test_unknown_tensors_are_reported(folder, caplog):
    change_tensors(folder, lambda state: state.update({"adapter.0": torch.ones(1), "adapter.1": torch.ones(1)}))
    checkpoint = load_checkpoint(folder)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "2 unknown tensors are ignored, first: 'adapter.0'" in warnings[0]
    assert {"adapter.0", "adapter.1"} <= set(checkpoint.ignored)


def test_known_unused_tensors_are_not_reported(caplog):
    checkpoint = load_checkpoint(GOLDEN / "checkpoint_flash")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert {"flag_encoder.weight", "decoder.fc.0.weight", "mvc_decoder.W.weight"} <= set(checkpoint.ignored)
    assert not set(checkpoint.ignored) & set(checkpoint.tensors)


def test_the_log_says_how_much_was_loaded(caplog):
    with caplog.at_level(logging.INFO, logger="scgpt_batch"):
        checkpoint = load_checkpoint(GOLDEN / "checkpoint_torch")
    assert "loaded 45 of 45 tensors" in caplog.text
    assert checkpoint.digest[:12] in caplog.text


# args.json


@pytest.mark.parametrize(
    "args",
    [
        {"pre_norm": True},
        {"domain_spec_batchnorm": True},
        {"domain_spec_batchnorm": "dsbn"},
        {"DSBN": True},
        {"use_batch_labels": True},
        {"input_emb_style": "category"},
        {"input_emb_style": "scaling"},
        {"input_style": "log1p"},
        {"cell_emb_style": "avg-pool"},
        {"explicit_zero_prob": True},
    ],
    ids=lambda args: "{}={!r}".format(*next(iter(args.items()))),
)
def test_what_is_not_built_is_named(folder, args):
    change_json(folder / "args.json", **args)
    with pytest.raises(CheckpointError, match=f"args.json has {next(iter(args))} = "):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"embsize": ...}, "embsize must be a whole number, not None"),
        ({"nheads": ...}, "nheads must be a whole number"),
        ({"d_hid": "128"}, "d_hid must be a whole number, not '128'"),
        ({"nlayers": 3.0}, r"nlayers must be a whole number, not 3\.0"),
        ({"nlayers": True}, "nlayers must be a whole number, not True"),
        ({"nlayers": 0}, "nlayers must be at least 1 and at most 256, not 0"),
        ({"nheads": 5}, "embsize 64 must be a multiple of nheads 5"),
        ({"nlayers": 10**9}, "nlayers must be at least 1 and at most 256, not 1000000000"),
        ({"embsize": 2**40, "nheads": 2**20}, "embsize must be at least 1 and at most 16384"),
        ({"nheads": 2**20, "embsize": 2**14}, "nheads must be at least 1 and at most 1024"),
        ({"d_hid": 10**30}, "d_hid must be at least 1 and at most 65536"),
        ({"pad_value": 10**30}, "pad_value must be between -2\^24 and 2\^24"),
        ({"pad_value": None}, "pad_value must be a whole number"),
        ({"pad_value": -2.5}, r"pad_value must be a whole number, not -2\.5"),
        ({"pad_token": "<mask>"}, "pad_token must be '<pad>', not '<mask>'"),
    ],
    ids=str,
)
def test_fault_of_args_is_named(folder, args, message):
    change_json(folder / "args.json", **args)
    with pytest.raises(CheckpointError, match=f"args.json: {message}"):
        load_checkpoint(folder)


def test_args_that_say_nothing_of_unbuilt_parts_are_fine(folder):
    change_json(
        folder / "args.json", input_style=..., input_emb_style=None, pre_norm=False, n_layers_cls=..., pad_value=...
    )
    assert load_checkpoint(folder).config == load_checkpoint(GOLDEN / "checkpoint_flash").config


# vocab.json


def test_vocabulary_comes_in_any_order(folder):
    ids = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(dict(sorted(ids.items()))))
    assert load_checkpoint(folder).vocabulary.tokens == load_checkpoint(GOLDEN / "checkpoint_flash").vocabulary.tokens


def test_longer_vocabulary_is_rejected(folder):
    change_json(folder / "vocab.json", ANOTHER=2503)
    with pytest.raises(CheckpointError, match=f"has 2504 tokens .* '{EMBEDDING}' has 2503 rows"):
        load_checkpoint(folder)


def test_shorter_vocabulary_is_rejected(folder):
    change_tensors(folder, lambda state: state.update({EMBEDDING: torch.ones(2510, 64)}))
    with pytest.raises(CheckpointError, match=f"has 2503 tokens .* '{EMBEDDING}' has 2510 rows"):
        load_checkpoint(folder)


def test_missing_special_tokens_follow_the_genes(folder):
    change_json(folder / "vocab.json", **{"<pad>": ..., "<cls>": ..., "<eoc>": ...})
    vocabulary = load_checkpoint(folder).vocabulary
    assert vocabulary.tokens[2500:] == ("<pad>", "<cls>", "<eoc>")
    assert (vocabulary.pad_id, vocabulary.cls_id) == (2500, 2501)


def test_special_tokens_without_vectors_are_rejected(folder):
    change_json(folder / "vocab.json", **{"<pad>": ..., "<cls>": ..., "<eoc>": ...})
    change_tensors(folder, lambda state: state.update({EMBEDDING: state[EMBEDDING][:2500]}))
    with pytest.raises(CheckpointError, match=r"has 2503 tokens \(including special tokens\).* has 2500 rows"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"A": 1, "B": 2}, "0 to 1, each once; 'A' has id 1 instead of 0"),
        ({"A": 0, "B": 0}, "'B' has id 0 instead of 1"),
        ({"A": 0, "B": 2}, "'B' has id 2 instead of 1"),
        ({"A": -1, "B": 0}, "'A' has id -1 instead of 0"),
        ({"A": 0, "B": "1"}, "the id of 'B' is '1', not a whole number"),
        ({"A": 0, "B": 1.0}, r"the id of 'B' is 1\.0, not a whole number"),
        ({"A": 0, "B": True}, "the id of 'B' is True, not a whole number"),
        ({"A": 0, "B": None}, "the id of 'B' is None, not a whole number"),
    ],
    ids=["from 1", "twice", "gap", "negative", "text", "float", "bool", "null"],
)
def test_fault_of_the_vocabulary_is_named(ids, message):
    with pytest.raises(CheckpointError, match=message):
        Vocabulary(ids)


def test_ids_of_names():
    vocabulary = Vocabulary({"B": 1, "A": 0})
    for _ in range(2):
        found = vocabulary.ids(["B", "A", "b", "<cls>", "<pad>", ""])
        assert found.tolist() == [1, 0, -1, -1, -1, -1]
        found[:] = 7  # the caller's own
    assert vocabulary.ids([]).tolist() == []
    assert len(vocabulary) == 5 and "B" in vocabulary and "b" not in vocabulary


# Files


@pytest.mark.parametrize("name", ["args.json", "vocab.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ("[" * 100_000, "is not JSON"),
        ('{"GENE": 0, "GENE": 1}', "has the key 'GENE' twice"),
    ],
    ids=["cut short", "UTF-16", "list", "deep", "key twice"],
)
def test_json_that_is_none_is_named(folder, name, text, message):
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["args.json", "vocab.json"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"the checkpoint folder has no {name} \(expected at"):
        load_checkpoint(folder)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint folder {tmp_path / 'nowhere'}"):
        load_checkpoint(tmp_path / "nowhere")


def test_folder_without_weights_is_rejected(folder):
    (folder / "best_model.pt").unlink()
    with pytest.raises(CheckpointError, match=r"exactly one of best_model\.pt, .*, but contains none"):
        load_checkpoint(folder)


def test_folder_with_two_weights_files_is_rejected(folder):
    save_file(tensors(folder), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"but contains best_model\.pt, model\.safetensors"):
        load_checkpoint(folder)


class RunsCode:
    """What an attacker pickles: unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_pickle_that_would_run_code_is_rejected(folder, tmp_path):
    torch.save(tensors(folder) | {"hook": RunsCode(tmp_path / "pwned")}, folder / "best_model.pt")
    with pytest.raises(CheckpointError, match=r"best_model\.pt cannot be read as tensors: .*posix.mkdir") as caught:
        load_checkpoint(folder)
    assert "weights_only" not in str(caught.value) and "allowlist" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64], ids=str)
def test_weights_must_have_a_float_type(folder, dtype):
    change_tensors(folder, lambda state: state.update({EMBEDDING: state[EMBEDDING].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{EMBEDDING}' has the type {dtype}, not a float type"):
        load_checkpoint(folder)


def test_sparse_weights_are_rejected(folder):
    change_tensors(folder, lambda state: state.update({EMBEDDING: state[EMBEDDING].to_sparse()}))
    with pytest.raises(CheckpointError, match="sparse tensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    [[torch.ones(1)], torch.ones(1), {"model": {"a": torch.ones(1)}}, {"epoch": 3}, {0: torch.ones(1)}],
    ids=["list", "tensor", "nested", "number", "number for a name"],
)
def test_weights_must_be_a_state_dict(folder, content):
    torch.save(content, folder / "best_model.pt")
    with pytest.raises(CheckpointError, match="is not a state dict"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["best_model.pt", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a model"], ids=["empty", "text"])
def test_unreadable_weights_are_rejected(folder, name, content):
    (folder / "best_model.pt").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read as tensors"):
        load_checkpoint(folder)


def test_digest_tells_every_file(folder):
    digests = {checkpoint_digest(folder)}
    change_json(folder / "args.json", lr=0.1)
    digests.add(checkpoint_digest(folder))
    change_json(folder / "vocab.json", **{"<eoc>": ...})
    digests.add(checkpoint_digest(folder))
    change_tensors(folder, lambda state: state[WQKV].add_(1))
    digests.add(checkpoint_digest(folder))
    assert len(digests) == 4
    assert load_checkpoint(folder).digest in digests


def test_digest_is_that_of_the_content_alone(folder):
    assert checkpoint_digest(folder) == checkpoint_digest(GOLDEN / "checkpoint_flash")
