"""Dashboard of tenants, costs and budgets."""

from __future__ import annotations

from deploy.grafana.dashboard_parts import EXPERT, RATE, Board, Chart, Query, rate

TENANTS = Board(
    "coe-tenants",
    "coe / Tenants and budgets",
    "Tenants, costs and budgets.",
    (
        (
            "Budgets",
            (
                Chart(
                    "Remaining share of each budget",
                    (Query("min by (budget) (coe_budget_remaining_ratio)", "{{budget}}"),),
                    "percentunit",
                    "lines",
                    "In the present period: 1 untouched, 0 spent.",
                ),
                Chart(
                    "Shadow prices",
                    (Query("max by (budget) (coe_shadow_price)", "{{budget}}"),),
                    "short",
                    "lines",
                    "Quality that one more unit of cost is worth now. It rises while a budget "
                    "is spent too fast.",
                ),
                Chart(
                    "Spending by expert",
                    (Query(rate("coe_cost_total", "expert", EXPERT), "{{expert}}"),),
                    "short",
                    "stacked",
                    "Units of cost per second.",
                ),
                Chart(
                    "Refused",
                    (Query(rate("coe_requests_rejected_total", "reason"), "{{reason}}"),),
                    "reqps",
                    "stacked",
                ),
            ),
        ),
        (
            "Tenants",
            (
                Chart(
                    "Requests by tenant",
                    (Query(rate("coe_tenant_requests_total", "tenant"), "{{tenant}}"),),
                    "reqps",
                    "stacked",
                ),
                Chart(
                    "Tokens by tenant",
                    (Query(rate("coe_tenant_tokens_total", "tenant"), "{{tenant}}"),),
                    "short",
                    "stacked",
                    "Prompts and answers, per second.",
                ),
                Chart(
                    "Saved against always asking the baseline",
                    (
                        Query(
                            f"1 - {rate('coe_savings_cost_total', 'tenant, baseline')} / "
                            f"{rate('coe_savings_baseline_cost_total', 'tenant, baseline')}",
                            "{{tenant}} against {{baseline}}",
                        ),
                    ),
                    "percentunit",
                    "lines",
                    "Share of the baseline's expected cost. Below 0 the router paid more.",
                ),
                Chart(
                    "Expected quality gained over the baseline",
                    (
                        Query(
                            f"({rate('coe_savings_quality_total', 'tenant, baseline')} - "
                            f"{rate('coe_savings_baseline_quality_total', 'tenant, baseline')}) / "
                            f"{rate('coe_savings_requests_total', 'tenant, baseline')}",
                            "{{tenant}} against {{baseline}}",
                        ),
                    ),
                    "percentunit",
                    "lines",
                    "Mean difference for each compared request. Below 0 the router saved cost.",
                ),
                Chart(
                    "Shadow evaluation",
                    (Query(rate("coe_shadow_requests_total", "result"), "{{result}}"),),
                    "reqps",
                    "stacked",
                    "Requests that other experts answered, too, by how their evaluation ended.",
                ),
                Chart(
                    "Spending of shadow evaluation",
                    (Query(rate("coe_shadow_cost_total", "expert", EXPERT), "{{expert}}"),),
                    "short",
                    "stacked",
                    "Units of cost per second. No tenant is charged for it.",
                ),
            ),
        ),
        (
            "Batches",
            (
                Chart(
                    "Batches that have not ended",
                    (Query("max by (status) (coe_batches)", "{{status}}"),),
                    "short",
                    "stacked",
                    "Batches by state. Every gateway counts those of all gateways.",
                ),
                Chart(
                    "Lines of batches",
                    (Query(rate("coe_batch_lines_total", "result"), "{{result}}"),),
                    "reqps",
                    "stacked",
                    "Lines with an answer or an error, and tries that have to be repeated.",
                ),
                Chart(
                    "Age of the oldest batch",
                    (Query("max(coe_batch_oldest_age_seconds)", "age"),),
                    "s",
                    "lines",
                    "Of the batches that have not ended.",
                ),
            ),
        ),
        (
            "Stored responses",
            (
                Chart(
                    "Responses that were to be stored",
                    (Query(rate("coe_responses_stored_total", "result"), "{{result}}"),),
                    "reqps",
                    "stacked",
                    "An answer that can't be stored goes out all the same, with `store: false`.",
                ),
                Chart(
                    "Stored responses and conversations",
                    (Query("max(coe_responses_entries)", "entries"),),
                    "short",
                    "lines",
                    "Every gateway counts those of all gateways.",
                ),
                Chart(
                    "Bytes of stored responses",
                    (Query("max(coe_responses_bytes)", "bytes"),),
                    "bytes",
                    "lines",
                    "Every gateway counts those of all gateways.",
                ),
                Chart(
                    "Entries that made room",
                    (Query(rate("coe_responses_evicted_total"), "evicted"),),
                    "short",
                    "lines",
                    "Tenants had more than `tenant_entries` or `tenant_bytes`.",
                ),
            ),
        ),
        (
            "Cache, store and remote endpoints",
            (
                Chart(
                    "Answers from the cache",
                    (
                        Query(
                            "(sum by (kind) (rate(coe_cache_lookups_total"
                            f'{{result="hit"}}[{RATE}])) or 0 * sum by (kind) '
                            f"(rate(coe_cache_lookups_total[{RATE}]))) / "
                            f"{rate('coe_cache_lookups_total', 'kind')}",
                            "{{kind}}",
                        ),
                    ),
                    "percentunit",
                    "lines",
                    "Share of cache lookups that found an answer.",
                ),
                Chart(
                    "Circuit breakers",
                    (
                        Query("max by (expert) (coe_breaker_open)", "{{expert}} open"),
                        Query(rate("coe_breaker_trips_total", "expert"), "{{expert}} trips/s"),
                    ),
                    "short",
                    "lines",
                    "1 while a breaker keeps requests away from an endpoint.",
                ),
                Chart(
                    "Store of limits and budgets",
                    (
                        Query("min(coe_store_up)", "up"),
                        Query("sum(coe_store_pending_settlements)", "owed settlements"),
                        Query(rate("coe_store_offline_admissions_total"), "granted from slices/s"),
                        Query("sum(coe_store_outages_total)", "outages"),
                    ),
                    "short",
                    "lines",
                    "Up is 0 while a gateway admits from its offline quota.",
                ),
                Chart(
                    "Prompts checked by the guard",
                    (
                        Query(
                            rate("coe_guard_checks_total", "screen, action"),
                            "{{screen}}: {{action}}",
                        ),
                    ),
                    "reqps",
                    "stacked",
                ),
            ),
        ),
    ),
)
