"""The shape of an scGPT model, from the `args.json` of its checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scgpt_batch.errors import CheckpointError
from scgpt_batch.models.scgpt.vocabulary import PAD

# args.json keys that ask for a part that is not built here, with the values that do not.
BUILT = {
    "pre_norm": (False, None),
    "use_batch_labels": (False, None),
    "domain_spec_batchnorm": (False, None),
    "DSBN": (False, None),
    "input_emb_style": ("continuous", None),
    "input_style": ("binned", None),
    "cell_emb_style": ("cls", None),
    "fast_transformer_backend": ("flash", None),
    "explicit_zero_prob": (False, None),
}

# Bounds of args.json, some twenty times the published model's: beyond, no weights are looked at.
LARGEST = {"embsize": 16_384, "nheads": 1_024, "d_hid": 65_536, "nlayers": 256}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model, with the names that args.json uses."""

    embsize: int  # width d of all embeddings
    nheads: int
    d_hid: int  # width of the feed-forward layers
    nlayers: int
    n_layers_cls: int = 3  # of the classifier, which is not built; kept to compare with what a caller states
    pad_value: int = -2  # the value that <cls> carries

    def __post_init__(self) -> None:
        for name in ("embsize", "nheads", "d_hid", "nlayers"):
            if not 1 <= getattr(self, name) <= LARGEST[name]:
                raise CheckpointError(
                    f"args.json: {name} must be at least 1 and at most {LARGEST[name]}, not {getattr(self, name)}"
                )
        if not -(2**24) <= self.pad_value <= 2**24:
            raise CheckpointError(f"args.json: pad_value must be a number that float32 holds, not {self.pad_value}")
        if self.embsize % self.nheads:
            raise CheckpointError(f"args.json: embsize {self.embsize} is no multiple of nheads {self.nheads}")

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "ModelConfig":
        """Take the model's shape from args.json; refuse keys that ask for what is not built."""
        for key, allowed in BUILT.items():
            if args.get(key) not in allowed:
                raise CheckpointError(
                    f"args.json asks for {key} = {args[key]!r}; this package builds {key} = {allowed[0]!r} only"
                )
        if args.get("pad_token", PAD) != PAD:
            raise CheckpointError(f"args.json: pad_token must be {PAD!r}, not {args['pad_token']!r}")
        values = {}
        for name in ("embsize", "nheads", "d_hid", "nlayers", "n_layers_cls", "pad_value"):
            value = args.get(name, getattr(cls, name, None))
            if name == "pad_value" and isinstance(value, float) and value.is_integer():
                value = int(value)  # a value of X, which some write as -2.0
            if not isinstance(value, int) or isinstance(value, bool):
                raise CheckpointError(f"args.json: {name} must be a whole number, not {value!r}")
            values[name] = value
        return cls(**values)
