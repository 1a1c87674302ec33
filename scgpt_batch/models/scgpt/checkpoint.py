"""Read a checkpoint folder in the published layout, and refuse one that would give wrong numbers.

A folder holds `args.json`, `vocab.json` and the weights: `best_model.pt` (a plain state dict), or the same tensors
as `.safetensors`. Upstream's loader keeps the random initial value of every tensor that is missing or has another
shape; here each is an error.
"""

import hashlib
import logging
import pickle
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from scgpt_batch.errors import CheckpointError
from scgpt_batch.models.attention import choose_backend
from scgpt_batch.models.scgpt.config import ModelConfig
from scgpt_batch.models.scgpt.transformer import ScGPT
from scgpt_batch.models.scgpt.vocabulary import Vocabulary, read_json_object

logger = logging.getLogger(__name__)
WEIGHT_FILES = ("best_model.pt", "best_model.safetensors", "model.safetensors")

# Parts of the published model that embedding a gene or a cell does not use.
UNUSED_TENSORS = (
    "decoder.",
    "cls_decoder.",
    "mvc_decoder.",
    "flag_encoder.",
    "grad_reverse_discriminator.",
    "sim.",
    "creterion_cce.",  # upstream's spelling
)
NOT_BUILT_TENSORS = {
    "bn.": "batch normalisation",
    "dsbn.": "domain-specific batch normalisation",
    "batch_encoder.": "batch labels",
}


class Checkpoint:
    """A checkpoint folder: its shape and vocabulary are read at once, its tensors when they are first asked for.

    Attributes
    ----------
    config, vocabulary
        From args.json and vocab.json.
    digest
        SHA-256 over the three files; the model's identity in caches, tags and tables.
    tensors
        The tensors that the model uses, under the names of `ScGPT`, float32 on the CPU.
    ignored
        Names in the weights file that are known to be unused, or unknown.
    """

    def __init__(self, folder: str | Path, *, digest: str | None = None) -> None:
        """Read args.json and vocab.json; a known `digest` saves reading the weights for it now.

        Raises
        ------
        CheckpointError
            A file is missing or unreadable, or args.json asks for a part that is not built here.
        """
        self.folder = Path(folder)
        self.weights = weights_file(self.folder)
        self.config = ModelConfig.from_args(read_json_object(_existing(self.folder / "args.json")))
        self.vocabulary = Vocabulary.from_file(_existing(self.folder / "vocab.json"))
        self.digest = digest or checkpoint_digest(self.folder)
        self._digest_is_checked = digest is None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return self._read[0]

    @property
    def ignored(self) -> tuple[str, ...]:
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
        """Read and check the weights file; a CheckpointError says what does not fit."""
        if not self._digest_is_checked and (found := checkpoint_digest(self.folder)) != self.digest:
            raise CheckpointError(f"{self.folder} has digest {found[:12]}, {self.digest[:12]} was registered")
        state = _read_state(self.weights)
        expected = _expected_shapes(self.config, len(self.vocabulary))
        self._refuse_wrong_tensors(state, expected)
        ignored = sorted(set(state) - set(expected))
        unknown = [name for name in ignored if not name.startswith(UNUSED_TENSORS)]
        if unknown:
            logger.warning("%s: %d unknown tensors not used, first %r", self.weights, len(unknown), unknown[0])
        logger.info(
            "%s: loaded %d of %d tensors (%d layers, d %d, %d tokens), digest %s",
            self.folder, len(expected), len(expected), self.config.nlayers, self.config.embsize,
            len(self.vocabulary), self.digest[:12],
        )  # fmt: skip
        return {name: state[name].float() for name in expected}, tuple(ignored)

    def _refuse_wrong_tensors(self, state: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> None:
        """Refuse tensors that are missing, of layers beyond the stated ones, of another shape or not finite."""
        missing = sorted(set(expected) - set(state))
        if missing:
            raise CheckpointError(
                f"{self.weights} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r}; "
                "upstream would leave them random"
            )
        layers = {name.split(".")[2] for name in state if name.startswith("transformer_encoder.layers.")}
        if len(layers) > self.config.nlayers:
            raise CheckpointError(
                f"{self.weights} has tensors of {len(layers)} layers, args.json says nlayers {self.config.nlayers}: "
                "the last layers would be left out; take the args.json of these weights"
            )
        rows = state["encoder.embedding.weight"].shape[0]
        if rows != len(self.vocabulary):
            raise CheckpointError(
                f"{self.folder / 'vocab.json'} has {len(self.vocabulary)} tokens (special tokens included), but "
                f"'encoder.embedding.weight' has {rows} rows: they are not of one model"
            )
        for name, shape in expected.items():
            if tuple(state[name].shape) != shape:
                raise CheckpointError(
                    f"{self.weights}: tensor {name!r} has shape {tuple(state[name].shape)}, args.json and vocab.json "
                    f"want {shape}"
                )
            if not state[name].is_floating_point():
                raise CheckpointError(
                    f"{self.weights}: tensor {name!r} is of type {state[name].dtype}, not a float type"
                )
            if not torch.isfinite(state[name]).all():
                raise CheckpointError(f"{self.weights}: tensor {name!r} holds NaN or infinity")


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Read and check a checkpoint folder with its tensors.

    Raises
    ------
    CheckpointError
        A file is missing or unreadable, a tensor is missing or has another shape, the vocabulary does not fit the
        embedding table, or args.json asks for a part that is not built here.
    """
    checkpoint = Checkpoint(folder)
    checkpoint.tensors  # noqa: B018  # reads and checks them now
    return checkpoint


def build_model(checkpoint: Checkpoint, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ScGPT:
    """Build the model with a checkpoint's weights, in evaluation mode.

    Parameters
    ----------
    dtype
        Type of the transformer layers' matrix products; embedding tables, sums and norms stay float32.

    Raises
    ------
    CheckpointError
        The tensors do not fit the model.
    """
    with torch.device("meta"):
        model = ScGPT(checkpoint.config, len(checkpoint.vocabulary))
    model.load_state_dict(_matrices_as(checkpoint.tensors, dtype), strict=True, assign=True)
    model.backend = choose_backend(torch.device(device), dtype)
    return model.to(device).eval().requires_grad_(False)


def checkpoint_digest(folder: str | Path) -> str:
    """Return the SHA-256 over args.json, vocab.json and the weights file, in hexadecimal."""
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in (_existing(folder / "args.json"), _existing(folder / "vocab.json"), weights_file(folder)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def weights_file(folder: Path) -> Path:
    """Return the folder's weights file; a CheckpointError says which names are looked for."""
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder at {folder}")
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if len(found) != 1:
        raise CheckpointError(
            f"{folder} must hold exactly one weights file of {', '.join(WEIGHT_FILES)}; it holds "
            f"{', '.join(path.name for path in found) or 'none'}"
        )
    return found[0]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"the checkpoint has no {path.name}: looked for {path}")
    return path


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # not needed for the published layout

            state: Any = load_file(path)
        else:
            # weights_only: an unpickler that can run code is never used
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:  # torch's message advises to load the file unsafely
        what = re.search(r"GLOBAL (\S+)", str(exc))
        objects = f", {what[1]} among them" if what else ""
        raise CheckpointError(
            f"{path} cannot be read as tensors: it holds other Python objects{objects}, which may run code when they "
            "are loaded; write it anew with torch.save(model.state_dict(), ...)"
        ) from None
    except Exception as exc:  # torch and safetensors raise many types for one fact: the file is no state dict
        raise CheckpointError(f"{path} cannot be read as tensors: {exc}") from exc
    if isinstance(state, dict) and any(torch.is_tensor(t) and t.layout != torch.strided for t in state.values()):
        raise CheckpointError(f"{path} holds sparse tensors: only dense ones are read")
    if not isinstance(state, dict) or not all(isinstance(n, str) and torch.is_tensor(t) for n, t in state.items()):
        raise CheckpointError(f"{path} is no plain state dict (tensor name -> tensor)")
    return state


def _read_state(weights: Path) -> dict[str, torch.Tensor]:
    """Read the weights under the names of `ScGPT`; refuse what is there twice or belongs to a part not built here."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in _read_tensors(weights).items():
        if _our_name(name) in state:
            raise CheckpointError(f"{weights} holds {_our_name(name)!r} twice: in both key layouts")
        state[_our_name(name)] = tensor
    for name in state:
        for prefix, part in NOT_BUILT_TENSORS.items():
            if name.startswith(prefix):
                raise CheckpointError(f"{weights} has tensor {name!r}: the model uses {part}, not built here")
    return state


def _our_name(name: str) -> str:
    """Translate upstream's two key layouts: with flash attention, Wqkv; without, in_proj_.

    Both hold one (3d, d) matrix with the rows of q, k and v in this order.
    """
    return name.replace("self_attn.Wqkv.", "self_attn.in_proj_")


def _expected_shapes(config: ModelConfig, n_tokens: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = ScGPT(config, n_tokens)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _matrices_as(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: tensor.to(dtype) if name.startswith("transformer_encoder.") and ".norm" not in name else tensor
        for name, tensor in tensors.items()
    }
