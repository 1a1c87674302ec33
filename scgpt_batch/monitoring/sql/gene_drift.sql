-- Which genes moved between two model versions?  The :limit that moved farthest from :old_version to :new_version.
-- Compared is the cosine of a gene's vectors for the same row, content and parameters; 1 means that it did not move.
-- Use it where one version was fine-tuned from the other; models trained independently have unrelated axes.
with vectors as (
    select
        *,
        sqrt(aggregate(embedding, cast(0 as double), (total, x) -> total + cast(x as double) * x)) as length
    from identifier(:embeddings)
    where model_version in (:old_version, :new_version)
),
pairs as (
    select
        old.gene,
        old.mode,
        aggregate(
            zip_with(old.embedding, new.embedding, (x, y) -> cast(x as double) * y),
            cast(0 as double),
            (total, product) -> total + product
        ) / nullif(old.length * new.length, 0) as cosine
    from vectors as old
    join vectors as new
        on old.gene = new.gene
        and old.adata_id = new.adata_id
        and old.`group` <=> new.`group`
        and old.mode = new.mode
        and old.model_name = new.model_name
        and old.params_hash = new.params_hash
        and old.content_hash = new.content_hash
    where old.model_version = :old_version and new.model_version = :new_version
)
select gene, mode, count(*) as pairs, avg(cosine) as mean_cosine, min(cosine) as least_cosine
from pairs
group by gene, mode
order by mean_cosine, gene, mode
limit :limit
