-- Which requests are in a Unity AI Gateway inference table?  (It has event_time and latency_ms.)
-- The normalised view of requests_gateway.sql for the newest generation, from its documented columns. It logs every
-- request; versions and requesters are not available.
with deliveries as (
    select
        *,
        to_date(to_utc_timestamp(event_time, current_timezone())) as event_date,
        row_number() over (partition by invocation_id order by event_time) as delivery
    from identifier(:inference_table)
)
select
    invocation_id as request_id,
    cast(null as string) as client_request_id,
    event_date as request_date,
    event_time as request_time,
    status_code,
    coalesce(status_code >= 400, true) as failed,
    latency_ms as duration_ms,
    cast(1 as double) as weight,
    request,
    response,
    coalesce(logging_error_codes, cast(array() as array<string>)) as logging_error_codes,
    cast(null as string) as served_entity,
    cast(null as string) as requester
from deliveries
where delivery = 1 or invocation_id is null
