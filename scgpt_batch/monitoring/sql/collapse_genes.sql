-- Do the genes of a run have distinct embeddings?  One row per run since :since.
-- A mean cosine near 1 means that the embeddings have collapsed: all genes have nearly the same vector.
-- About :sample vectors per run, drawn by hash, are compared as in collapse_cells.sql. A vector that a gene has in many
-- rows (static mode) counts once.
with lines as (
    select run_id, gene, embedding, xxhash64(gene, embedding) as draw
    from identifier(:embeddings)
    where embedded_at >= cast(:since as timestamp)
),
sizes as (
    select run_id, count(distinct draw) as vectors from lines group by run_id
),
drawn as (
    select distinct lines.run_id, lines.gene, lines.embedding
    from lines join sizes on lines.run_id = sizes.run_id
    where pmod(lines.draw, cast(ceil(sizes.vectors / :sample) as bigint)) = 0
),
units as (
    select
        run_id,
        embedding,
        sqrt(aggregate(embedding, cast(0 as double), (total, x) -> total + cast(x as double) * x)) as length
    from drawn
),
coordinates as (
    select run_id, axis, x / nullif(length, 0) as x
    from units lateral view posexplode(embedding) as axis, x
),
sums as (
    select run_id, sum(total * total) as square
    from (select run_id, axis, sum(x) as total from coordinates group by run_id, axis)
    group by run_id
),
counts as (
    select run_id, count(*) as sampled, count(distinct embedding) as distinct_vectors from units group by run_id
)
select
    counts.run_id,
    sizes.vectors,
    counts.sampled,
    counts.distinct_vectors,
    try_divide(sums.square - counts.sampled, counts.sampled * (counts.sampled - 1)) as mean_cosine
from counts
join sizes on counts.run_id = sizes.run_id
join sums on counts.run_id = sums.run_id
order by mean_cosine desc, counts.run_id
