"""A decision for people: the posterior, and every candidate with what decided."""

from __future__ import annotations

import math
from typing import Any

from service.broker.selection import Exclusion, Selection
from service.gateway.routing.candidates import RoutePlan

_WHY = {
    Exclusion.NO_POOL: "no running pool has it",
    Exclusion.RESTING: "it has failed several times in a row, and is left alone for a moment",
    Exclusion.CONTEXT: "the prompt and its answer do not fit into its context",
    Exclusion.MAX_COST: "costs more than max_cost",
    Exclusion.DEADLINE: "would miss the deadline",
}
_MOST = 256


def explain(plan: RoutePlan, weighed: Selection) -> dict[str, Any]:
    """As JSON; times in s, null where there are none. Candidates best first, 256 at most."""
    scores = plan.scores
    posterior = dict(zip(scores.labels, scores.probabilities, strict=True)) if scores else {}
    order = [int(at) for at in weighed.order()[:_MOST]]
    best = weighed.best()
    return {
        "category": plan.category,
        "confidence": round(plan.confidence, 4),
        "novelty": round(scores.novelty, 4) if scores else None,
        "posterior": {label: round(p, 4) for label, p in posterior.items()},
        "reason": plan.reason,
        "time_price": plan.time_price,
        "cost_price": round(weighed.wish.cost_price, 9),
        "chosen": None if best is None else _candidate(weighed, best, best)["recipe"],
        "candidates": [_candidate(weighed, at, best) for at in order],
    }


def _candidate(weighed: Selection, at: int, best: int | None) -> dict[str, Any]:
    recipe = weighed.book.recipes[int(weighed.wish.rows[at])]
    options = [weighed.option(name) for name in recipe.members]
    there = [one for one in options if one is not None]
    barred = Exclusion(int(weighed.barred[at]))
    behind = None if best is None else float(weighed.utility[best] - weighed.utility[at])
    if barred:
        why = _WHY[barred]
    elif at == best:
        why = "the greatest utility"
    else:
        why = f"{behind:.4f} behind"
    return {
        "recipe": recipe.name,
        "kind": recipe.kind,
        "expert": recipe.members[0],
        "members": list(recipe.members),
        "later": list(recipe.later),
        "pool": there[0].boot or None if there else None,
        "pools": {one.expert: one.boot or None for one in there},
        "quality": round(float(weighed.wish.quality[at]), 4),
        "cost": round(float(weighed.cost[at]), 9),
        "swap_s": _seconds(max((one.eta_s for one in there), default=math.inf)),
        "wait_s": _seconds(max((one.wait_s for one in there), default=math.inf)),
        "answer_s": _seconds(max((one.answer_s for one in there), default=math.inf)),
        "time_s": _seconds(float(weighed.time[at])),
        "displaced_s": _seconds(float(weighed.displaced[at])),
        "utility": _finite(float(weighed.utility[at]), 4),
        "behind": _finite(behind, 4),
        "why": why,
    }


def _finite(value: float | None, digits: int) -> float | None:
    return round(value, digits) if value is not None and math.isfinite(value) else None


def _seconds(value: float) -> float | None:
    return _finite(value, 3)
