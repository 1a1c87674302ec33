-- How large are requests and responses, and which were too large to log?  One row per day (UTC) since :since.
-- Payloads over 1 MiB are null in the table, so sizes cover logged payloads only. To query embeddings, use the
-- embedding tables.
select
    request_date as day,
    sum(weight) as requests,
    avg(octet_length(request)) as avg_request_bytes,
    max(octet_length(request)) as max_request_bytes,
    avg(octet_length(response)) as avg_response_bytes,
    max(octet_length(response)) as max_response_bytes,
    sum(if(request is null, weight, 0)) as requests_not_logged,
    sum(if(response is null, weight, 0)) as responses_not_logged,
    sum(if(array_contains(logging_error_codes, 'MAX_REQUEST_SIZE_EXCEEDED'), weight, 0)) as requests_too_large,
    sum(if(array_contains(logging_error_codes, 'MAX_RESPONSE_SIZE_EXCEEDED'), weight, 0)) as responses_too_large
from identifier(:requests)
where request_date >= date_sub(cast(:since as date), 1) and request_time >= cast(:since as timestamp)
group by request_date
order by day
