-- How many cells does a dollar of list price embed?  One row per day (UTC) on which the nightly job embedded cells, since
-- :since. A cell counts once for each mode. The cost is that of the whole job, as in cost.sql.
with costs as (
    select used.usage_date as day, sum(used.usage_quantity * prices.pricing.effective_list.default) as list_cost
    from identifier(:usage) as used
    join identifier(:prices) as prices
        on
            used.sku_name = prices.sku_name
            and used.cloud = prices.cloud
            and used.usage_unit = prices.usage_unit
            and used.usage_end_time >= prices.price_start_time
            and (prices.price_end_time is null or used.usage_end_time < prices.price_end_time)
    where
        used.usage_date >= cast(:since as date)
        and used.custom_tags['project'] = :project
        and used.custom_tags['component'] = 'nightly'
    group by used.usage_date
),
embedded as (
    select cast(started_at as date) as day, sum(cells) as cells
    from identifier(:runs)
    where started_at >= cast(:since as timestamp)
    group by cast(started_at as date)
)
select costs.day, embedded.cells, costs.list_cost, try_divide(embedded.cells, costs.list_cost) as cells_per_dollar
from costs join embedded on costs.day = embedded.day
where embedded.cells > 0
order by costs.day
