-- Which cells are nearest to the cell :cell_id of the row :adata_id?  The :k nearest by cosine similarity in :table, a
-- search table that `embed --search-table` wrote. The search is exact and needs no index. Spark 4 and Databricks.
with wanted as (
    select embedding from identifier(:table) where adata_id = :adata_id and cell_id = :cell_id
),
scored as (
    select
        cells.adata_id,
        cells.cell_id,
        -- the vectors have length 1, so this is the cosine
        aggregate(
            zip_with(cells.embedding, wanted.embedding, (a, b) -> cast(a as double) * b), 0d, (sum, x) -> sum + x
        ) as similarity
    from identifier(:table) cells cross join wanted
    where not (cells.adata_id = :adata_id and cells.cell_id = :cell_id)
)
select row_number() over (order by similarity desc, adata_id, cell_id) as rank, adata_id, cell_id, similarity
from scored
order by rank
limit :k
