-- What do the jobs and the endpoint cost?  One row per day and component since :since, at list prices.
-- The tag `project` selects them, the tag `component` tells them apart (nightly, retention, endpoint). These are
-- Databricks' units. The machines of a job's clusters are on the cloud's own bill.
select
    used.usage_date as day,
    coalesce(used.custom_tags['component'], 'other') as component,
    used.billing_origin_product as product,
    sum(used.usage_quantity) as dbus,
    sum(used.usage_quantity * prices.pricing.effective_list.default) as list_cost
from identifier(:usage) as used
left join identifier(:prices) as prices
    on
        used.sku_name = prices.sku_name
        and used.cloud = prices.cloud
        and used.usage_unit = prices.usage_unit
        and used.usage_end_time >= prices.price_start_time
        and (prices.price_end_time is null or used.usage_end_time < prices.price_end_time)
where used.usage_date >= cast(:since as date) and used.custom_tags['project'] = :project
group by used.usage_date, coalesce(used.custom_tags['component'], 'other'), used.billing_origin_product
order by day desc, component, product
