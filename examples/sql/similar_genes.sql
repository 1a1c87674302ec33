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
wanted as (
    select transform(embedding, value -> value / nullif(length, 0)) as direction
    from (
        select
            embedding,
            sqrt(aggregate(embedding, 0D, (total, value) -> total + cast(value as double) * value)) as length
        from lines
        where gene = :gene
        limit 1
    )
),
-- Spark compiles sums of single numbers, but interprets functions of arrays such as aggregate(), which takes three times
-- as long: so four numbers a line, null behind the vector's end
numbers as (
    select /*+ broadcast(chosen) */
        gene,
        cast(get(embedding, at) as double) as a, get(direction, at) as x,
        cast(get(embedding, at + 1) as double) as b, get(direction, at + 1) as y,
        cast(get(embedding, at + 2) as double) as c, get(direction, at + 2) as z,
        cast(get(embedding, at + 3) as double) as d, get(direction, at + 3) as w
    from (select gene, of_row, embedding, (select direction from wanted) as direction from lines)
    join chosen using (gene, of_row)
    lateral view explode(sequence(0, size(embedding) - 1, 4)) as at
    where gene <> :gene
),
scored as (
    select
        gene as neighbour,
        sum(a * x + coalesce(b * y, 0) + coalesce(c * z, 0) + coalesce(d * w, 0))
        / nullif(sqrt(sum(a * a + coalesce(b * b, 0) + coalesce(c * c, 0) + coalesce(d * d, 0))), 0) as similarity
    from numbers
    group by gene
)
select row_number() over (order by similarity desc, neighbour) as rank, neighbour, similarity
from scored
order by rank
limit :k
