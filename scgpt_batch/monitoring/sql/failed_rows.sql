-- Which rows have no embeddings, and why?  One row per error class, mode and model version since :since.
-- Only the latest ledger line of a row counts: a row that failed and later succeeded is not listed.
with lines as (
    select
        *,
        row_number() over (
            partition by adata_id, mode, model_name, model_version, params_hash order by at desc
        ) as age
    from identifier(:ledger)
    where at >= cast(:since as timestamp)
)
select
    error_class,
    mode,
    model_version,
    count(*) as failed_rows,
    max(at) as last_seen,
    max_by(adata_id, struct(at, adata_id)) as sample_adata_id,
    max_by(error_message, struct(at, adata_id)) as sample_message
from lines
where age = 1 and status = 'failed'
group by error_class, mode, model_version
order by failed_rows desc, error_class, mode, model_version
