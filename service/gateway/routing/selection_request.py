"""From a request and what its answers are worth to what the broker weighs."""

from __future__ import annotations

import math
from collections.abc import Collection

from service.broker.cost_model import LONG_TOKENS, CostModel
from service.broker.selection import PrefixCacheHint, SelectionRequest
from service.gateway.request.parsing import InferenceRequest
from service.gateway.routing.candidates import RoutePlan


def selection_request(
    market: CostModel,
    asked: InferenceRequest,
    plan: RoutePlan,
    *,
    left_s: float | None = None,
    banned: Collection[tuple[str, str]] = (),
    cost_price: float = 0.0,
    warm: PrefixCacheHint | None = None,
) -> SelectionRequest:
    """`left_s`: what is left of the deadline; `banned`: places not to be asked again;
    `cost_price`: quality per unit of cost; `warm`: where the conversation is cached."""
    expected = market.expect(plan.category, asked.prompt_tokens, asked.most_tokens, asked.answers)
    return SelectionRequest(
        rows=plan.rows,
        quality=plan.quality,
        reach=plan.reach,
        tokens=expected.tokens,
        cost=expected.cost,
        prompt_tokens=asked.prompt_tokens,
        time_price=plan.time_price,
        cost_price=cost_price,
        most_cost=asked.max_cost if asked.max_cost is not None else math.inf,
        deadline_s=left_s if left_s is not None else asked.deadline_ms / 1000,
        # A bound above that is a cap: what does not fit is clipped.
        context_tokens=asked.prompt_tokens + min(asked.most_tokens or 0, LONG_TOKENS),
        streams=asked.stream,
        warm=warm,
        banned=banned,
    )
