-- How many requests were there, how fast and how many failed?  One row per day (UTC) since :since.
-- Where only a fraction of the requests is logged, all numbers are estimates for all requests.
select
    request_date as day,
    sum(weight) as requests,
    try_divide(sum(weight * duration_ms), sum(if(duration_ms is null, null, weight))) as avg_ms,
    percentile(duration_ms, 0.50, cast(round(100 * weight) as bigint)) as p50_ms,
    percentile(duration_ms, 0.95, cast(round(100 * weight) as bigint)) as p95_ms,
    percentile(duration_ms, 0.99, cast(round(100 * weight) as bigint)) as p99_ms,
    sum(if(failed, weight, 0)) as errors,
    sum(if(failed, weight, 0)) / sum(weight) as error_rate,
    count(distinct served_entity) as versions,
    count(distinct requester) as requesters
from identifier(:requests)
where request_date >= date_sub(cast(:since as date), 1) and request_time >= cast(:since as timestamp)
group by request_date
order by day
