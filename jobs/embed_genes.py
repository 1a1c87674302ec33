"""Embed the rows of a Delta table that have no result yet (`scgpt-batch embed`).

spark-submit --properties-file conf/spark-local.conf jobs/embed_genes.py --model-uri models:/scgpt@champion \
    --input-table 'delta.`/data/adata_rows`' --output-table 'delta.`/data/gene_embeddings`' --mode static
"""

from scgpt_batch.cli.main import job

if __name__ == "__main__":
    job("embed")
