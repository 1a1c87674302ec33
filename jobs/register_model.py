"""Log and register a checkpoint as MLflow model (`scgpt-batch register`).

spark-submit --properties-file conf/spark-local.conf jobs/register_model.py --checkpoint checkpoints/scGPT_human \
    --name scgpt --alias champion
"""

from scgpt_batch.cli.main import job

if __name__ == "__main__":
    job("register")
