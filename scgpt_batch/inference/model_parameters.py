"""Whether parameters fit a checkpoint. Needs no torch."""

from scgpt_batch.errors import ConfigError
from scgpt_batch.models.scgpt.config import ModelConfig
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.near_misses import GENE_CUTOFF, did_you_mean
from scgpt_batch.parameters import Parameters


def check_model_parameters(parameters: Parameters, config: ModelConfig, vocabulary: Vocabulary) -> None:
    """Check that parameters match the checkpoint.

    Raises
    ------
    ConfigError
        A parameter such as `embsize` differs from the checkpoint, or none of `genes` is in the vocabulary.
    """
    names = {"embsize": "embsize", "nhead": "nheads", "d_hid": "d_hid", "nlayers": "nlayers"}
    for name, attribute in {**names, "n_layers_cls": "n_layers_cls"}.items():
        stated, has = getattr(parameters, name), getattr(config, attribute)
        if stated is not None and stated != has:
            raise ConfigError(f"{name} is {stated}, but the checkpoint has {has}; leave {name} out, or use that model")
    if parameters.genes and not any(gene in vocabulary for gene in parameters.genes):
        end = did_you_mean(parameters.genes[0], vocabulary.tokens, cutoff=GENE_CUTOFF)
        raise ConfigError(
            f"genes: none of the {len(parameters.genes)} names is in the model's vocabulary (first: "
            f"{parameters.genes[0]!r}{end}); use the names of the vocabulary, e.g. human gene symbols"
        )
