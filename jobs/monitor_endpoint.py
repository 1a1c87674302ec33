"""Judge the health of the endpoint and the batch job (`scgpt-batch monitor`).

spark-submit --properties-file conf/spark-local.conf jobs/monitor_endpoint.py \
    --inference-table 'delta.`/data/scgpt_payload`' --output-table 'delta.`/data/gene_embeddings`' --report health.html
"""

from scgpt_batch.cli.main import job

if __name__ == "__main__":
    job("monitor")
