-- What share of each sample is in genes that the model knows?  One row per sample and version since :since, lowest
-- first.
-- Coverage is the share of a row's counts in genes of the vocabulary. A row without sample_id is its own sample.
with lines as (
    select
        *,
        row_number() over (
            partition by adata_id, mode, model_name, model_version, params_hash order by at desc
        ) as age
    from identifier(:ledger)
    where at >= cast(:since as timestamp)
),
samples as (
    select distinct adata_id, coalesce(sample_id, adata_id) as sample_id from identifier(:rows)
)
select
    coalesce(samples.sample_id, lines.adata_id) as sample_id,
    lines.model_version,
    count(distinct lines.adata_id) as rows,
    avg(lines.coverage) as mean_coverage,
    min(lines.coverage) as least_coverage,
    min(lines.genes_matched) as least_genes_matched,
    max(lines.genes_in) as most_genes_in
from lines left join samples on lines.adata_id = samples.adata_id
where lines.age = 1
group by coalesce(samples.sample_id, lines.adata_id), lines.model_version
order by mean_coverage, sample_id, lines.model_version
