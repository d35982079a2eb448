"""The values that a metric's labels may hold, and the limit of series per metric."""

from __future__ import annotations

# The bound of each label's values. `MAX_SERIES` limits every metric as well.
LABELS = {
    "action": "passed, flagged, redacted, refused",
    "alias": "name of an alias in the config, patterns as they stand there",
    "baseline": "an expert or recipe of `savings.against`, or the one of best quality",
    "budget": "name of a budget in the config, or tenant/NAME for a tenant's own",
    "category": "a category of the router's artifact or the config; empty where none was found",
    "decision": "of a conversation's next turn: locked, kept, switched, released",
    "deployment": "gateway, or pool- and the kind of pool",
    "direction": "of a prediction: under (too low) or over (too high, or right)",
    "expert": "name of an expert in the config; empty where none was chosen",
    "gateway": "id of the gateway process, on each of its samples",
    "gpu": "number of a GPU in nvidia-smi's list",
    "kind": "of a cache lookup: exact or similar",
    "layer": "number of a decoder layer that routes tokens",
    "method": "method of a swap: inplace, respawn, lora, sleep, steer",
    "outcome": "ok, client_gone, client_error, server_error, or an error's code",
    "place": "of a conversation's next turn: cached, elsewhere, unknown",
    "pool": "kind and boot id of the pool process, on each of its samples",
    "reason": "an error's code, why the planner swapped, or why a target was rolled back (errors "
    "or refusals), or why an expert was unloaded (idle, unload, release, died)",
    "recipe": "name of a recipe in the artifact, or single",
    "result": "of a cache lookup: hit or miss; of a retry: made or refused; "
    "of a shadow evaluation: recorded, queue_full, reply_unusable, no_expert, over_budget, "
    "undecided, forgotten, stopped or failed; of a batch's line: completed, failed, or retried; "
    "of a response: stored, too_large, storage_full or unavailable; "
    "of a request by an alias: ok, error, refused or uncounted",
    "routed_expert": "number of an expert inside a layer of a mixture of experts",
    "screen": "injection or pii",
    "source": "what a swap method is founded on: config, release (its tests), proof (a record of "
    "coe doctor), or fallback (nothing faster is proven)",
    "stage": "ngrams, static, encoder or general: the stage of the router's classifier",
    "state": "of weights: disk, host, device, loading, draining, failed; of a replica: starting, "
    "running, stopping; of a GPU's memory: total, used, free, reserved",
    "status": "of a batch: validating, in_progress, finalizing or cancelling",
    "target": "of an alias: an expert, a recipe, or a name of auto",
    "tenant": "name of a tenant in the config or the store; never a key",
    "tier": "host or device",
    "type": "prompt or completion",
    "version": "version of this package",
}
# Series of one metric in one process. Later ones are counted under the label `OTHER`.
MAX_SERIES = 2000
OTHER = "other"
