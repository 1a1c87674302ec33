"""Tables like system.billing.usage and list_prices, with the documented columns that the cost queries read."""

from datetime import datetime, timedelta
from decimal import Decimal

from pyspark.sql import SparkSession

USAGE = """
    record_id STRING, account_id STRING, workspace_id STRING, sku_name STRING, cloud STRING, usage_start_time TIMESTAMP,
    usage_end_time TIMESTAMP, usage_date DATE, custom_tags MAP<STRING, STRING>, usage_unit STRING,
    usage_quantity DECIMAL(38, 18), usage_metadata STRUCT<job_id: STRING, endpoint_name: STRING>,
    billing_origin_product STRING
"""
PRICES = """
    price_start_time TIMESTAMP, price_end_time TIMESTAMP, account_id STRING, sku_name STRING, cloud STRING,
    currency_code STRING, usage_unit STRING,
    pricing STRUCT<`default`: DECIMAL(38, 18), effective_list: STRUCT<`default`: DECIMAL(38, 18)>>
"""
JOBS, SERVING = "PREMIUM_JOBS_COMPUTE", "PREMIUM_SERVERLESS_REAL_TIME_INFERENCE"


def write(spark: SparkSession, schema: str, day: datetime) -> None:
    """Write a day's bill: 20 units for the nightly job and 3 for the endpoint of `scgpt`, and another project's.

    A unit of the job costs 0.5, and cost 0.9 until the day before; one of the endpoint costs 0.1.
    """

    def used(sku: str, quantity: int, product: str, **tags: str) -> tuple[object, ...]:
        end = day + timedelta(hours=1)
        return ("r", "a", "w", sku, "AWS", day, end, day.date(), tags, "DBU", Decimal(quantity), None, product)

    def price(sku: str, amount: str, start: datetime, end: datetime | None) -> tuple[object, ...]:
        return (start, end, "a", sku, "AWS", "USD", "DBU", (Decimal(amount), (Decimal(amount),)))

    usage = [
        used(JOBS, 12, "JOBS", project="scgpt", component="nightly"),
        used(JOBS, 8, "JOBS", project="scgpt", component="nightly"),
        used(SERVING, 3, "MODEL_SERVING", project="scgpt", component="endpoint"),
        used(JOBS, 100, "JOBS", project="another", component="nightly"),
        used(JOBS, 100, "JOBS"),
    ]
    change, long_ago = day - timedelta(hours=1), day - timedelta(days=900)
    prices = [price(JOBS, "0.9", long_ago, change), price(JOBS, "0.5", change, None),
              price(SERVING, "0.1", long_ago, None)]  # fmt: skip
    spark.createDataFrame(usage, USAGE).write.saveAsTable(f"{schema}.usage")
    spark.createDataFrame(prices, PRICES).write.saveAsTable(f"{schema}.list_prices")
