-- How did the latest runs of the batch job end?  The newest :limit.
select
    started_at,
    finished_at,
    status,
    mode,
    model_uri,
    rows_in,
    rows_ok,
    rows_failed,
    rows_skipped,
    embeddings,
    seconds,
    input_table,
    output_table,
    run_id
from identifier(:runs)
order by started_at desc, run_id
limit :limit
