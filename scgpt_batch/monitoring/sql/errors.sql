-- Which errors occurred?  One row per failing status since :since, with its latest response as a sample.
with failures as (
    select
        status_code,
        sum(weight) as errors,
        min(request_time) as first_seen,
        max(request_time) as last_seen,
        count(distinct requester) as requesters,
        max_by(struct(request_id, response), struct(request_time, request_id)) as newest
    from identifier(:requests)
    where
        request_date >= date_sub(cast(:since as date), 1)
        and request_time >= cast(:since as timestamp)
        and failed
    group by status_code
)
select
    status_code,
    errors,
    first_seen,
    last_seen,
    requesters,
    newest.request_id as sample_request_id,
    left(newest.response, 500) as sample_response
from failures
order by errors desc, status_code
