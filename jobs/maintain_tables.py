"""Keep an output table, its ledger and runs small and clustered (`scgpt-batch maintain`).

spark-submit --properties-file conf/spark-local.conf jobs/maintain_tables.py --table 'delta.`/data/gene_embeddings`' \
    --cluster-by gene
"""

from scgpt_batch.cli.main import job

if __name__ == "__main__":
    job("maintain")
