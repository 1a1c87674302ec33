"""Our job over the same rows in one process: once with everything cold, then in the warm session.

Cold is what a first run of the day pays: JVM code that isn't compiled yet, workers that import and load. Warm is
what one more row costs in a long table: after runs that are not looked at, in which the JVM goes on compiling, the one
of median seconds. Each run writes fresh tables.

    .venv/bin/python benchmarks/embed_cold_warm.py --model-uri URI --rows DIR --out DIR [--set mode=static ...]

The last line is one JSON document: the command's summary of the cold run and of the warm one, and the seconds of all
runs in their order.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from scgpt_batch.parameters import Parameters
from scgpt_batch.settings import EmbedSettings
from scgpt_batch.spark.embed import EmbedResult, embed_table
from scgpt_batch.spark.session import get_spark


def main() -> None:
    parser = argparse.ArgumentParser(description="Embed the same rows cold and warm.")
    parser.add_argument("--model-uri", required=True, help="models:/name/version")
    parser.add_argument("--rows", required=True, help="path of the adata_rows table")
    parser.add_argument("--out", type=Path, required=True, help="path of the table that the warm runs write")
    parser.add_argument("--warm-up", type=int, default=0, help="runs after the cold one that are not looked at")
    parser.add_argument("--warm-runs", type=int, default=1, help="how many after that, an odd number")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters, such as mode=cell")
    args = parser.parse_args()
    parameters = Parameters.create(dict(pair.split("=", 1) for pair in args.set))
    spark = get_spark()

    def embed(out: Path) -> EmbedResult:
        for suffix in ("", "_ledger", "_runs"):
            shutil.rmtree(out.with_name(out.name + suffix), ignore_errors=True)
        settings = EmbedSettings(
            model_uri=args.model_uri, input_table=f"delta.`{args.rows}`", output_table=f"delta.`{out}`"
        )
        return embed_table(spark, settings, parameters)

    cold = embed(args.out.with_name(args.out.name + "_cold"))
    later = [embed(args.out) for _ in range(args.warm_up + args.warm_runs)]
    spark.stop()
    warm = sorted(later[args.warm_up :], key=lambda run: run.seconds)
    seconds = [run.seconds for run in (cold, *later)]
    print(json.dumps({"cold": cold.to_dict(), "warm": warm[len(warm) // 2].to_dict(), "seconds": seconds}))


if __name__ == "__main__":
    main()
