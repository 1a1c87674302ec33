"""Our job twice over the same rows in one process: once with everything cold, once in a warm session.

Cold is what a first run of the day pays: JVM code that isn't compiled yet, workers that import and load. Warm is
what one more row costs in a long table. Each run writes fresh tables.

    .venv/bin/python benchmarks/embed_twice.py --model-uri URI --rows DIR --out DIR [--set mode=static ...]

The last line is one JSON document: the command's summary of each run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from scgpt_batch.parameters import Parameters
from scgpt_batch.settings import EmbedSettings
from scgpt_batch.spark.embed import embed_table
from scgpt_batch.spark.session import get_spark


def main() -> None:
    parser = argparse.ArgumentParser(description="Embed the same rows cold and warm.")
    parser.add_argument("--model-uri", required=True, help="models:/name/version")
    parser.add_argument("--rows", required=True, help="path of the adata_rows table")
    parser.add_argument("--out", type=Path, required=True, help="path of the table that the warm run writes")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters, such as mode=cell")
    args = parser.parse_args()
    parameters = Parameters.create(dict(pair.split("=", 1) for pair in args.set))
    spark = get_spark()
    runs = {}
    for name, out in (("cold", args.out.with_name(args.out.name + "_cold")), ("warm", args.out)):
        for suffix in ("", "_ledger", "_runs"):
            shutil.rmtree(out.with_name(out.name + suffix), ignore_errors=True)
        settings = EmbedSettings(
            model_uri=args.model_uri, input_table=f"delta.`{args.rows}`", output_table=f"delta.`{out}`"
        )
        runs[name] = embed_table(spark, settings, parameters)
    spark.stop()
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
