"""scGPT in plain torch: vocabulary, checkpoint, transformer.

Requires only torch and numpy, and safetensors for `.safetensors` files.
"""

from scgpt_batch.models.scgpt.checkpoint import Checkpoint, build_model, checkpoint_digest, load_checkpoint
from scgpt_batch.models.scgpt.config import ModelConfig
from scgpt_batch.models.scgpt.transformer import ScGPT
from scgpt_batch.models.scgpt.vocabulary import SPECIAL_TOKENS, Vocabulary

__all__ = [
    "SPECIAL_TOKENS",
    "Checkpoint",
    "ModelConfig",
    "ScGPT",
    "Vocabulary",
    "build_model",
    "checkpoint_digest",
    "load_checkpoint",
]
