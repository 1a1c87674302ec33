-- On which days did several model versions answer?  One row per such day (UTC) since :since.
-- A swap or a short canary has few such days. Many of them mean a canary that nobody ended.
select
    request_date as day,
    array_sort(collect_set(served_entity)) as versions
from identifier(:requests)
where request_date >= cast(:since as date) and request_time >= cast(:since as timestamp)
group by request_date
having count(distinct served_entity) > 1
order by day
