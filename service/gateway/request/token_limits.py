"""Limits the number of prompts and answers of a request, and the answers' length and cost."""

from __future__ import annotations

from collections.abc import Sequence

from service.broker.cost_model import CostModel
from service.config.request_limits import RequestLimits
from service.errors import InvalidRequestError
from service.gateway.request.parsing import InferenceRequest
from service.http.prompt_endpoints import TABLE


def check_extent(request: InferenceRequest, limits: RequestLimits) -> None:
    """Check the number of prompts and answers of a request.

    Raises:
        InvalidRequestError: A number exceeds its limit.
    """
    endpoint = TABLE[request.endpoint]
    name = endpoint.prompt
    if endpoint.several:
        most = limits.max_prompts if endpoint.generates else limits.max_inputs
        if request.prompts > most:
            raise InvalidRequestError(
                f"`{name}` holds {request.prompts} prompts; at most {most} are allowed in one "
                "request",
                param=name,
            )
    for field in ("n", "best_of"):
        given = request.data.get(field)
        if isinstance(given, int) and given > limits.max_choices:
            raise InvalidRequestError(
                f"`{field}` must be at most {limits.max_choices}", param=field
            )
    most = max(limits.max_prompts, limits.max_choices)
    if endpoint.generates and request.answers > most:
        raise InvalidRequestError(
            f"{request.prompts} prompts times {request.answers // request.prompts} choices are "
            f"{request.answers} answers; at most {most} are allowed in one request",
            param="n",
        )


def within_context(request: InferenceRequest, expert: str, context: int) -> InferenceRequest:
    """Bound the answers by an expert's context, unless the client set the bound for this expert.

    A client that names an expert can know its context, so the engine refuses longer answers.

    Args:
        request: The request.
        expert: The expert that answers.
        context: Its context in tokens; 0 if it is unknown.
    """
    wanted = request.given_tokens
    if not context or wanted is None or wanted <= context:
        return request
    if request.model == expert and not request.bounded:
        return request
    return request.at_most(context)


def within_cost(
    request: InferenceRequest,
    experts: Sequence[str],
    cost_model: CostModel,
    contexts: Sequence[int] = (),
    added_bytes: Sequence[int] = (),
) -> InferenceRequest:
    """Bound the answers so that one call of each expert costs at most `max_cost` in total.

    Args:
        request: The request.
        experts: The experts that are called.
        cost_model: Knows their prices.
        contexts: Their contexts in tokens; 0 if unknown. Engines refuse a greater bound.
        added_bytes: Bytes that the defaults of each expert add to the prompt; empty for none.

    Raises:
        InvalidRequestError: The cost of the prompt and one token may exceed `max_cost`.
    """
    if request.max_cost is None:
        return request
    prices = [cost_model.price(name) for name in experts]
    # A text never has more tokens than bytes.
    prompts = [request.most_prompt_tokens + more for more in added_bytes or [0] * len(prices)]
    left = request.max_cost - sum(
        price.prompt * tokens / 1e6 for price, tokens in zip(prices, prompts, strict=True)
    )
    per_token = 0.0
    if TABLE[request.endpoint].generates:
        per_token = sum(price.completion for price in prices) * request.answers / 1e6
    if left < per_token:
        raise InvalidRequestError(
            f"a prompt of up to {max(prompts)} tokens may cost more than "
            f"{request.max_cost:g} with {', '.join(experts)}",
            param="coe.max_cost",
        )
    if per_token <= 0:
        return request
    affordable = int(left / per_token)
    wanted = request.most_tokens
    if wanted is None:
        # An answer without a bound ends at the context, so a greater bound is not needed.
        known = [context for context in contexts if context]
        if len(known) == len(experts) and affordable >= max(known):
            return request
        return request.at_most(min([affordable, *known]))
    return request if wanted <= affordable else request.at_most(affordable)
