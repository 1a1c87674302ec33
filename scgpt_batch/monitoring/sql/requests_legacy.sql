-- Which requests are in a legacy inference table?  (It has timestamp_ms and execution_time_ms.)
-- The normalised view of requests_gateway.sql for tables of auto_capture_config. They have neither the requester nor
-- the reason for a missing payload; the version comes from request_metadata.
with deliveries as (
    select *, row_number() over (partition by date, databricks_request_id order by timestamp_ms) as delivery
    from identifier(:inference_table)
)
select
    databricks_request_id as request_id,
    client_request_id,
    date as request_date,
    timestamp_millis(timestamp_ms) as request_time,
    status_code,
    coalesce(status_code >= 400, true) as failed,
    execution_time_ms as duration_ms,
    1 / coalesce(nullif(sampling_fraction, 0), 1) as weight,
    request,
    response,
    cast(array() as array<string>) as logging_error_codes,
    concat(request_metadata['model_name'], '-', request_metadata['model_version']) as served_entity,
    cast(null as string) as requester
from deliveries
where delivery = 1 or databricks_request_id is null
