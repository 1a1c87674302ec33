"""Loading of a checkpoint folder in the published layout, with checks that prevent wrong embeddings.

A folder contains `args.json`, `vocab.json` and the weights: `best_model.pt` (a plain state dict), or the same tensors
as `.safetensors`. A tensor that is missing or has another shape is an error; upstream's loader keeps its random initial
values instead.
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

# Parts of the published model that are not used to compute embeddings.
UNUSED_TENSORS = (
    "decoder.",
    "cls_decoder.",
    "mvc_decoder.",
    "flag_encoder.",
    "grad_reverse_discriminator.",
    "sim.",
    "creterion_cce.",  # upstream's spelling
)
UNSUPPORTED_TENSORS = {
    "bn.": "batch normalisation",
    "dsbn.": "domain-specific batch normalisation",
    "batch_encoder.": "batch labels",
}


class Checkpoint:
    """A checkpoint folder. Configuration and vocabulary are read at once, the tensors when they are first used.

    Attributes
    ----------
    config, vocabulary
        Content of args.json and vocab.json.
    digest
        SHA-256 of the three files, which identifies the model in caches, tags and tables.
    tensors
        The tensors that the model uses, named as in `ScGPT`, float32 on the CPU.
    ignored
        Names of tensors in the weights file that the model does not use.
    """

    def __init__(self, folder: str | Path, *, digest: str | None = None) -> None:
        """Read args.json and vocab.json.

        Parameters
        ----------
        folder
            The checkpoint folder.
        digest
            The digest, if known. The weights are then not read now; the digest is verified when they are.

        Raises
        ------
        CheckpointError
            A file is missing or unreadable, or args.json selects a part that this package does not support.
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
        """The used tensors and the names of the others, read from the weights file and checked."""
        if not self._digest_is_checked and (found := checkpoint_digest(self.folder)) != self.digest:
            raise CheckpointError(
                f"{self.folder} has the digest {found[:12]}, but {self.digest[:12]} was registered; its files have "
                "changed, register the model again"
            )
        state = _read_state(self.weights)
        expected = _expected_shapes(self.config, len(self.vocabulary))
        self._check_tensors(state, expected)
        ignored = sorted(set(state) - set(expected))
        unknown = [name for name in ignored if not name.startswith(UNUSED_TENSORS)]
        if unknown:
            logger.warning("%s: %d unknown tensors are ignored, first: %r", self.weights, len(unknown), unknown[0])
        logger.info(
            "%s: loaded %d of %d tensors (%d layers, d %d, %d tokens), digest %s",
            self.folder, len(expected), len(expected), self.config.nlayers, self.config.embsize,
            len(self.vocabulary), self.digest[:12],
        )  # fmt: skip
        return {name: state[name].float() for name in expected}, tuple(ignored)

    def _check_tensors(self, state: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> None:
        """Check that all tensors are there, match args.json and vocab.json, and are finite floats."""
        missing = sorted(set(expected) - set(state))
        if missing:
            raise CheckpointError(
                f"{self.weights} lacks {len(missing)} of {len(expected)} tensors, first: {missing[0]!r}; use the "
                "args.json of these weights, or download the checkpoint again"
            )
        layers = {name.split(".")[2] for name in state if name.startswith("transformer_encoder.layers.")}
        if len(layers) > self.config.nlayers:
            raise CheckpointError(
                f"{self.weights} has {len(layers)} layers, but args.json has nlayers {self.config.nlayers}; use the "
                "args.json of these weights"
            )
        rows = state["encoder.embedding.weight"].shape[0]
        if rows != len(self.vocabulary):
            raise CheckpointError(
                f"{self.folder / 'vocab.json'} has {len(self.vocabulary)} tokens (including special tokens), but "
                f"'encoder.embedding.weight' has {rows} rows; use the vocab.json of these weights"
            )
        for name, shape in expected.items():
            self._check_tensor(name, state[name], shape)

    def _check_tensor(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.weights}: tensor {name!r} has the shape {tuple(tensor.shape)}, but args.json and vocab.json "
                f"require {shape}; use the files of one checkpoint"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.weights}: tensor {name!r} has the type {tensor.dtype}, not a float type")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self.weights}: tensor {name!r} contains NaN or infinity; use other weights")


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Return a checkpoint whose tensors have been read and checked.

    Raises
    ------
    CheckpointError
        A file is missing or unreadable, a tensor is missing or has another shape, the vocabulary size differs from the
        embedding table, or args.json selects a part that this package does not support.

    Examples
    --------
    >>> checkpoint = load_checkpoint("checkpoints/scgpt-human")
    >>> model = build_model(checkpoint)
    >>> model.gene_vectors(torch.from_numpy(checkpoint.vocabulary.ids(["CD3D", "LYZ"]))).shape
    torch.Size([2, 512])
    """
    checkpoint = Checkpoint(folder)
    checkpoint.tensors  # noqa: B018  # reads and checks the weights file
    return checkpoint


def build_model(checkpoint: Checkpoint, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ScGPT:
    """Return the model with the weights of a checkpoint, in evaluation mode.

    Parameters
    ----------
    checkpoint
        The checkpoint.
    device
        Device of the model, such as "cpu" or "cuda:0".
    dtype
        Type of the matrix products in the transformer layers. Embedding tables, sums and norms are always float32.

    Raises
    ------
    CheckpointError
        See `load_checkpoint`.
    ConfigError
        The device does not support `dtype`, see `choose_backend`.
    """
    with torch.device("meta"):
        model = ScGPT(checkpoint.config, len(checkpoint.vocabulary))
    model.load_state_dict(_matrices_as(checkpoint.tensors, dtype), strict=True, assign=True)
    model.backend = choose_backend(torch.device(device), dtype)
    return model.to(device).eval().requires_grad_(False)


def checkpoint_digest(folder: str | Path) -> str:
    """Return the SHA-256 of args.json, vocab.json and the weights file, in hexadecimal."""
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in (_existing(folder / "args.json"), _existing(folder / "vocab.json"), weights_file(folder)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def weights_file(folder: Path) -> Path:
    """Return the weights file of a checkpoint folder.

    Raises
    ------
    CheckpointError
        There is no weights file, or more than one.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if len(found) != 1:
        raise CheckpointError(
            f"{folder} must contain exactly one of {', '.join(WEIGHT_FILES)}, but contains "
            f"{', '.join(path.name for path in found) or 'none'}"
        )
    return found[0]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"the checkpoint folder has no {path.name} (expected at {path})")
    return path


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # not needed for the published layout

            state: Any = load_file(path)
        else:
            # weights_only: without it, loading the file could run code
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:  # not quoted: torch's message advises to load the file unsafely
        what = re.search(r"GLOBAL (\S+)", str(exc))
        objects = f" ({what[1]})" if what else ""
        raise CheckpointError(
            f"{path} cannot be read as tensors: it contains other Python objects{objects}, which can run code when "
            "they are loaded; write the file again with torch.save(model.state_dict(), ...)"
        ) from None
    except Exception as exc:  # torch and safetensors raise many exception types for damaged files
        raise CheckpointError(f"{path} cannot be read as tensors: {exc}") from exc
    if isinstance(state, dict) and any(torch.is_tensor(t) and t.layout != torch.strided for t in state.values()):
        raise CheckpointError(f"{path} contains sparse tensors; convert them with .to_dense()")
    if not isinstance(state, dict) or not all(isinstance(n, str) and torch.is_tensor(t) for n, t in state.items()):
        raise CheckpointError(f"{path} is not a state dict; write it with torch.save(model.state_dict(), ...)")
    return state


def _read_state(weights: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a weights file, named as in `ScGPT`.

    Repeated tensors, and tensors of parts that this package does not support, are an error.
    """
    state: dict[str, torch.Tensor] = {}
    for name, tensor in _read_tensors(weights).items():
        if _our_name(name) in state:
            raise CheckpointError(
                f"{weights} contains {_our_name(name)!r} twice, with and without flash attention; remove one of them"
            )
        state[_our_name(name)] = tensor
    for name in state:
        for prefix, part in UNSUPPORTED_TENSORS.items():
            if name.startswith(prefix):
                raise CheckpointError(f"{weights} has the tensor {name!r}: {part} is not supported")
    return state


def _our_name(name: str) -> str:
    """Return the name of a tensor in `ScGPT`.

    With flash attention, upstream names the input projection Wqkv, and without it in_proj. Both are one (3d, d) matrix
    with the rows of q, k and v in this order.
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
