"""Dashboard of prompts' categories, chosen experts and prediction accuracy."""

from __future__ import annotations

from deploy.grafana.dashboard_parts import Board, Chart, Query, quantile, quantiles, rate

# How many waits were predicted, per second.
WAITS = rate("coe_wait_prediction_error_seconds_count")

ROUTING = Board(
    "coe-routing",
    "coe / Routing",
    "Prompts by category, chosen experts, and the accuracy of predictions.",
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
                    "Only requests to `auto`.",
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
                Chart(
                    "Prompts by the classifier's stage",
                    (Query(rate("coe_router_stage_total", "stage"), "{{stage}}"),),
                    "reqps",
                    "stacked",
                    "General: every stage was unsure.",
                ),
                Chart(
                    "Prompts of which the first stage was unsure",
                    (Query(rate("coe_router_encoder_total", "reason"), "{{reason}}"),),
                    "reqps",
                    "stacked",
                    "Without ok, the first stage decided. Needless: the same experts either way.",
                ),
                Chart("Wait for the encoder", quantiles("coe_router_encoder_seconds"), "s"),
                Chart(
                    "Turns of conversations",
                    (Query(rate("coe_session_turns_total", "decision"), "{{decision}}"),),
                    "reqps",
                    "stacked",
                    "Locked: a tool call is open. Released: the session's expert can't answer.",
                ),
                Chart(
                    "Later turns by where they went",
                    (Query(rate("coe_prefix_cache_turns_total", "place"), "{{place}}"),),
                    "reqps",
                    "stacked",
                    "Cached: to the engine that has the conversation in its prefix cache.",
                ),
                Chart("Added to the first byte", quantiles("coe_gateway_overhead_seconds"), "s"),
            ),
        ),
        (
            "Aliases",
            (
                Chart(
                    "Requests by alias",
                    (
                        Query(
                            rate("coe_alias_requests_total", "alias, target, result"),
                            "{{alias}} → {{target}}: {{result}}",
                        ),
                    ),
                    "reqps",
                    "stacked",
                ),
                Chart(
                    "Rolled back",
                    (
                        Query(
                            "max by (alias, target) (coe_alias_rollback_state)",
                            "{{alias}} → {{target}}",
                        ),
                        Query(
                            rate("coe_alias_rollbacks_total", "alias, target, reason"),
                            "{{alias}} → {{target}}: {{reason}}",
                        ),
                    ),
                    about="1: the target gets no requests. The rate counts the decisions.",
                ),
            ),
        ),
        (
            "Predictions",
            (
                Chart(
                    "Waits, predicted and actual",
                    (
                        Query(
                            f"{rate('coe_wait_predicted_seconds_total')} / {WAITS}",
                            "predicted",
                        ),
                        Query(
                            f"{rate('coe_wait_actual_seconds_total')} / {WAITS}",
                            "actual",
                        ),
                    ),
                    "s",
                    "lines",
                    "Mean per request.",
                ),
                Chart(
                    "Error of the predicted wait",
                    tuple(
                        Query(
                            quantile(q, "coe_wait_prediction_error_seconds", "direction"),
                            f"{{{{direction}}}} p{q * 100:g}",
                        )
                        for q in (0.5, 0.9)
                    ),
                    "s",
                    "lines",
                    "Under: the wait was longer than predicted. Over: it was not.",
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
                    "Age of pools' snapshots",
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
                    "Failed attempts",
                    (
                        Query(
                            rate("coe_attempts_failed_total", "expert, reason"),
                            "{{expert}}: {{reason}}",
                        ),
                    ),
                    "reqps",
                    "stacked",
                    "Before the first byte; the gateway then tries the next best candidate.",
                ),
                Chart(
                    "Retries",
                    (Query(rate("coe_retries_total", "result"), "{{result}}"),),
                    "reqps",
                    "stacked",
                    "Before the first byte: made, or refused because the retry budget was used up.",
                ),
            ),
        ),
    ),
)
