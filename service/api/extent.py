"""How much a request may come to: its prompts, its answers, their length, and their cost."""

from __future__ import annotations

from collections.abc import Sequence

from service.api.body import Asked
from service.broker.market import Market
from service.errors import InvalidRequest

# Where each endpoint's body says how long the answer may be; the first that is given counts.
LENGTHS: dict[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
# Where a body may hold a list of prompts.
_SEVERAL = {"/v1/completions": "prompt", "/v1/embeddings": "input"}
# vLLM's own, where a completion gives none.
_COMPLETION = 16


def prompts_of(asked: Asked) -> int:
    """How many prompts a request has, each of which may fill the context."""
    given = asked.data.get(_SEVERAL.get(asked.endpoint, ""))
    if isinstance(given, list) and given and not isinstance(given[0], int):
        return len(given)
    return 1


def answers_of(asked: Asked) -> int:
    """How many answers are asked for: choices, times prompts where there are several."""
    given = [asked.data.get(name) for name in ("n", "best_of")]
    choices = [one for one in given if isinstance(one, int) and not isinstance(one, bool)]
    return max([1, *choices]) * prompts_of(asked)


def length_of(asked: Asked) -> int | None:
    """How many tokens each answer may have, as asked for. Only for the endpoints of `LENGTHS`."""
    for name in LENGTHS[asked.endpoint]:
        given = asked.data.get(name)
        if isinstance(given, int) and not isinstance(given, bool) and given > 0:
            return given
    return _COMPLETION if asked.endpoint == "/v1/completions" else None


def within(asked: Asked, experts: Sequence[str], market: Market) -> Asked:
    """With answers so short that one call of each expert surely costs `max_cost` at most together.

    Raises InvalidRequest where not even one token does.
    """
    if asked.max_cost is None:
        return asked
    prices = [market.price(name) for name in experts]
    # No tokenizer makes more tokens than there are bytes.
    left = asked.max_cost - sum(price.prompt for price in prices) * asked.body_bytes / 1e6
    per_token = 0.0
    if asked.endpoint in LENGTHS:
        per_token = sum(price.completion for price in prices) * answers_of(asked) / 1e6
    if left < per_token:
        raise InvalidRequest(
            f"a prompt of {asked.body_bytes} bytes may cost more than {asked.max_cost:g} with "
            f"{', '.join(experts)}",
            param="coe.max_cost",
        )
    if per_token <= 0:
        return asked
    most = int(left / per_token)
    wanted = asked.most_tokens
    return asked if wanted is not None and wanted <= most else asked.at_most(most)
