-- How fast is the batch job?  Cells per second of each run since :since that embedded cells.
select started_at, run_id, mode, model_version, cells, seconds, cells / seconds as cells_per_second
from identifier(:runs)
where started_at >= cast(:since as timestamp) and cells > 0 and seconds > 0
order by started_at, run_id
