"""How much a request may come to: its prompts, its answers, their length, and their cost."""

from __future__ import annotations

from collections.abc import Sequence

from service.broker.cost_model import CostModel
from service.config.limits import RequestLimits
from service.errors import InvalidRequestError
from service.gateway.request.parsing import InferenceRequest
from service.http.endpoints import TABLE


def check_extent(asked: InferenceRequest, limits: RequestLimits) -> None:
    """Raises InvalidRequestError where a request has too many prompts, answers or messages."""
    endpoint = TABLE[asked.endpoint]
    name = endpoint.prompt
    if endpoint.several:
        most = limits.max_prompts if endpoint.generates else limits.max_inputs
        if asked.prompts > most:
            raise InvalidRequestError(
                f"`{name}` holds {asked.prompts} prompts, and no more than {most} may come in one "
                "request",
                param=name,
            )
    for field in ("n", "best_of"):
        given = asked.data.get(field)
        if isinstance(given, int) and given > limits.max_choices:
            raise InvalidRequestError(
                f"`{field}` must be no more than {limits.max_choices}", param=field
            )
    most = max(limits.max_prompts, limits.max_choices)
    if endpoint.generates and asked.answers > most:
        raise InvalidRequestError(
            f"{asked.prompts} prompts times {asked.answers // asked.prompts} choices are "
            f"{asked.answers} answers, and no more than {most} may be asked for in one request",
            param="n",
        )
    given = None if endpoint.several else asked.data.get(name)
    if isinstance(given, list):
        parts = (one.get("content") for one in given if isinstance(one, dict))
        count = len(given) + sum(len(part) for part in parts if isinstance(part, list))
        if count > limits.max_messages:
            raise InvalidRequestError(
                f"`{name}` holds {count} messages and parts of them, and no more than "
                f"{limits.max_messages} may come",
                param=name,
            )


def within_context(asked: InferenceRequest, expert: str, context: int) -> InferenceRequest:
    """With answers no longer than an expert's context, for a client that did not choose it.

    Who names an expert can know its context, and is told by the engine that it is too small.
    `context`: in tokens, 0 where it is not known.
    """
    wanted = asked.given_tokens
    if not context or wanted is None or wanted <= context or asked.model == expert:
        return asked
    return asked.at_most(context)


def within_cost(
    asked: InferenceRequest, experts: Sequence[str], market: CostModel, contexts: Sequence[int] = ()
) -> InferenceRequest:
    """With answers so short that one call of each expert surely costs `max_cost` at most together.

    `contexts`: those of the experts in tokens, 0 where one is not known; engines refuse a
    bound above theirs. Raises InvalidRequestError where not even one token is cheap enough.
    """
    if asked.max_cost is None:
        return asked
    prices = [market.price(name) for name in experts]
    # No tokenizer makes more tokens than there are bytes.
    left = asked.max_cost - sum(price.prompt for price in prices) * asked.most_prompt_tokens / 1e6
    per_token = 0.0
    if TABLE[asked.endpoint].generates:
        per_token = sum(price.completion for price in prices) * asked.answers / 1e6
    if left < per_token:
        raise InvalidRequestError(
            f"a prompt of up to {asked.most_prompt_tokens} tokens may cost more than "
            f"{asked.max_cost:g} with {', '.join(experts)}",
            param="coe.max_cost",
        )
    if per_token <= 0:
        return asked
    affordable = int(left / per_token)
    wanted = asked.most_tokens
    if wanted is None:
        # Where none is given the smallest context bounds it as well: no clip is needed above.
        known = [context for context in contexts if context]
        if len(known) == len(experts) and affordable >= max(known):
            return asked
        return asked.at_most(min([affordable, *known]))
    return asked if wanted <= affordable else asked.at_most(affordable)
