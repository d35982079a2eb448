"""Every metric of the service, declared once.

What is counted (`meter.Meter`), the table in service/README.md (`service.cli.reference`) and the
tests come from here. To add one: declare it below, put it into its group, feed it with a
meter's `add`, `put` or `observe`, and print the docs anew. Units stand in names, a label takes
only what `labels.LABELS` says that it may, and no label ever holds anything of a prompt or a key.
"""

from __future__ import annotations

from service.telemetry.labels import MOST_SERIES
from service.telemetry.metric_types import ERROR, FAST, Declared, Side, counter, gauge, histogram

# --- requests, as their client sees them

REQUESTS = counter(
    "coe_requests_total",
    Side.GATEWAY,
    ("expert", "category", "recipe", "outcome"),
    "Requests that have ended.",
)
SERVER_ERRORS = counter(
    "coe_server_errors_total",
    Side.GATEWAY,
    ("expert",),
    "Requests that ended with an error of ours, of status 500 and more, also after a stream began.",
)
REJECTIONS = counter(
    "coe_requests_rejected_total",
    Side.GATEWAY,
    ("reason",),
    "Requests refused before anybody worked on them: bad, not allowed, over a limit, no room.",
)
FAILED_ATTEMPTS = counter(
    "coe_attempts_failed_total",
    Side.GATEWAY,
    ("expert", "reason"),
    "Attempts that failed before the first byte; the next best option is asked, if one is left.",
)
ESCALATIONS = counter(
    "coe_escalations_total",
    Side.GATEWAY,
    ("recipe",),
    "Answers for which a recipe asked its stronger expert after all.",
)
IN_FLIGHT = gauge("coe_in_flight_requests", Side.GATEWAY, (), "Requests in the gateway now.")
FIRST_TOKEN = histogram(
    "coe_time_to_first_token_seconds",
    Side.GATEWAY,
    ("expert",),
    "Streamed answers: from the request's arrival at the gateway to the first byte of its answer.",
)
BETWEEN_TOKENS = histogram(
    "coe_inter_token_latency_seconds",
    Side.BOTH,
    ("expert",),
    "Mean time from one token of an answer to the next, once per answer.",
    FAST,
)
TOTAL = histogram(
    "coe_request_duration_seconds",
    Side.GATEWAY,
    ("expert",),
    "From the request's arrival at the gateway to the end of its answer.",
)
TOKENS = counter(
    "coe_tokens_total",
    Side.BOTH,
    ("expert", "kind"),
    "Tokens: kind prompt or answer. Local experts in the pool, as their engine counts; remote "
    "ones in the gateway, as their endpoint bills.",
)

# --- where the time goes: ours, then the engine's

ROUTE = histogram(
    "coe_route_seconds",
    Side.GATEWAY,
    (),
    "Time to understand a request, from when its body is there, and to choose who answers it.",
    FAST,
)
OVERHEAD = histogram(
    "coe_gateway_overhead_seconds",
    Side.GATEWAY,
    (),
    "Our share of the time to the first byte: all of it less the pool's queue and the engine. "
    "Answered by a pool only.",
    FAST,
)
QUEUE = histogram(
    "coe_queue_seconds",
    Side.POOL,
    ("expert",),
    "Time a request waited in the pool's queue, swaps included.",
)
SWAP_WAIT = histogram(
    "coe_swap_wait_seconds",
    Side.POOL,
    ("expert",),
    "How much of a request's wait other weights were being put in place.",
)
ENGINE_QUEUE = histogram(
    "coe_engine_queue_seconds",
    Side.POOL,
    ("expert",),
    "Time a request waited in the engine's own scheduler.",
)
PREFILL = histogram(
    "coe_prefill_seconds",
    Side.BOTH,
    ("expert",),
    "The engine's time to the first token: from being scheduled. Remote experts, streamed: to "
    "the first byte.",
)
DECODE = histogram(
    "coe_decode_seconds",
    Side.BOTH,
    ("expert",),
    "The engine's time from the first token to the last.",
)

# --- how good the choice was

WAIT_ERROR = histogram(
    "coe_wait_prediction_error_seconds",
    Side.GATEWAY,
    (),
    "Real less predicted wait of a request in its pool (queue and swap). Over 0: it took longer.",
    ERROR,
)
WAIT_PREDICTED = counter(
    "coe_wait_predicted_seconds_total",
    Side.GATEWAY,
    ("expert",),
    "Predicted waits, added up.",
)
WAIT_REAL = counter(
    "coe_wait_actual_seconds_total",
    Side.GATEWAY,
    ("expert",),
    "Real waits of the same requests, added up.",
)

# --- pools, as gateways know them

POOLS = gauge("coe_pools", Side.GATEWAY, (), "Pools that the gateway hears of.")
SNAPSHOT_AGE = gauge(
    "coe_snapshot_age_seconds",
    Side.GATEWAY,
    ("pool",),
    "Time since the gateway last heard of a pool.",
)

# --- queues, residency and swaps

QUEUED = gauge(
    "coe_requests_waiting",
    Side.BOTH,
    ("expert",),
    "Requests waiting: for a local expert in the pool, for a remote one in the gateway.",
)
RUNNING = gauge(
    "coe_requests_running", Side.BOTH, ("expert",), "Requests on engines, remote ones included."
)
RESIDENCY = gauge(
    "coe_expert_state",
    Side.POOL,
    ("expert", "state"),
    "1 for the state that an expert's weights are in, 0 for the others.",
)
WEIGHTS = gauge(
    "coe_expert_weight_bytes",
    Side.POOL,
    ("expert", "tier"),
    "An expert's full weights: device where they answer, host where they wait for their turn. "
    "On CPU both are the same memory.",
)
SWAPS = counter(
    "coe_swaps_total",
    Side.POOL,
    ("expert", "method", "reason"),
    "Swaps, by the expert swapped in.",
)
CANARY_FAILURES = counter(
    "coe_canary_failures_total",
    Side.POOL,
    (),
    "Swaps after which the weights were not as first loaded. No client saw their output.",
)

# --- inside mixtures of experts, where a pool has vllm.moe_capture

MOE_TOKENS = counter(
    "coe_moe_tokens_total",
    Side.POOL,
    ("expert",),
    "Tokens whose routed experts were looked at, prompts and answers.",
)
MOE_ROUTED = counter(
    "coe_moe_routed_tokens_total",
    Side.POOL,
    ("expert", "layer", "routed"),
    "Of these, those that each of a layer's routed experts got. Of models with more of them than "
    f"a metric has room for ({MOST_SERIES:,} in all) `GET /admin/experts/NAME/moe` alone tells it.",
)
MOE_IMBALANCE = gauge(
    "coe_moe_imbalance_ratio",
    Side.POOL,
    ("expert", "layer"),
    "Tokens of a layer's busiest routed expert against the mean; 1: even.",
)
MOE_ENTROPY = gauge(
    "coe_moe_entropy_ratio",
    Side.POOL,
    ("expert", "layer"),
    "Entropy of the tokens' distribution over a layer's routed experts against the highest "
    "possible; 1: even, 0: one has them all.",
)
MOE_SRP = gauge(
    "coe_moe_segment_routing_ratio",
    Side.POOL,
    ("expert", "layer"),
    "Segment routing best performance: how well one choice for 16 consecutive tokens can do (F1).",
)
MOE_SCH = gauge(
    "coe_moe_segment_cache_hit_ratio",
    Side.POOL,
    ("expert", "layer"),
    "Segment cache best hit rate: of a cache with room for twice the experts that a token gets, "
    "which knows what the next 16 tokens use.",
)

# --- money and tenants. Gateways feed these from what budgets, limits and caches tell.

COST_PREDICTED = counter(
    "coe_cost_predicted_total",
    Side.GATEWAY,
    ("recipe",),
    "Units of cost (see `price` in the config) expected when the recipe was chosen.",
)
COST = counter(
    "coe_cost_total",
    Side.GATEWAY,
    ("recipe", "expert"),
    "Units of cost by the tokens that replies told of, by the expert that was asked. A stream "
    "without usage tells none where nobody is charged.",
)
BUDGET_LEFT = gauge(
    "coe_budget_remaining_ratio",
    Side.GATEWAY,
    ("budget",),
    "What is left of a budget in its present period: 1 untouched, 0 spent.",
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
    "Requests that have ended, by tenant; only where keys, tenants or budgets are configured.",
)
TENANT_TOKENS = counter(
    "coe_tenant_tokens_total",
    Side.GATEWAY,
    ("tenant",),
    "Tokens of prompts and answers, by tenant, as they were charged.",
)
STORE_UP = gauge(
    "coe_store_up",
    Side.GATEWAY,
    (),
    "1 while the store of limits and budgets answers this gateway, 0 while it spends its slices.",
)
STORE_OUTAGES = counter(
    "coe_store_outages_total", Side.GATEWAY, (), "Times that the store was lost."
)
STORE_OWED = gauge(
    "coe_store_pending_settlements",
    Side.GATEWAY,
    (),
    "Requests whose settlement the store has not been told of yet; 0 but for an outage.",
)
STORE_SLICE_GRANTS = counter(
    "coe_store_offline_admissions_total",
    Side.GATEWAY,
    (),
    "Requests admitted from slices while the store was gone.",
)
CACHE = counter(
    "coe_cache_lookups_total",
    Side.GATEWAY,
    ("kind", "result"),
    "Looks into the answer cache. kind: exact or semantic.",
)
BREAKER = gauge(
    "coe_breaker_open",
    Side.GATEWAY,
    ("expert",),
    "1 while requests are kept away from an expert's endpoint because it failed, else 0.",
)

GUARD = counter(
    "coe_guard_checks_total",
    Side.GATEWAY,
    ("screen", "done"),
    "Prompts that a tenant's guard looked through.",
)
RETRIES = counter(
    "coe_retries_total",
    Side.GATEWAY,
    ("done",),
    "Second attempts before the first byte: made, or refused because the budget for them was out.",
)
TRIPS = counter(
    "coe_breaker_trips_total",
    Side.GATEWAY,
    ("expert",),
    "Times that failures of an expert's own opened a breaker.",
)

PROCESS = (gauge("coe_build_info", Side.BOTH, ("version",), "1; the label tells the version."),)
BUILD = PROCESS[0]

# In the order of the docs.
GROUPS: dict[str, tuple[Declared, ...]] = {
    "Requests": (
        REQUESTS,
        SERVER_ERRORS,
        REJECTIONS,
        FAILED_ATTEMPTS,
        ESCALATIONS,
        IN_FLIGHT,
        FIRST_TOKEN,
        BETWEEN_TOKENS,
        TOTAL,
        TOKENS,
    ),
    "Where the time goes": (ROUTE, OVERHEAD, QUEUE, SWAP_WAIT, ENGINE_QUEUE, PREFILL, DECODE),
    "How good the choice was": (WAIT_ERROR, WAIT_PREDICTED, WAIT_REAL),
    "Pools": (POOLS, SNAPSHOT_AGE),
    "Queues, residency, swaps": (
        QUEUED,
        RUNNING,
        RESIDENCY,
        WEIGHTS,
        SWAPS,
        CANARY_FAILURES,
    ),
    "Inside mixtures of experts": (
        MOE_TOKENS,
        MOE_ROUTED,
        MOE_IMBALANCE,
        MOE_ENTROPY,
        MOE_SRP,
        MOE_SCH,
    ),
    "Budgets, tenants, cache": (
        COST_PREDICTED,
        COST,
        BUDGET_LEFT,
        SHADOW_PRICE,
        TENANT_REQUESTS,
        TENANT_TOKENS,
        STORE_UP,
        STORE_OUTAGES,
        STORE_OWED,
        STORE_SLICE_GRANTS,
        CACHE,
    ),
    "Guard, breakers, retries": (GUARD, BREAKER, TRIPS, RETRIES),
    "Processes": PROCESS,
}
TABLE: tuple[Declared, ...] = tuple(one for group in GROUPS.values() for one in group)
