-- Which requests came last?  The newest :limit since :since.
select
    request_time,
    request_id,
    status_code,
    duration_ms,
    octet_length(request) as request_bytes,
    octet_length(response) as response_bytes,
    logging_error_codes,
    served_entity,
    requester
from identifier(:requests)
where request_date >= date_sub(cast(:since as date), 1) and request_time >= cast(:since as timestamp)
order by request_time desc, request_id
limit :limit
