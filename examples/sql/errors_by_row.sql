-- Which rows of :table fail, and why?  One line per row without a result.
-- An error of a row is in `error` (with on_error 'record'; the other rows of the request get results). An error of a
-- whole request is in `errorMessage` (with failOnError => false).
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
