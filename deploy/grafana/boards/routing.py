"""Dashboard of prompts' categories, chosen experts and prediction accuracy."""

from __future__ import annotations

from deploy.grafana.chart import Board, Chart, Query, quantile, quantiles, rate

# How many waits were predicted, per second.
WAITS = rate("coe_wait_prediction_error_seconds_bucket", "", 'le="+Inf"')

ROUTING = Board(
    "coe-routing",
    "coe / Routing",
    "What prompts are, who is chosen, and how good the predictions were.",
    (
        (
            "Choices",
            (
                Chart(
                    "Requests by category",
                    (
                        Query(
                            rate("coe_requests_total", "category", 'category!=""'),
                            "{{category}}",
                        ),
                    ),
                    "reqps",
                    "stacked",
                    "Of requests to auto.",
                ),
                Chart(
                    "Requests by recipe, and escalations",
                    (
                        Query(rate("coe_requests_total", "recipe"), "{{recipe}}"),
                        Query(rate("coe_escalations_total", "recipe"), "{{recipe}} escalated"),
                    ),
                    "reqps",
                ),
                Chart("Time to choose", quantiles("coe_route_seconds"), "s"),
                Chart("Added to the first byte", quantiles("coe_gateway_overhead_seconds"), "s"),
            ),
        ),
        (
            "Predictions",
            (
                Chart(
                    "Waits, predicted and real",
                    (
                        Query(
                            f"{rate('coe_wait_predicted_seconds_total')} / {WAITS}",
                            "predicted",
                        ),
                        Query(
                            f"{rate('coe_wait_actual_seconds_total')} / {WAITS}",
                            "real",
                        ),
                    ),
                    "s",
                    "lines",
                    "Mean per request.",
                ),
                Chart(
                    "Real less predicted wait",
                    tuple(
                        Query(quantile(q, "coe_wait_prediction_error_seconds"), f"p{q * 100:g}")
                        for q in (0.1, 0.5, 0.9)
                    ),
                    "s",
                    "lines",
                    "Over 0: it took longer.",
                ),
                Chart(
                    "Cost, predicted and settled",
                    (
                        Query(rate("coe_cost_predicted_total"), "predicted"),
                        Query(rate("coe_cost_total"), "settled"),
                    ),
                    "short",
                    "lines",
                    "Units of cost per second.",
                ),
                Chart(
                    "Age of what gateways know of pools",
                    (Query("max by (pool) (coe_snapshot_age_seconds)", "{{pool}}"),),
                    "s",
                ),
            ),
        ),
        (
            "Failures",
            (
                Chart(
                    "Refused",
                    (Query(rate("coe_requests_rejected_total", "reason"), "{{reason}}"),),
                    "reqps",
                    "stacked",
                ),
                Chart(
                    "Attempts that failed",
                    (
                        Query(
                            rate("coe_attempts_failed_total", "expert, reason"),
                            "{{expert}}: {{reason}}",
                        ),
                    ),
                    "reqps",
                    "stacked",
                    "Before the first byte: the next best option was asked, if one was left.",
                ),
                Chart(
                    "Second attempts",
                    (Query(rate("coe_retries_total", "result"), "{{result}}"),),
                    "reqps",
                    "stacked",
                    "Before the first byte: made, or refused because too many had failed.",
                ),
            ),
        ),
    ),
)
