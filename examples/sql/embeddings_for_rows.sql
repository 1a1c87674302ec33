-- What are the gene vectors of these rows?  One row per gene and row of :table, from the endpoint.
-- Parameters of the model are columns of the struct. Runs on Databricks, and locally after
-- scgpt_batch.spark.register_ai_query(spark, endpoints={"scgpt": "http://127.0.0.1:5001"}).
with answers as (
    select
        adata_id,
        ai_query(
            'scgpt',
            struct(x_data, x_indices, x_indptr, adata_obs, adata_var, 'static' as mode, false as need_preprocess)
        ) as answer
    from identifier(:table)
),
vectors as (
    select adata_id, explode(arrays_zip(answer.genes, answer.gene_embeddings)) as found
    from answers
)
select adata_id, found.genes as gene, found.gene_embeddings as embedding
from vectors
order by adata_id, gene
