-- Which genes are nearest to :gene?  The :k nearest by cosine similarity of the newest static vectors in :table, a table
-- of gene embeddings. Needs no endpoint and no Python. Spark 4 and Databricks.
with newest as (
    select model_name, model_version, params_hash
    from identifier(:table)
    where mode = 'static'
    order by embedded_at desc
    limit 1
),
genes as (
    -- a static vector is the same in every row: keep one per gene
    select gene, any_value(embedding) as embedding
    from identifier(:table) join newest using (model_name, model_version, params_hash)
    where mode = 'static'
    group by gene
),
scored as (
    select
        genes.gene as neighbour,
        aggregate(
            zip_with(genes.embedding, wanted.embedding, (a, b) -> struct(a * b as ab, a * a as aa, b * b as bb)),
            struct(0d as ab, 0d as aa, 0d as bb),
            (sums, x) -> struct(sums.ab + x.ab as ab, sums.aa + x.aa as aa, sums.bb + x.bb as bb),
            sums -> sums.ab / sqrt(sums.aa * sums.bb)
        ) as similarity
    from genes cross join (select gene, embedding from genes where gene = :gene) wanted
    where genes.gene <> wanted.gene
)
select row_number() over (order by similarity desc, neighbour) as rank, neighbour, similarity
from scored
order by rank
limit :k
