-- Is the request volume as usual?  One row per full hour from :since to :until, next to the same hour of the earlier
-- days in that time (`usual` is their mean; null on the first day).
with hours as (
    select explode(sequence(
        date_trunc('hour', cast(:since as timestamp)),
        date_trunc('hour', cast(:until as timestamp)) - interval 1 hour,
        interval 1 hour
    )) as hour
),
counts as (
    select
        date_trunc('hour', request_time) as hour,
        sum(weight) as requests,
        sum(if(failed, weight, 0)) as errors
    from identifier(:requests)
    where
        request_date >= date_sub(cast(:since as date), 1)
        and request_time >= date_trunc('hour', cast(:since as timestamp))
        and request_time < date_trunc('hour', cast(:until as timestamp))
    group by date_trunc('hour', request_time)
),
filled as (
    select hours.hour, coalesce(counts.requests, 0) as requests, coalesce(counts.errors, 0) as errors
    from hours left join counts on hours.hour = counts.hour
),
compared as (
    select
        *,
        avg(requests) over (
            partition by hour(hour) order by hour rows between unbounded preceding and 1 preceding
        ) as usual
    from filled
)
select hour, requests, errors, usual, try_divide(requests, usual) as share_of_usual
from compared
order by hour
