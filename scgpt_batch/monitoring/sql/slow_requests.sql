-- Which requests were slow?  The :limit slowest since :since that took at least :slow_ms milliseconds.
select
    duration_ms,
    request_time,
    request_id,
    status_code,
    octet_length(request) as request_bytes,
    octet_length(response) as response_bytes,
    served_entity,
    requester
from identifier(:requests)
where
    request_date >= date_sub(cast(:since as date), 1)
    and request_time >= cast(:since as timestamp)
    and duration_ms >= :slow_ms
order by duration_ms desc, request_time desc, request_id
limit :limit
