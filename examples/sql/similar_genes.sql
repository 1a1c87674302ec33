-- Which genes are nearest to :gene?  The :k nearest by cosine similarity of the newest static vectors in :table, a table
-- of gene embeddings. Needs no endpoint and no Python. Spark 4 and Databricks.
with newest as (
    select model_name, model_version, params_hash
    from identifier(:table)
    where mode = 'static'
    order by embedded_at desc
    limit 1
),
lines as (
    select /*+ broadcast(newest) */ gene, embedding, xxhash64(adata_id) as of_row
    from identifier(:table) join newest using (model_name, model_version, params_hash)
    where mode = 'static'
),
-- a static vector is the same in every row: take each gene from one of them
chosen as (select gene, min(of_row) as of_row from lines group by gene),
-- Spark compiles sums of single numbers, but interprets functions of arrays such as aggregate(), a third as fast
numbers as (
    select /*+ broadcast(chosen) */ gene, position, cast(value as double) as value
    from lines join chosen using (gene, of_row) lateral view posexplode(embedding) as position, value
),
wanted as (
    select position, cast(value as double) as value
    from (select embedding from lines where gene = :gene limit 1)
    lateral view posexplode(embedding) as position, value
),
scored as (
    select /*+ broadcast(wanted) */
        gene as neighbour,
        sum(numbers.value * wanted.value)
        / sqrt(sum(numbers.value * numbers.value) * sum(wanted.value * wanted.value)) as similarity
    from numbers join wanted using (position)
    where gene <> :gene
    group by gene
)
select row_number() over (order by similarity desc, neighbour) as rank, neighbour, similarity
from scored
order by rank
limit :k
