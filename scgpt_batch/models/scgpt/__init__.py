"""scGPT in plain torch: vocabulary, configuration, checkpoint, transformer.

Requires only torch and numpy, and safetensors for `.safetensors` files. `config` and `vocabulary` do not import torch.
"""
