-- How is the endpoint doing?  One row for the time since :since, which the health rules check.
select
    coalesce(sum(weight), 0) as requests,
    try_divide(sum(if(failed, weight, 0)), sum(weight)) as error_rate,
    coalesce(sum(if(failed and status_code between 400 and 499, weight, 0)), 0) as client_errors,
    coalesce(sum(if(failed and coalesce(status_code not between 400 and 499, true), weight, 0)), 0) as server_errors,
    percentile(duration_ms, 0.95, cast(round(100 * weight) as bigint)) as p95_ms,
    array_sort(collect_set(served_entity)) as versions
from identifier(:requests)
where request_date >= date_sub(cast(:since as date), 1) and request_time >= cast(:since as timestamp)
