-- Who sends requests?  One row per requester since :since, the busiest first.
-- (Route-optimized endpoints do not log the requester.)
select
    requester,
    sum(weight) as requests,
    sum(if(failed, weight, 0)) / sum(weight) as error_rate,
    percentile(duration_ms, 0.95, cast(round(100 * weight) as bigint)) as p95_ms,
    min(request_time) as first_seen,
    max(request_time) as last_seen
from identifier(:requests)
where request_date >= date_sub(cast(:since as date), 1) and request_time >= cast(:since as timestamp)
group by requester
order by requests desc, requester
