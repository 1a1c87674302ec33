-- Which requests are in an AI Gateway inference table?  (It has request_time and execution_duration_ms.)
-- The normalised view: all queries read it as identifier(:requests). It has each request once, in the same columns for
-- every generation of inference tables. `weight` is the number of requests that a row represents, where only a
-- fraction is logged.
with deliveries as (
    select *, row_number() over (partition by request_date, databricks_request_id order by request_time) as delivery
    from identifier(:inference_table)
)
select
    databricks_request_id as request_id,
    client_request_id,
    request_date,
    request_time,
    status_code,
    coalesce(status_code >= 400, true) as failed,
    execution_duration_ms as duration_ms,
    1 / coalesce(nullif(sampling_fraction, 0), 1) as weight,
    request,
    response,
    coalesce(logging_error_codes, cast(array() as array<string>)) as logging_error_codes,
    served_entity_id as served_entity,
    requester
from deliveries
where delivery = 1 or databricks_request_id is null
