-- Which rows of :table does the model refuse, and why?  One row for each that has no answer.
-- Two kinds of error: of a row (with on_error 'record' the model says it in `error`, and answers the other rows of the
-- request), and of a request (failOnError => false: `errorMessage`, where there was no answer at all).
-- Runs on Databricks, and locally after scgpt_batch.spark.register_ai_query (see embeddings_for_rows.sql).
with answers as (
    select
        adata_id,
        ai_query(
            'scgpt',
            struct(
                x_data, x_indices, x_indptr, adata_obs, adata_var,
                'cell' as mode, false as need_preprocess, 'record' as on_error
            ),
            failOnError => false
        ) as answer
    from identifier(:table)
)
select adata_id, coalesce(answer.errorMessage, answer.response.error) as error
from answers
where coalesce(answer.errorMessage, answer.response.error) is not null
order by adata_id
