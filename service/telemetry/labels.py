"""What a metric's labels may hold, and how many sets of them a process tells at most."""

from __future__ import annotations

# What bounds each label. A meter cuts off what is over `MOST_SERIES` all the same.
LABELS = {
    "budget": "name of a budget in the config, or tenant/NAME for a tenant's own",
    "category": "a category of the router's artifact or the config; empty where none was found",
    "done": "guard: passed, flagged, redacted, refused; retries: made, refused",
    "expert": "name of an expert in the config; empty where none was chosen",
    "gateway": "the gateway process, on every sample of it",
    "kind": "as the metric says",
    "layer": "number of a decoder layer that routes tokens",
    "method": "how a swap is done: inplace, respawn, lora, sleep, steer",
    "outcome": "ok, client_gone, client_error, server_error, or an error's code",
    "pool": "kind and boot id of the pool process, on every sample of it",
    "reason": "an error's code, or why the planner swapped",
    "recipe": "name of a recipe in the artifact, or single",
    "result": "hit or miss",
    "routed": "number of an expert inside a layer of a mixture of experts",
    "screen": "injection or personal",
    "state": "disk, host, device, loading, draining, failed",
    "tenant": "name of a tenant in the config or the store; never a key",
    "tier": "host or device",
    "version": "of this package",
}
# Label sets of one metric in one process; what comes after is counted under `OTHER`.
MOST_SERIES = 2000
OTHER = "other"
