"""Turn files of single-cell counts into rows of a Delta table (`scgpt-batch ingest`).

spark-submit --properties-file conf/spark-local.conf jobs/ingest_anndata.py --input sample.h5ad \
    --table 'delta.`/data/adata_rows`'
"""

from scgpt_batch.cli.main import job

if __name__ == "__main__":
    job("ingest")
