"""Every metric of the service, declared once.

`registry.MetricsRegistry`, the reference table (`service.cli.reference`) and the tests read these
declarations. To add a metric: declare it below, list it in its group, feed it with a registry's
`add`, `put` or `observe`, and regenerate the reference. Names carry units. A label holds only what
`labels.LABELS` allows, and never any part of a prompt or a key.
"""

from __future__ import annotations

from service.telemetry.label_values import MAX_SERIES
from service.telemetry.metric_types import FAST, MetricSpec, Side, counter, gauge, histogram

# --- requests, as clients see them

REQUESTS = counter(
    "coe_requests_total",
    Side.GATEWAY,
    ("expert", "category", "recipe", "outcome"),
    "Finished requests.",
)
SERVER_ERRORS = counter(
    "coe_server_errors_total",
    Side.GATEWAY,
    ("expert",),
    "Requests that failed with a status of 500 or more, including failures after a stream began.",
)
REQUESTS_REJECTED = counter(
    "coe_requests_rejected_total",
    Side.GATEWAY,
    ("reason",),
    "Requests refused before an expert worked on them: invalid, not allowed, over a limit, or "
    "without a free place.",
)
ATTEMPTS_FAILED = counter(
    "coe_attempts_failed_total",
    Side.GATEWAY,
    ("expert", "reason"),
    "Attempts that failed before the first byte. The gateway then tries the next best candidate, "
    "if there is one.",
)
ESCALATIONS = counter(
    "coe_escalations_total",
    Side.GATEWAY,
    ("recipe",),
    "Answers for which a recipe also asked its stronger expert.",
)
SESSION_TURNS = counter(
    "coe_session_turns_total",
    Side.GATEWAY,
    ("decision",),
    "Later turns of conversations: locked to the expert whose tool call is open, kept, switched "
    "for a gain, or released because the session's expert is unknown or can't answer.",
)
PREFIX_TURNS = counter(
    "coe_prefix_cache_turns_total",
    Side.GATEWAY,
    ("place",),
    "Answered later turns of conversations: cached if the engine answered that has the "
    "conversation in its prefix cache, elsewhere if another one did, unknown if no pool tells of "
    "the conversation.",
)
ALIAS_REQUESTS = counter(
    "coe_alias_requests_total",
    Side.GATEWAY,
    ("alias", "target", "result"),
    "Finished requests that named an alias, by what it stood for.",
)
ALIAS_ROLLED_BACK = gauge(
    "coe_alias_rollback_state",
    Side.GATEWAY,
    ("alias", "target"),
    "1 where a target of an alias gets no requests, because it was rolled back; else 0.",
)
ALIAS_ROLLBACKS = counter(
    "coe_alias_rollbacks_total",
    Side.GATEWAY,
    ("alias", "target", "reason"),
    "Roll-backs of an alias's targets that this gateway decided on.",
)
IN_FLIGHT = gauge("coe_in_flight_requests", Side.GATEWAY, (), "Requests in the gateway now.")
TIME_TO_FIRST_TOKEN = histogram(
    "coe_time_to_first_token_seconds",
    Side.GATEWAY,
    ("expert",),
    "Streamed answers: time from the request's arrival at the gateway to the first byte of the "
    "answer.",
)
INTER_TOKEN_LATENCY = histogram(
    "coe_inter_token_latency_seconds",
    Side.BOTH,
    ("expert",),
    "Mean time between two tokens of an answer, observed once per answer.",
    FAST,
)
REQUEST_DURATION = histogram(
    "coe_request_duration_seconds",
    Side.GATEWAY,
    ("expert",),
    "Time from the request's arrival at the gateway to the end of its answer.",
)
TOKENS = counter(
    "coe_tokens_total",
    Side.BOTH,
    ("expert", "type"),
    "Tokens by type: prompt or completion. The pool counts those of local experts, as the engine "
    "reports them; the gateway those of remote experts, as the endpoint bills them.",
)

REASONING_TOKENS = counter(
    "coe_reasoning_tokens_total",
    Side.GATEWAY,
    ("expert",),
    "Completion tokens that are thinking, where the engine or endpoint tells them.",
)

# --- latency: the gateway's, then the engine's

ROUTE = histogram(
    "coe_route_seconds",
    Side.GATEWAY,
    (),
    "Time from the complete request body to the choice of an expert: parsing, classification, "
    "selection.",
    FAST,
)
ROUTER_STAGES = counter(
    "coe_router_stage_total",
    Side.GATEWAY,
    ("stage",),
    "Prompts by the stage of the classifier that decided; general where every stage was unsure.",
)
ROUTER_ENCODER_REQUESTS = counter(
    "coe_router_encoder_total",
    Side.GATEWAY,
    ("reason",),
    "Prompts of which the router's first stage was unsure: ok where the encoder had a vector in "
    "time, needless where it was not asked as every category in doubt has the same experts, else "
    "why the first stage decided (missing, mismatch, starting, failed, busy, slow, paused).",
)
ROUTER_ENCODER = histogram(
    "coe_router_encoder_seconds",
    Side.GATEWAY,
    (),
    "Time that a request waited for the encoder's vector of its prompt, cached ones included.",
    FAST,
)
GATEWAY_OVERHEAD = histogram(
    "coe_gateway_overhead_seconds",
    Side.GATEWAY,
    (),
    "The gateway's share of the time to the first byte: all of it less the pool's queue and the "
    "engine. Only requests that a pool answered.",
    FAST,
)
QUEUE = histogram(
    "coe_queue_seconds",
    Side.POOL,
    ("expert",),
    "Time that a request waited in the pool's queue, including swaps.",
)
SWAP_WAIT = histogram(
    "coe_swap_wait_seconds",
    Side.POOL,
    ("expert",),
    "Part of a request's wait in which the pool was swapping weights.",
)
ENGINE_QUEUE = histogram(
    "coe_engine_queue_seconds",
    Side.POOL,
    ("expert",),
    "Time that a request waited in the engine's own scheduler.",
)
PREFILL = histogram(
    "coe_prefill_seconds",
    Side.BOTH,
    ("expert",),
    "Time from scheduling in the engine to the first token. Remote experts: time to the first "
    "byte of a stream.",
)
DECODE = histogram(
    "coe_decode_seconds",
    Side.BOTH,
    ("expert",),
    "Time in the engine from the first token to the last.",
)

# --- accuracy of predictions

WAIT_PREDICTION_ERROR = histogram(
    "coe_wait_prediction_error_seconds",
    Side.GATEWAY,
    ("direction",),
    "Difference of the actual and the predicted wait of a request in its pool (queue and swap).",
)
WAIT_PREDICTED = counter(
    "coe_wait_predicted_seconds_total",
    Side.GATEWAY,
    ("expert",),
    "Sum of the predicted waits.",
)
WAIT_ACTUAL = counter(
    "coe_wait_actual_seconds_total",
    Side.GATEWAY,
    ("expert",),
    "Sum of the actual waits of the same requests.",
)

# --- pools, as gateways see them

POOLS = gauge("coe_pools", Side.GATEWAY, (), "Pools that the gateway receives snapshots from.")
SNAPSHOT_AGE = gauge(
    "coe_snapshot_age_seconds",
    Side.GATEWAY,
    ("pool",),
    "Time since the gateway last received a snapshot of a pool.",
)

# --- autoscaling

REPLICAS = gauge(
    "coe_replicas",
    Side.GATEWAY,
    ("deployment", "state"),
    "Replicas by state, where autoscaling is on. Starting and running ones together are as many "
    "as are wanted.",
)
OFFERED_LOAD = gauge(
    "coe_offered_load",
    Side.POOL,
    ("expert",),
    "Engines that an expert's arriving requests keep busy: arrivals per second × seconds of "
    "service ÷ places of an engine.",
)
BACKLOG = gauge(
    "coe_backlog_seconds",
    Side.POOL,
    ("expert",),
    "Estimated wait of a new request in the pool's queue.",
)

# --- queues, residency and swaps

REQUESTS_WAITING = gauge(
    "coe_requests_waiting",
    Side.BOTH,
    ("expert",),
    "Waiting requests: of a local expert in the pool, of a remote expert in the gateway.",
)
REQUESTS_RUNNING = gauge(
    "coe_requests_running",
    Side.BOTH,
    ("expert",),
    "Requests that engines work on, including those of remote experts.",
)
EXPERT_STATE = gauge(
    "coe_expert_state",
    Side.POOL,
    ("expert", "state"),
    "1 for the present state of an expert's weights, 0 for the other states.",
)
EXPERT_WEIGHT_BYTES = gauge(
    "coe_expert_weight_bytes",
    Side.POOL,
    ("expert", "tier"),
    "Size of an expert's weights by tier: device while it can answer, host while it waits for a "
    "swap. On CPU both tiers are the same memory.",
)
SWAPS = counter(
    "coe_swaps_total",
    Side.POOL,
    ("expert", "method", "reason"),
    "Swaps, by the expert that was swapped in.",
)
UNLOADS = counter(
    "coe_unloads_total",
    Side.POOL,
    ("expert", "reason"),
    "Times that experts gave their memory back until the next request, by an expert of the engine.",
)
SWAP_METHOD = gauge(
    "coe_swap_method_info",
    Side.POOL,
    ("method", "source"),
    "Always 1: the method of the pool's swaps, and what its choice is founded on. No sample where "
    "nothing is swapped.",
)
GPU_MEMORY = gauge(
    "coe_gpu_memory_bytes",
    Side.POOL,
    ("gpu", "state"),
    "Memory of the pool's GPUs, read at most every five seconds: total, used and free as the "
    "driver counts them for all processes, and reserved by this pool's engines. Nothing on CPUs.",
)
CANARY_FAILURES = counter(
    "coe_canary_failures_total",
    Side.POOL,
    (),
    "Swaps after which the weights differed from the first load. No client received output of "
    "these weights.",
)

# --- mixtures of experts, in pools with `vllm.moe_capture`

MOE_TOKENS = counter(
    "coe_moe_tokens_total",
    Side.POOL,
    ("expert",),
    "Tokens of prompts and answers whose routed experts were sampled.",
)
MOE_ROUTED_TOKENS = counter(
    "coe_moe_routed_tokens_total",
    Side.POOL,
    ("expert", "layer", "routed_expert"),
    "Sampled tokens by layer and routed expert. A metric has at most "
    f"{MAX_SERIES:,} series; models with more routed experts are only in "
    "`GET /admin/experts/NAME/moe`.",
)
MOE_IMBALANCE = gauge(
    "coe_moe_imbalance_ratio",
    Side.POOL,
    ("expert", "layer"),
    "Tokens of a layer's busiest routed expert divided by the mean; 1: even.",
)
MOE_ENTROPY = gauge(
    "coe_moe_entropy_ratio",
    Side.POOL,
    ("expert", "layer"),
    "Entropy of the tokens' distribution over a layer's routed experts, divided by the highest "
    "possible; 1: even, 0: one routed expert gets all tokens.",
)
MOE_SEGMENT_ROUTING = gauge(
    "coe_moe_segment_routing_ratio",
    Side.POOL,
    ("expert", "layer"),
    "Segment routing best performance: how well one choice of routed experts for 16 consecutive "
    "tokens can do (F1).",
)
MOE_SEGMENT_CACHE_HITS = gauge(
    "coe_moe_segment_cache_hit_ratio",
    Side.POOL,
    ("expert", "layer"),
    "Segment cache best hit rate: hits of a cache that knows what the next 16 tokens use and has "
    "room for twice the routed experts that a token gets.",
)

# --- budgets, tenants, cache

COST_PREDICTED = counter(
    "coe_cost_predicted_total",
    Side.GATEWAY,
    ("recipe",),
    "Units of cost (see `price` in the config) that were expected when the recipe was chosen.",
)
COST = counter(
    "coe_cost_total",
    Side.GATEWAY,
    ("recipe", "expert"),
    "Units of cost, computed from the tokens that replies report, by the expert that answered. A "
    "stream without usage adds nothing where nobody is charged.",
)
BUDGET_REMAINING = gauge(
    "coe_budget_remaining_ratio",
    Side.GATEWAY,
    ("budget",),
    "Remaining share of a budget in its present period: 1 untouched, 0 spent.",
)
SHADOW_PRICE = gauge(
    "coe_shadow_price",
    Side.GATEWAY,
    ("budget",),
    "Quality that one more unit of cost is worth now to this budget (its λ).",
)
TENANT_REQUESTS = counter(
    "coe_tenant_requests_total",
    Side.GATEWAY,
    ("tenant", "outcome"),
    "Finished requests by tenant; only where keys, tenants or budgets are configured.",
)
TENANT_TOKENS = counter(
    "coe_tenant_tokens_total",
    Side.GATEWAY,
    ("tenant",),
    "Charged tokens of prompts and answers, by tenant.",
)
SAVINGS_REQUESTS = counter(
    "coe_savings_requests_total",
    Side.GATEWAY,
    ("tenant", "baseline"),
    "Answered requests that the router decided and that were compared with a baseline.",
)
SAVINGS_COST = counter(
    "coe_savings_cost_total",
    Side.GATEWAY,
    ("tenant", "baseline"),
    "What the compared requests cost, in units of cost.",
)
SAVINGS_BASELINE_COST = counter(
    "coe_savings_baseline_cost_total",
    Side.GATEWAY,
    ("tenant", "baseline"),
    "What the baseline would be expected to cost for the same requests; less "
    "`coe_savings_cost_total` it is what was saved.",
)
SAVINGS_QUALITY = counter(
    "coe_savings_quality_total",
    Side.GATEWAY,
    ("tenant", "baseline"),
    "Sum of the expected qualities of the recipes that answered the compared requests.",
)
SAVINGS_BASELINE_QUALITY = counter(
    "coe_savings_baseline_quality_total",
    Side.GATEWAY,
    ("tenant", "baseline"),
    "Sum of the expected qualities of the baseline on the same requests.",
)
SHADOW_REQUESTS = counter(
    "coe_shadow_requests_total",
    Side.GATEWAY,
    ("result",),
    "Answered requests that were chosen for shadow evaluation, by how it ended.",
)
SHADOW_COST = counter(
    "coe_shadow_cost_total",
    Side.GATEWAY,
    ("expert",),
    "Units of cost that shadow evaluation has spent, judges included. No tenant is charged for it.",
)
BATCHES = gauge(
    "coe_batches",
    Side.GATEWAY,
    ("status",),
    "Batches that have not ended, by state. Every gateway counts those of all gateways.",
)
BATCH_OLDEST = gauge(
    "coe_batch_oldest_age_seconds",
    Side.GATEWAY,
    (),
    "Age of the oldest batch that has not ended; 0 without one.",
)
BATCH_LINES = counter(
    "coe_batch_lines_total",
    Side.GATEWAY,
    ("result",),
    "Lines of batches with a result, and tries of lines that have to be repeated.",
)
RESPONSES_STORED = counter(
    "coe_responses_stored_total",
    Side.GATEWAY,
    ("result",),
    "Responses that were to be stored, by what became of them.",
)
RESPONSES_EVICTED = counter(
    "coe_responses_evicted_total",
    Side.GATEWAY,
    (),
    "Stored responses and conversations that made room for others of their tenant.",
)
RESPONSES_ENTRIES = gauge(
    "coe_responses_entries",
    Side.GATEWAY,
    (),
    "Stored responses and conversations. Every gateway counts those of all gateways.",
)
RESPONSES_BYTES = gauge(
    "coe_responses_bytes",
    Side.GATEWAY,
    (),
    "Bytes of stored responses and conversations. Every gateway counts those of all gateways.",
)
STORE_UP = gauge(
    "coe_store_up",
    Side.GATEWAY,
    (),
    "1 while the store of limits and budgets is reachable, 0 while this gateway admits from its "
    "offline quota.",
)
STORE_OUTAGES = counter(
    "coe_store_outages_total", Side.GATEWAY, (), "Times that the connection to the store was lost."
)
STORE_PENDING_SETTLEMENTS = gauge(
    "coe_store_pending_settlements",
    Side.GATEWAY,
    (),
    "Requests whose settlement has not reached the store yet; above 0 only during an outage.",
)
STORE_OFFLINE_ADMISSIONS = counter(
    "coe_store_offline_admissions_total",
    Side.GATEWAY,
    (),
    "Requests admitted from the offline quota while the store was unreachable.",
)
CACHE_LOOKUPS = counter(
    "coe_cache_lookups_total",
    Side.GATEWAY,
    ("kind", "result"),
    "Lookups in the answer cache. kind: exact or similar.",
)
BREAKER_OPEN = gauge(
    "coe_breaker_open",
    Side.GATEWAY,
    ("expert",),
    "1 while the circuit breaker keeps requests away from an expert's endpoint, else 0.",
)

GUARD_CHECKS = counter(
    "coe_guard_checks_total",
    Side.GATEWAY,
    ("screen", "action"),
    "Prompts that a screen of a tenant's guard checked.",
)
RETRIES = counter(
    "coe_retries_total",
    Side.GATEWAY,
    ("result",),
    "Retries before the first byte: made, or refused because the retry budget was used up.",
)
BREAKER_TRIPS = counter(
    "coe_breaker_trips_total",
    Side.GATEWAY,
    ("expert",),
    "Times that an expert's failures opened its circuit breaker.",
)

PROCESS = (
    gauge("coe_build_info", Side.BOTH, ("version",), "Always 1; the label holds the version."),
)
BUILD_INFO = PROCESS[0]

# The reference lists the groups in this order.
GROUPS: dict[str, tuple[MetricSpec, ...]] = {
    "Requests": (
        REQUESTS,
        SERVER_ERRORS,
        REQUESTS_REJECTED,
        ATTEMPTS_FAILED,
        ESCALATIONS,
        SESSION_TURNS,
        PREFIX_TURNS,
        ALIAS_REQUESTS,
        ALIAS_ROLLED_BACK,
        ALIAS_ROLLBACKS,
        IN_FLIGHT,
        TIME_TO_FIRST_TOKEN,
        INTER_TOKEN_LATENCY,
        REQUEST_DURATION,
        TOKENS,
        REASONING_TOKENS,
    ),
    "Where the time goes": (
        ROUTE,
        ROUTER_STAGES,
        ROUTER_ENCODER_REQUESTS,
        ROUTER_ENCODER,
        GATEWAY_OVERHEAD,
        QUEUE,
        SWAP_WAIT,
        ENGINE_QUEUE,
        PREFILL,
        DECODE,
    ),
    "How good the choice was": (WAIT_PREDICTION_ERROR, WAIT_PREDICTED, WAIT_ACTUAL),
    "Pools": (POOLS, SNAPSHOT_AGE),
    "Autoscaling": (REPLICAS, OFFERED_LOAD, BACKLOG),
    "Queues, residency, swaps": (
        REQUESTS_WAITING,
        REQUESTS_RUNNING,
        EXPERT_STATE,
        EXPERT_WEIGHT_BYTES,
        SWAPS,
        UNLOADS,
        GPU_MEMORY,
        SWAP_METHOD,
        CANARY_FAILURES,
    ),
    "Inside mixtures of experts": (
        MOE_TOKENS,
        MOE_ROUTED_TOKENS,
        MOE_IMBALANCE,
        MOE_ENTROPY,
        MOE_SEGMENT_ROUTING,
        MOE_SEGMENT_CACHE_HITS,
    ),
    "Budgets, tenants, cache": (
        COST_PREDICTED,
        COST,
        BUDGET_REMAINING,
        SHADOW_PRICE,
        TENANT_REQUESTS,
        TENANT_TOKENS,
        SAVINGS_REQUESTS,
        SAVINGS_COST,
        SAVINGS_BASELINE_COST,
        SAVINGS_QUALITY,
        SAVINGS_BASELINE_QUALITY,
        SHADOW_REQUESTS,
        SHADOW_COST,
        BATCHES,
        BATCH_OLDEST,
        BATCH_LINES,
        RESPONSES_STORED,
        RESPONSES_EVICTED,
        RESPONSES_ENTRIES,
        RESPONSES_BYTES,
        STORE_UP,
        STORE_OUTAGES,
        STORE_PENDING_SETTLEMENTS,
        STORE_OFFLINE_ADMISSIONS,
        CACHE_LOOKUPS,
    ),
    "Guard, breakers, retries": (GUARD_CHECKS, BREAKER_OPEN, BREAKER_TRIPS, RETRIES),
    "Processes": PROCESS,
}
METRICS: tuple[MetricSpec, ...] = tuple(metric for group in GROUPS.values() for metric in group)
