"""Dashboard of vLLM's own metrics and of the service's processes."""

from __future__ import annotations

from deploy.grafana.dashboard_parts import EXPERT, RATE, Board, Chart, Query, quantile, rate

ENGINES = Board(
    "coe-engines",
    "coe / Engines",
    "vLLM's own metrics by expert, and the processes of gateways and pools.",
    (
        (
            "Measured by the service",
            (
                Chart(
                    "Prefill, p95",
                    (Query(quantile(0.95, "coe_prefill_seconds", "expert", EXPERT), "{{expert}}"),),
                    "s",
                ),
                Chart(
                    "Decode, p95",
                    (Query(quantile(0.95, "coe_decode_seconds", "expert", EXPERT), "{{expert}}"),),
                    "s",
                ),
                Chart(
                    "Between tokens, median",
                    (
                        Query(
                            quantile(0.5, "coe_inter_token_latency_seconds", "expert", EXPERT),
                            "{{expert}}",
                        ),
                    ),
                    "s",
                ),
                Chart(
                    "Tokens",
                    (
                        Query(
                            rate("coe_tokens_total", "expert, type", EXPERT),
                            "{{expert}} {{type}}",
                        ),
                        Query(
                            rate("coe_reasoning_tokens_total", "expert", EXPERT),
                            "{{expert}} thinking",
                        ),
                    ),
                    "short",
                    "lines",
                    "Per second. Thinking is part of the completions.",
                ),
            ),
        ),
        (
            "vLLM",
            (
                Chart(
                    "Requests in the scheduler",
                    (
                        Query(
                            f"sum by (expert) (vllm:num_requests_running{{{EXPERT}}})",
                            "{{expert}} runs",
                        ),
                        Query(
                            f"sum by (expert) (vllm:num_requests_waiting{{{EXPERT}}})",
                            "{{expert}} waits",
                        ),
                    ),
                ),
                Chart(
                    "KV cache in use",
                    (
                        Query(
                            f"max by (expert) (vllm:kv_cache_usage_perc{{{EXPERT}}})",
                            "{{expert}}",
                        ),
                    ),
                    "percentunit",
                ),
                Chart(
                    "Tokens",
                    (
                        Query(
                            rate("vllm:prompt_tokens_total", "expert", EXPERT), "{{expert}} prompt"
                        ),
                        Query(
                            rate("vllm:generation_tokens_total", "expert", EXPERT),
                            "{{expert}} answer",
                        ),
                    ),
                    "short",
                    "lines",
                    "Per second.",
                ),
                Chart(
                    "Prompt tokens found in the prefix cache",
                    (
                        Query(
                            f"{rate('vllm:prefix_cache_hits_total', 'expert', EXPERT)} / "
                            f"{rate('vllm:prefix_cache_queries_total', 'expert', EXPERT)}",
                            "{{expert}}",
                        ),
                    ),
                    "percentunit",
                ),
                Chart(
                    "Between tokens, p95",
                    (
                        Query(
                            quantile(0.95, "vllm:inter_token_latency_seconds", "expert", EXPERT),
                            "{{expert}}",
                        ),
                    ),
                    "s",
                ),
                Chart(
                    "Preempted",
                    (Query(rate("vllm:num_preemptions_total", "expert", EXPERT), "{{expert}}"),),
                    "ops",
                    "lines",
                    "Requests that vLLM preempted because the KV cache was full.",
                ),
            ),
        ),
        (
            "Mixtures of experts",
            (
                Chart(
                    "Busiest routed expert against the mean",
                    (
                        Query(
                            f"max by (expert) (coe_moe_imbalance_ratio{{{EXPERT}}})",
                            "{{expert}}, worst layer",
                        ),
                    ),
                    "short",
                    "lines",
                    "Pools with vllm.moe_capture, since their start. 1: even.",
                ),
                Chart(
                    "Evenness of the load",
                    (
                        Query(
                            f"min by (expert) (coe_moe_entropy_ratio{{{EXPERT}}})",
                            "{{expert}}, worst layer",
                        ),
                    ),
                    "percentunit",
                    "lines",
                    "Entropy over routed experts divided by the highest possible.",
                ),
                Chart(
                    "Cacheability",
                    (
                        Query(
                            f"avg by (expert) (coe_moe_segment_routing_ratio{{{EXPERT}}})",
                            "{{expert}} SRP",
                        ),
                        Query(
                            f"avg by (expert) (coe_moe_segment_cache_hit_ratio{{{EXPERT}}})",
                            "{{expert}} SCH",
                        ),
                    ),
                    "percentunit",
                    "lines",
                    "Mean of the layers: one choice for 16 tokens (SRP); a cache with room for "
                    "twice the experts of a token (SCH).",
                ),
                Chart(
                    "Tokens of the busiest routed experts",
                    (
                        Query(
                            "topk(16, "
                            + rate("coe_moe_routed_tokens_total", "expert, routed_expert", EXPERT)
                            + ")",
                            "{{expert}}, routed expert {{routed_expert}}",
                        ),
                    ),
                    "short",
                    "lines",
                    "Per second, all layers together. For large models use the admin endpoint.",
                ),
                Chart(
                    "Sampled tokens",
                    (Query(rate("coe_moe_tokens_total", "expert", EXPERT), "{{expert}}"),),
                    "short",
                    "lines",
                    "Per second.",
                ),
            ),
        ),
        (
            "Processes",
            (
                Chart(
                    "Memory of gateways and pools",
                    (
                        Query(
                            "sum by (gateway, pool) (process_resident_memory_bytes"
                            '{gateway!=""} or process_resident_memory_bytes{pool!=""})',
                            "{{gateway}}{{pool}}",
                        ),
                    ),
                    "bytes",
                    "lines",
                    "Resident; an engine's core is a process of its own and not in it.",
                ),
                Chart(
                    "Processor time of gateways and pools",
                    (
                        Query(
                            "sum by (gateway, pool) (rate(process_cpu_seconds_total"
                            f'{{gateway!=""}}[{RATE}]) or rate(process_cpu_seconds_total'
                            f'{{pool!=""}}[{RATE}]))',
                            "{{gateway}}{{pool}}",
                        ),
                    ),
                    "short",
                    "lines",
                    "Cores in use.",
                ),
            ),
        ),
    ),
)
