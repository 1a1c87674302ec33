"""The dimensions of an scGPT model, read from `args.json` of its checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scgpt_batch.errors import CheckpointError
from scgpt_batch.models.scgpt.vocabulary import PAD

# Keys of args.json that select optional parts of upstream's model, and the values that this package supports.
SUPPORTED = {
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

# Upper limits, about twenty times the published model. Larger values are rejected before any memory is allocated.
LARGEST = {"embsize": 16_384, "nheads": 1_024, "d_hid": 65_536, "nlayers": 256}


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions of the model, named as in args.json."""

    embsize: int  # width d of all embeddings
    nheads: int
    d_hid: int  # width of the feed-forward layers
    nlayers: int
    n_layers_cls: int = 3  # layers of the classifier, which embeddings do not use; only checked against a parameter
    pad_value: int = -2  # value of the <cls> token

    def __post_init__(self) -> None:
        for name in ("embsize", "nheads", "d_hid", "nlayers"):
            if not 1 <= getattr(self, name) <= LARGEST[name]:
                raise CheckpointError(
                    f"args.json: {name} must be at least 1 and at most {LARGEST[name]}, not {getattr(self, name)}"
                )
        if not -(2**24) <= self.pad_value <= 2**24:
            raise CheckpointError(f"args.json: pad_value must be between -2^24 and 2^24, not {self.pad_value}")
        if self.embsize % self.nheads:
            raise CheckpointError(f"args.json: embsize {self.embsize} must be a multiple of nheads {self.nheads}")

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "ModelConfig":
        """Return the dimensions stated in args.json.

        Raises
        ------
        CheckpointError
            A value is missing, invalid, or selects a part of the model that this package does not support.
        """
        for key, allowed in SUPPORTED.items():
            if args.get(key) not in allowed:
                raise CheckpointError(
                    f"args.json has {key} = {args[key]!r}; this package supports only {key} = {allowed[0]!r}"
                )
        if args.get("pad_token", PAD) != PAD:
            raise CheckpointError(f"args.json: pad_token must be {PAD!r}, not {args['pad_token']!r}")
        values = {}
        for name in ("embsize", "nheads", "d_hid", "nlayers", "n_layers_cls", "pad_value"):
            value = args.get(name, getattr(cls, name, None))
            if name == "pad_value" and isinstance(value, float) and value.is_integer():
                value = int(value)  # some checkpoints state -2.0
            if not isinstance(value, int) or isinstance(value, bool):
                raise CheckpointError(f"args.json: {name} must be a whole number, not {value!r}")
            values[name] = value
        return cls(**values)
