"""Make a random checkpoint of the published whole-human model's size and layout.

The weights mean nothing: they are for measuring time and memory where the published file is not at hand.
Size and names are the published ones: 60,697 tokens (60,694 genes, then `<pad>`, `<cls>`, `<eoc>`) x 512,
12 layers, 8 heads, attention under the `Wqkv` names of flash attention, decoders and `flag_encoder`
included; 200 MB in float32. Needs torch alone, so it runs on a bare machine too:

    python benchmarks/full_size_checkpoint.py --out DIR [--genes NAMES.txt]

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch

N_GENES = 60_694
SPECIAL_TOKENS = ("<pad>", "<cls>", "<eoc>")  # after the genes, as in the published vocabulary

# The keys of the published args.json; sizes are filled in by `write_checkpoint`.
ARGS = {
    "data_source": "random",
    "save_dir": "save",
    "load_model": None,
    "n_hvg": None,
    "valid_size_or_ratio": 0.003,
    "dist_backend": "nccl",
    "grad_accu_steps": 1,
    "pad_token": "<pad>",
    "input_style": "binned",
    "input_emb_style": "continuous",
    "n_bins": 51,
    "max_seq_len": 1200,
    "training_tasks": "both",
    "dist_url": "env://",
    "mask_ratio": [0.25, 0.5, 0.75],
    "trunc_by_sample": True,
    "vocab_path": "vocab.json",
    "rank": 0,
    "batch_size": 32,
    "eval_batch_size": 64,
    "epochs": 6,
    "lr": 0.0001,
    "scheduler_interval": 100,
    "scheduler_factor": 0.99,
    "warmup_ratio_or_step": 10000.0,
    "no_cls": True,
    "no_cce": True,
    "fp16": True,
    "fast_transformer": True,
    "dropout": 0.2,
    "log_interval": 9000,
    "save_interval": 27000,
    "mask_value": -1,
    "pad_value": -2,
    "USE_CLS": False,
    "USE_CCE": False,
    "MVC": True,
    "USE_GENERATIVE_TRAINING": True,
    "world_size": 16,
    "distributed": True,
    "local_rank": 0,
    "gpu": 0,
}


def vocabulary(genes: Iterable[str] | None = None, n_genes: int = N_GENES) -> dict[str, int]:
    """Give each token its id: `genes` first, then GENE00000 and so on up to `n_genes`, then specials.

    Repeated names count once. More than `n_genes` names raise ValueError.
    """
    names = dict.fromkeys(genes or ())
    if len(names) > n_genes:
        raise ValueError(f"{len(names)} gene names do not fit a vocabulary of {n_genes} genes")
    fillers = (f"GENE{i:05d}" for i in range(n_genes + len(names)))
    for name in fillers:
        if len(names) == n_genes:
            break
        names.setdefault(name)
    return {token: i for i, token in enumerate([*names, *SPECIAL_TOKENS])}


class _Draw:
    """Random tensors from one seeded generator, by the role a tensor plays in the model."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float) -> torch.Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=self.generator)

    def linear(self, name: str, n_out: int, n_in: int, *, bias: bool = True) -> dict[str, torch.Tensor]:
        weight = {f"{name}.weight": self.normal(n_out, n_in, std=n_in**-0.5)}
        return weight | ({f"{name}.bias": self.normal(n_out, std=0.02)} if bias else {})

    def norm(self, name: str, d: int) -> dict[str, torch.Tensor]:
        weight = torch.empty(d).uniform_(0.5, 1.5, generator=self.generator)
        return {f"{name}.weight": weight, f"{name}.bias": self.normal(d, std=0.1)}


def _encoders(draw: _Draw, ntoken: int, d: int) -> dict[str, torch.Tensor]:
    return {
        "encoder.embedding.weight": draw.normal(ntoken, d, std=0.1),
        **draw.norm("encoder.enc_norm", d),
        "flag_encoder.weight": draw.normal(2, d, std=0.1),  # the model has no such layer; the file does
        **draw.linear("value_encoder.linear1", d, 1),
        **draw.linear("value_encoder.linear2", d, d),
        **draw.norm("value_encoder.norm", d),
    }


def _layer(draw: _Draw, i: int, d: int, d_hid: int) -> dict[str, torch.Tensor]:
    prefix = f"transformer_encoder.layers.{i}"
    return {
        **draw.linear(f"{prefix}.self_attn.Wqkv", 3 * d, d),
        **draw.linear(f"{prefix}.self_attn.out_proj", d, d),
        **draw.linear(f"{prefix}.linear1", d_hid, d),
        **draw.linear(f"{prefix}.linear2", d, d_hid),
        **draw.norm(f"{prefix}.norm1", d),
        **draw.norm(f"{prefix}.norm2", d),
    }


def _decoders(draw: _Draw, d: int, n_layers_cls: int) -> dict[str, torch.Tensor]:
    tensors = {
        **draw.linear("decoder.fc.0", d, d),
        **draw.linear("decoder.fc.2", d, d),
        **draw.linear("decoder.fc.4", 1, d),
    }
    for i in range(n_layers_cls - 1):  # linear, activation, norm: three places in the sequence each
        tensors |= draw.linear(f"cls_decoder._decoder.{3 * i}", d, d)
        tensors |= draw.norm(f"cls_decoder._decoder.{3 * i + 2}", d)
    tensors |= draw.linear("cls_decoder.out_layer", 1, d)
    tensors |= draw.linear("mvc_decoder.gene2query", d, d)
    return tensors | draw.linear("mvc_decoder.W", d, d, bias=False)


def random_weights(
    ntoken: int,
    *,
    seed: int = 0,
    embsize: int = 512,
    nlayers: int = 12,
    d_hid: int = 512,
    n_layers_cls: int = 3,
) -> dict[str, torch.Tensor]:
    """Draw a state dict under the published names, float32; the same seed gives the same tensors."""
    draw = _Draw(seed)
    weights = _encoders(draw, ntoken, embsize)
    for i in range(nlayers):
        weights |= _layer(draw, i, embsize, d_hid)
    return weights | _decoders(draw, embsize, n_layers_cls)


def write_checkpoint(
    folder: str | Path,
    *,
    seed: int = 0,
    genes: Iterable[str] | None = None,
    n_genes: int = N_GENES,
    embsize: int = 512,
    nheads: int = 8,
    nlayers: int = 12,
    d_hid: int = 512,
    n_layers_cls: int = 3,
) -> Path:
    """Write best_model.pt, vocab.json and, last, args.json into `folder`; return it.

    `genes` name the first tokens; the rest up to `n_genes` are called GENE00000 and so on.
    A folder with an args.json is therefore complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab = vocabulary(genes, n_genes)
    weights = random_weights(
        len(vocab), seed=seed, embsize=embsize, nlayers=nlayers, d_hid=d_hid, n_layers_cls=n_layers_cls
    )
    sizes = {"nlayers": nlayers, "nheads": nheads, "embsize": embsize, "d_hid": d_hid}
    torch.save(weights, folder / "best_model.pt")
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "args.json").write_text(json.dumps(ARGS | sizes | {"n_layers_cls": n_layers_cls}, indent=2))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a random checkpoint of the published size.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--genes", type=Path, help="text file, one gene name a line: the first tokens")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same weights")
    args = parser.parse_args()
    genes = args.genes.read_text().split("\n") if args.genes else ()
    folder = write_checkpoint(args.out, seed=args.seed, genes=[gene for gene in genes if gene])
    megabytes = round((folder / "best_model.pt").stat().st_size / 1e6, 1)
    print(json.dumps({"checkpoint": str(folder), "megabytes": megabytes}))


if __name__ == "__main__":
    main()
