"""scGPT itself in plain torch: vocabulary, checkpoint, transformer, attention.

Needs torch and numpy alone (safetensors only for `.safetensors` files); knows no AnnData, Spark or MLflow.
"""

from scgpt_batch.model.attention import send
from scgpt_batch.model.checkpoint import Checkpoint, ModelConfig, checkpoint_digest, load_checkpoint
from scgpt_batch.model.transformer import ScGPT
from scgpt_batch.model.vocabulary import SPECIAL_TOKENS, Vocabulary

__all__ = [
    "SPECIAL_TOKENS",
    "Checkpoint",
    "ModelConfig",
    "ScGPT",
    "Vocabulary",
    "checkpoint_digest",
    "load_checkpoint",
    "send",
]
