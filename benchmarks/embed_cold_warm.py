"""Our job over the same rows in one process: once with everything cold, then in the warm session.

Cold is what a first run of the day pays: JVM code that isn't compiled yet, workers that import and load. Warm is
what one more row costs in a long table; of several warm runs the one of median seconds is told. Each run writes fresh
tables.

    .venv/bin/python benchmarks/embed_cold_warm.py --model-uri URI --rows DIR --out DIR [--set mode=static ...]

The last line is one JSON document: the command's summary of each run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from scgpt_batch.parameters import Parameters
from scgpt_batch.settings import EmbedSettings, Summary
from scgpt_batch.spark.embed import embed_table
from scgpt_batch.spark.session import get_spark


def main() -> None:
    parser = argparse.ArgumentParser(description="Embed the same rows cold and warm.")
    parser.add_argument("--model-uri", required=True, help="models:/name/version")
    parser.add_argument("--rows", required=True, help="path of the adata_rows table")
    parser.add_argument("--out", type=Path, required=True, help="path of the table that the warm runs write")
    parser.add_argument("--warm-runs", type=int, default=1, help="how many after the cold one, an odd number")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters, such as mode=cell")
    args = parser.parse_args()
    parameters = Parameters.create(dict(pair.split("=", 1) for pair in args.set))
    spark = get_spark()

    def embed(out: Path) -> Summary:
        for suffix in ("", "_ledger", "_runs"):
            shutil.rmtree(out.with_name(out.name + suffix), ignore_errors=True)
        settings = EmbedSettings(
            model_uri=args.model_uri, input_table=f"delta.`{args.rows}`", output_table=f"delta.`{out}`"
        )
        return embed_table(spark, settings, parameters)

    cold = embed(args.out.with_name(args.out.name + "_cold"))
    warm = sorted((embed(args.out) for _ in range(args.warm_runs)), key=lambda told: told["seconds"])
    spark.stop()
    print(json.dumps({"cold": cold, "warm": warm[len(warm) // 2]}))


if __name__ == "__main__":
    main()
