"""The blog's way to serve scGPT as an MLflow PyFunc, rewritten for the comparison in blog.py.

Everything happens anew in each `predict`: the first row alone is taken, its nested lists become a matrix, the
published `Preprocessor` runs on it, the published `TransformerModel` is built and loaded key by key, and all
60,697 gene tokens are embedded to answer with some 1,200. Runs where the real `scgpt` 0.2.4 does:

    .venv-upstream/bin/python benchmarks/blog_wrapper.py --rows-table DIR --checkpoint DIR --out DIR

What helps the blog's side here, so that the comparison is not about details:

* the vocabulary and args.json are read once, in `load_context`;
* surviving genes are looked up in the vocabulary, not searched for in a list;
* one record an Arrow batch, so that every row gets its answer and not one in 10,000;
* two untimed rows first, one on each core: both workers have imported scgpt and loaded scanpy's compiled
  kernels, and Spark has written a Delta table. So the figure is that of one more row in a long table.

What is left as it comes: scanpy's kernels give the process as many OpenMP threads as the machine has cores,
although Spark asks for one (`OMP_NUM_THREADS`), so on two cores four threads load the two models.
`NUMBA_NUM_THREADS=1` in the caller's environment shows what that costs.

Result type: the dict gene -> vector passes `mlflow.pyfunc.spark_udf` as `map<string,array<float>>` once it
stands in a list of one (a bare dict is read as one column a gene, of which the first alone comes back).
JSON strings would work too, at the price of writing and parsing 1,200 x 512 decimals.

The file is also the MLflow model (models-from-code): it must load with nothing of this folder beside it.
The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scgpt.model import TransformerModel
from scgpt.preprocess import Preprocessor
from scgpt.tokenizer import GeneVocab
from scipy.sparse import csr_matrix

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

NAME = "blog_scgpt"
INPUTS = ("adata_sparsematrix", "adata_obs", "adata_var")

PREPROCESSING = {
    "use_key": "X",
    "filter_gene_by_counts": 3,
    "filter_cell_by_counts": False,
    "normalize_total": 1e4,
    "result_normed_key": "X_normed",
    "log1p": False,
    "result_log1p_key": "X_log1p",
    "subset_hvg": 1200,
    "hvg_flavor": "cell_ranger",
    "binning": 51,
    "result_binned_key": "X_binned",
}


def read_row(row: pd.Series) -> AnnData:
    """Make an AnnData of nested lists (cells x genes) and two pandas JSON strings."""
    obs = pd.read_json(io.StringIO(row["adata_obs"]), orient="split")
    var = pd.read_json(io.StringIO(row["adata_var"]), orient="split")
    matrix = csr_matrix([list(cell) for cell in row["adata_sparsematrix"]])
    adata = AnnData(X=matrix, obs=obs, var=var)
    adata.obs["celltype"] = adata.obs["final_annotation"].astype("category")
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    return adata


def build_model(args: dict[str, Any], vocab: GeneVocab) -> TransformerModel:
    """Build the published model in the sizes that args.json gives; flash attention falls back to torch's."""
    return TransformerModel(
        ntoken=len(vocab),
        d_model=args["embsize"],
        nhead=args["nheads"],
        d_hid=args["d_hid"],
        nlayers=args["nlayers"],
        nlayers_cls=args["n_layers_cls"],
        vocab=vocab,
        dropout=args["dropout"],
        pad_token=args["pad_token"],
        pad_value=args["pad_value"],
        do_mvc=args["MVC"],
        input_emb_style=args["input_emb_style"],
        n_input_bins=args["n_bins"],
        use_fast_transformer=args["fast_transformer"],
    )


def load_weights(model: TransformerModel, file: Path) -> None:
    """Load all tensors at once, or else those that fit, with a whole load for each of them.

    The published names (`Wqkv`) don't fit a model without flash attention, so its attention stays random.
    Static embeddings don't depend on it.
    """
    saved = torch.load(file, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(saved)
    except RuntimeError:
        current = model.state_dict()
        fitting = {k: v for k, v in saved.items() if k in current and v.shape == current[k].shape}
        for key, tensor in fitting.items():
            current.update({key: tensor})
            model.load_state_dict(current)


class BlogWrapper(mlflow.pyfunc.PythonModel):
    """Answers the first row of what it is sent: gene -> vector for the genes that survive preprocessing."""

    def load_context(self, context: mlflow.pyfunc.PythonModelContext) -> None:
        self.checkpoint = Path(context.artifacts["checkpoint"])
        self.args = json.loads((self.checkpoint / "args.json").read_text())
        self.vocab = GeneVocab.from_file(self.checkpoint / "vocab.json")

    def predict(self, context, model_input, params=None):  # no type hints: MLflow would make a schema of them
        adata = read_row(model_input.iloc[0])
        Preprocessor(**PREPROCESSING)(adata, batch_key="batch")
        model = build_model(self.args, self.vocab)
        load_weights(model, self.checkpoint / "best_model.pt")
        model.eval()
        vectors = self.token_vectors(model)
        return [{gene: vectors[self.vocab[gene]] for gene in adata.var_names if gene in self.vocab}]

    def token_vectors(self, model: TransformerModel) -> np.ndarray:
        """All gene tokens through the gene encoder: tokens x embsize, float32."""
        with torch.no_grad():
            return model.encoder(torch.arange(len(self.vocab))).numpy()


mlflow.models.set_model(BlogWrapper())


def register(checkpoint: Path, store: Path) -> str:
    """Log and register this file with the checkpoint, sqlite and files in `store`; return the model's URI."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    matrix = ColSpec(Array(Array(DataType.double)), INPUTS[0])
    texts = [ColSpec(DataType.string, name) for name in INPUTS[1:]]
    store.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{store / 'mlflow.db'}")
    if mlflow.get_experiment_by_name(NAME) is None:
        mlflow.create_experiment(NAME, artifact_location=(store / "artifacts").as_uri())
    mlflow.set_experiment(NAME)
    with mlflow.start_run():
        info = mlflow.pyfunc.log_model(
            name=NAME,
            python_model=__file__,
            artifacts={"checkpoint": str(checkpoint)},
            signature=ModelSignature(inputs=Schema([matrix, *texts])),
            pip_requirements=["scgpt==0.2.4"],
            registered_model_name=NAME,
        )
    return f"models:/{NAME}/{info.registered_model_version}"


def embed(rows: DataFrame, udf: Any, version: str, run_id: str) -> DataFrame:
    """Rows in, one gene a row out, in the columns of `gene_embeddings`.

    `n_cells`, `params_hash` and `content_hash` stay null: the wrapper doesn't know them.
    """
    from pyspark.sql import functions as F

    answers = rows.select("adata_id", F.explode(udf(*INPUTS)).alias("gene", "embedding"))
    return answers.select(
        "adata_id",
        F.lit(None).cast("string").alias("group"),
        "gene",
        "embedding",
        F.lit(None).cast("int").alias("n_cells"),
        F.lit("static").alias("mode"),
        F.lit(NAME).alias("model_name"),
        F.lit(version).alias("model_version"),
        F.lit(None).cast("string").alias("params_hash"),
        F.lit(None).cast("string").alias("content_hash"),
        F.lit(run_id).alias("run_id"),
        F.current_timestamp().alias("embedded_at"),
    )


def run(spark: SparkSession, rows_table: str, out: str, model_uri: str) -> dict[str, object]:
    """Warm both workers on rows that aren't timed, then time read -> UDF -> write."""
    udf = mlflow.pyfunc.spark_udf(spark, model_uri, env_manager="local", result_type="map<string,array<float>>")
    version = model_uri.rpartition("/")[2]
    rows = spark.read.format("delta").load(rows_table)
    warm = rows.limit(2).repartition(2)
    embed(warm, udf, version, "warm-up").write.format("delta").mode("overwrite").save(f"{out}_warm_up")
    started = time.perf_counter()
    embed(rows, udf, version, "timed").write.format("delta").mode("overwrite").save(out)
    seconds = time.perf_counter() - started
    written = spark.read.format("delta").load(out)
    return {
        "seconds": round(seconds, 3),
        "rows": written.select("adata_id").distinct().count(),
        "embeddings": written.count(),
        "partitions": rows.rdd.getNumPartitions(),
    }


def main() -> None:
    from delta_session import delta_session  # not at the top: the model must load without this folder

    parser = argparse.ArgumentParser(description="Run the blog's wrapper over a table of rows.")
    parser.add_argument("--rows-table", required=True, help="path of the Delta table with dense rows")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--out", required=True, help="path of the Delta table to write")
    parser.add_argument("--store", type=Path, default=Path("blog_mlflow"), help="folder of MLflow's store")
    args = parser.parse_args()
    model_uri = register(args.checkpoint.resolve(), args.store.resolve())
    # It answers the first row of each batch, so a batch has to be one row.
    one_row = {"spark.sql.execution.arrow.maxRecordsPerBatch": "1"}
    spark = delta_session("blog", conf=one_row)
    result = run(spark, args.rows_table, args.out, model_uri)
    spark.stop()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
