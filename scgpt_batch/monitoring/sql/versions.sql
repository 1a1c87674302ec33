-- Which model versions answered?  One row per served entity since :since.
-- (On Databricks, system.serving.served_entities maps ids to names.)
select
    served_entity,
    sum(weight) as requests,
    sum(if(failed, weight, 0)) / sum(weight) as error_rate,
    percentile(duration_ms, 0.95, cast(round(100 * weight) as bigint)) as p95_ms,
    min(request_time) as first_seen,
    max(request_time) as last_seen
from identifier(:requests)
where request_date >= date_sub(cast(:since as date), 1) and request_time >= cast(:since as timestamp)
group by served_entity
order by last_seen desc, served_entity
