"""Dashboard of residency, swaps and waiting times."""

from __future__ import annotations

from deploy.grafana.dashboard_parts import EXPERT, Board, Chart, Query, quantile, quantiles, rate

RESIDENCY = Board(
    "coe-residency",
    "coe / Residency and swaps",
    "State of weights, swaps, and waiting times.",
    (
        (
            "Residency",
            (
                Chart(
                    "State of each expert's weights",
                    (
                        Query(
                            f"max by (expert, state) (coe_expert_state{{{EXPERT}}}) == 1",
                            "{{expert}}: {{state}}",
                        ),
                    ),
                    "short",
                    "states",
                    "A bar marks an expert's state in at least one pool.",
                    24,
                ),
                Chart(
                    "Memory for weights",
                    (
                        Query(
                            f"sum by (expert, tier) (coe_expert_weight_bytes{{{EXPERT}}})",
                            "{{expert}} {{tier}}",
                        ),
                    ),
                    "bytes",
                    "stacked",
                ),
                Chart(
                    "Experts by state",
                    (Query("sum by (state) (coe_expert_state)", "{{state}}"),),
                    "short",
                    "stacked",
                ),
            ),
        ),
        (
            "GPUs",
            (
                Chart(
                    "Memory of the GPUs",
                    (
                        Query(
                            "max by (instance, gpu, state) "
                            '(coe_gpu_memory_bytes{state!="reserved"})',
                            "GPU {{gpu}} {{state}}",
                        ),
                        Query(
                            'sum by (instance, gpu) (coe_gpu_memory_bytes{state="reserved"})',
                            "GPU {{gpu}} reserved",
                        ),
                    ),
                    "bytes",
                    about="Total, used and free as the driver counts them for all processes; "
                    "reserved by engines of pools. Nothing on CPUs.",
                ),
                Chart(
                    "Methods of swaps",
                    (
                        Query(
                            "count by (method, source) (coe_swap_method_info)",
                            "{{method}} ({{source}})",
                        ),
                    ),
                    "short",
                    "states",
                    "Pools by the method of their swaps, and what its choice is founded on.",
                ),
            ),
        ),
        (
            "Swaps",
            (
                Chart(
                    "Swaps by expert and method",
                    (
                        Query(
                            rate("coe_swaps_total", "expert, method", EXPERT),
                            "{{expert}} {{method}}",
                        ),
                    ),
                    "ops",
                    "stacked",
                ),
                Chart(
                    "Swaps by reason",
                    (Query(rate("coe_swaps_total", "reason"), "{{reason}}"),),
                    "ops",
                    "stacked",
                ),
                Chart(
                    "Unloads by reason",
                    (
                        Query(
                            rate("coe_unloads_total", "expert, reason", EXPERT),
                            "{{expert}} {{reason}}",
                        ),
                    ),
                    "ops",
                    "stacked",
                    "Experts that gave their memory back until the next request.",
                ),
                Chart(
                    "Time requests waited for swaps",
                    quantiles("coe_swap_wait_seconds", EXPERT),
                    "s",
                ),
                Chart(
                    "Share of swaps in the wait",
                    (
                        Query(
                            f"{rate('coe_swap_wait_seconds_sum', 'expert', EXPERT)} / "
                            f"{rate('coe_queue_seconds_sum', 'expert', EXPERT)}",
                            "{{expert}}",
                        ),
                    ),
                    "percentunit",
                ),
                Chart(
                    "Canary failures",
                    (Query("sum by (pool) (coe_canary_failures_total)", "{{pool}}"),),
                    "short",
                    "lines",
                    "Since each pool's start. Swaps after which the weights were not as first "
                    "loaded.",
                ),
            ),
        ),
        (
            "Queues",
            (
                Chart(
                    "Waiting",
                    (Query(f"sum by (expert) (coe_requests_waiting{{{EXPERT}}})", "{{expert}}"),),
                    "short",
                    "stacked",
                ),
                Chart(
                    "Time in the pool's queue, p95",
                    (Query(quantile(0.95, "coe_queue_seconds", "expert", EXPERT), "{{expert}}"),),
                    "s",
                ),
            ),
        ),
    ),
)
