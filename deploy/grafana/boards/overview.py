"""Health, traffic by expert, and latency."""

from __future__ import annotations

from deploy.grafana.dashboard_parts import (
    EXPERT,
    Board,
    Chart,
    Query,
    mean,
    quantile,
    quantiles,
    rate,
)

ERROR_SHARE = f"{rate('coe_server_errors_total')} / {rate('coe_requests_total')}"

OVERVIEW = Board(
    "coe-overview",
    "coe / Overview",
    "Health, traffic by expert, and latency.",
    (
        (
            "Now",
            (
                Chart("Requests", (Query(rate("coe_requests_total")),), "reqps", "number", "", 3),
                Chart(
                    "Server errors",
                    (Query(ERROR_SHARE),),
                    "percentunit",
                    "number",
                    "Share of requests that ended with a status of 500 or more.",
                    3,
                ),
                Chart(
                    "Time to first token, p95",
                    (Query(quantile(0.95, "coe_time_to_first_token_seconds")),),
                    "s",
                    "number",
                    "Streamed answers, from the request's arrival.",
                    3,
                ),
                Chart(
                    "Gateway overhead, median",
                    (Query(quantile(0.5, "coe_gateway_overhead_seconds")),),
                    "s",
                    "number",
                    "Time to the first byte less the pool's queue and the engine.",
                    3,
                ),
                Chart(
                    "Completion tokens",
                    (Query(rate("coe_tokens_total", "", 'type="completion"')),),
                    "short",
                    "number",
                    "Per second.",
                    3,
                ),
                Chart(
                    "In flight", (Query("sum(coe_in_flight_requests)"),), "short", "number", "", 3
                ),
                Chart("Waiting", (Query("sum(coe_requests_waiting)"),), "short", "number", "", 3),
                Chart(
                    "Pools",
                    (Query("min(coe_pools)"),),
                    "short",
                    "number",
                    "The minimum over gateways.",
                    3,
                ),
            ),
        ),
        (
            "Requests",
            (
                Chart(
                    "Requests by expert",
                    (Query(rate("coe_requests_total", "expert", EXPERT), "{{expert}}"),),
                    "reqps",
                    "stacked",
                ),
                Chart(
                    "Requests by outcome",
                    (Query(rate("coe_requests_total", "outcome"), "{{outcome}}"),),
                    "reqps",
                    "stacked",
                ),
                Chart(
                    "Time to first token", quantiles("coe_time_to_first_token_seconds", EXPERT), "s"
                ),
                Chart(
                    "Time to the end of the answer",
                    quantiles("coe_request_duration_seconds", EXPERT),
                    "s",
                ),
            ),
        ),
        (
            "Latency",
            (
                Chart(
                    "Mean time of a request, by part",
                    (
                        Query(mean("coe_route_seconds"), "route"),
                        Query(mean("coe_queue_seconds", EXPERT), "queue, swaps included"),
                        Query(mean("coe_engine_queue_seconds", EXPERT), "engine's queue"),
                        Query(mean("coe_prefill_seconds", EXPERT), "prefill"),
                        Query(mean("coe_decode_seconds", EXPERT), "decode"),
                    ),
                    "s",
                    "stacked",
                    "Route and queue are the service's, the rest is the engine's.",
                ),
                Chart(
                    "Completion tokens by expert",
                    (
                        Query(
                            rate("coe_tokens_total", "expert", f'type="completion",{EXPERT}'),
                            "{{expert}}",
                        ),
                    ),
                    "short",
                    "stacked",
                    "Per second.",
                ),
                Chart(
                    "Waiting and running",
                    (
                        Query(
                            f"sum by (expert) (coe_requests_waiting{{{EXPERT}}})",
                            "{{expert}} waits",
                        ),
                        Query(
                            f"sum by (expert) (coe_requests_running{{{EXPERT}}})",
                            "{{expert}} runs",
                        ),
                    ),
                ),
                Chart(
                    "State of weights",
                    (Query("sum by (state) (coe_expert_state)", "{{state}}"),),
                    "short",
                    "stacked",
                    "Experts by the state of their weights, over all pools.",
                ),
            ),
        ),
        (
            "Replicas",
            (
                Chart(
                    "Replicas by state",
                    (
                        Query(
                            "max by (deployment, state) (coe_replicas)",
                            "{{deployment}} {{state}}",
                        ),
                    ),
                    "short",
                    "stacked",
                    "Only where autoscaling is on.",
                ),
                Chart(
                    "Wanted and running replicas",
                    (
                        Query(
                            "sum by (deployment) (max by (deployment, state) "
                            '(coe_replicas{state!="stopping"}))',
                            "{{deployment}} wanted",
                        ),
                        Query(
                            'max by (deployment) (coe_replicas{state="running"})',
                            "{{deployment}} running",
                        ),
                    ),
                ),
                Chart(
                    "Offered load",
                    (
                        Query(
                            f"sum by (expert) (coe_offered_load{{{EXPERT}}})",
                            "{{expert}}",
                        ),
                    ),
                    "short",
                    "stacked",
                    "Engines that arriving requests keep busy, over all pools.",
                ),
                Chart(
                    "Estimated wait",
                    (Query(f"max by (expert) (coe_backlog_seconds{{{EXPERT}}})", "{{expert}}"),),
                    "s",
                    "lines",
                    "Of a new request, in the pool with the longest queue.",
                ),
            ),
        ),
    ),
)
