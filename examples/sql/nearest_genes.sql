-- Which genes are nearest to :gene?  The :limit nearest among the genes of the rows of :table, by cosine similarity.
-- Runs on Databricks, and locally after scgpt_batch.spark.register_ai_query (see embeddings_for_rows.sql).
with answers as (
    select
        ai_query(
            'scgpt',
            struct(x_data, x_indices, x_indptr, adata_obs, adata_var, 'static' as mode, false as need_preprocess)
        ) as answer
    from identifier(:table)
),
vectors as (
    select explode(arrays_zip(answer.genes, answer.gene_embeddings)) as found
    from answers
),
genes as (
    -- a static vector is the same in every row: keep one per gene
    select found.genes as gene, any_value(found.gene_embeddings) as vector
    from vectors
    group by found.genes
),
units as (
    select
        gene,
        transform(vector, x -> x / sqrt(aggregate(vector, cast(0 as double), (total, y) -> total + y * y))) as unit
    from genes
)
select
    other.gene,
    aggregate(
        zip_with(one.unit, other.unit, (x, y) -> x * y), cast(0 as double), (total, product) -> total + product
    ) as cosine
from units as one
join units as other on one.gene <> other.gene
where one.gene = :gene
order by cosine desc, other.gene
limit :limit
