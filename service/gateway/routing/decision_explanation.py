"""Explains a decision as JSON: the posterior, and every candidate with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from service.broker.model_aliases import AliasChoice
from service.broker.quality_cost_bounds import Exclusion
from service.broker.selection import Selection
from service.gateway.routing.route_plan import LeftOut, RoutePlan

_WHY = {
    Exclusion.NO_POOL: "no running pool has it",
    Exclusion.CIRCUIT_OPEN: "it has failed several times in a row; its circuit breaker is open",
    Exclusion.CONTEXT: "the prompt and its answer do not fit into its context",
    Exclusion.MAX_COST: "costs more than max_cost",
    Exclusion.MIN_QUALITY: "its expected quality is less than min_quality",
    Exclusion.NOT_ALLOWED: "it uses an expert that the request's allow or deny excludes",
    Exclusion.TOO_SLOW: "takes longer than deadline_ms, even when it is resident and idle",
    Exclusion.OPEN_TOOL_CALL: "a tool call of this conversation is open at another expert",
    Exclusion.DEADLINE: "would miss the deadline",
}
_MAX_CANDIDATES = 256


def explain(
    plan: RoutePlan,
    selection: Selection,
    alias: AliasChoice | None = None,
    left_out: Sequence[LeftOut] = (),
) -> dict[str, Any]:
    """Explain a selection.

    Args:
        plan: The candidates.
        selection: The selection among them.
        alias: The alias that was asked for; None without one.
        left_out: The recipes that are no candidates.

    Returns:
        A JSON object. Times are in seconds, null where there are none. The best candidate comes
        first, recipes that are none come last, and no more than 256 are listed.
    """
    scores = plan.scores
    posterior = dict(zip(scores.labels, scores.probabilities, strict=True)) if scores else {}
    order = [int(at) for at in selection.order()[:_MAX_CANDIDATES]]
    best = selection.best_position()
    listed = [_candidate(selection, at, best) for at in order]
    listed += [_no_candidate(selection, one) for one in left_out[: _MAX_CANDIDATES - len(listed)]]
    return {
        "alias": None if alias is None else {"name": alias.alias, "target": alias.target},
        "category": plan.category,
        "confidence": round(plan.confidence, 4),
        "novelty": round(scores.novelty, 4) if scores else None,
        "posterior": {label: round(p, 4) for label, p in posterior.items()},
        "stage": plan.stage or None,
        "reason": plan.reason,
        "time_price": round(plan.time_price, 9),
        "cost_price": _significant(selection.request.cost_price),
        "budget_price": _significant(selection.request.budget_price),
        "session": _session(selection, best),
        "chosen": None if best is None else _candidate(selection, best, best)["recipe"],
        "candidates": listed,
    }


def _session(selection: Selection, best: int | None) -> dict[str, Any] | None:
    """What the conversation's session does; None without one, or if nothing can answer."""
    terms = selection.request.session
    if terms is None or best is None:
        return None
    outcome = selection.session_outcome(best)
    assert outcome is not None
    # The tenant may not use what it must not see.
    visible_row = terms.row if outcome.reason != "not_allowed" else None
    return {
        "decision": outcome.decision.value,
        "recipe": None if visible_row is None else selection.catalog.recipes[visible_row].name,
        "handover_cost": 0.0 if terms.locked else terms.handover_cost,
        "why": outcome.reason,
    }


def _candidate(selection: Selection, at: int, best: int | None) -> dict[str, Any]:
    recipe = selection.catalog.recipes[int(selection.request.rows[at])]
    members, later = selection.members(at), selection.later(at)
    options = [selection.expert_in_pool(name) for name in members]
    available = [option for option in options if option is not None]
    barred = Exclusion(int(selection.exclusion[at]))
    behind = None if best is None else float(selection.utility[best] - selection.utility[at])
    if barred:
        why = _WHY[barred]
    elif at == best:
        why = "the greatest utility"
    else:
        why = f"{behind:.4f} behind"
    if recipe.recruitment is not None and members:
        why += f"; recruits {', '.join(members)}"
    return {
        "recipe": recipe.name,
        "kind": recipe.kind,
        "expert": (members or recipe.members)[0],
        "members": list(members),
        "later": list(later),
        "pool": available[0].boot if available else None,
        "pools": {option.expert: option.boot for option in available},
        "quality": round(float(selection.request.quality[at]), 4),
        "cost": round(float(selection.cost[at]), 9),
        "swap_s": _seconds(max((option.eta_s for option in available), default=math.inf)),
        "wait_s": _seconds(max((option.wait_s for option in available), default=math.inf)),
        "answer_s": _seconds(max((option.answer_s for option in available), default=math.inf)),
        "time_s": _seconds(float(selection.time[at])),
        "waiting_s": _seconds(float(selection.waiting[at])),
        "displaced_s": _seconds(float(selection.displaced[at])),
        "utility": _finite(float(selection.utility[at]), 4),
        "behind": _finite(behind, 4),
        "why": why,
    }


def _no_candidate(selection: Selection, left_out: LeftOut) -> dict[str, Any]:
    """A recipe that was not weighed: nothing is known of it but its quality."""
    recipe = selection.catalog.recipes[left_out.row]
    unknown = ("cost", "swap_s", "wait_s", "answer_s", "time_s", "waiting_s", "displaced_s")
    return {
        "recipe": recipe.name,
        "kind": recipe.kind,
        "expert": recipe.members[0],
        "members": list(recipe.members),
        "later": list(recipe.later),
        "pool": None,
        "pools": {},
        "quality": round(left_out.quality, 4),
        **dict.fromkeys(unknown),
        "utility": None,
        "behind": None,
        "why": left_out.why,
    }


def _significant(value: float) -> float:
    """A price to six significant digits: its level depends on the unit of cost."""
    return float(f"{value:.6g}")


def _finite(value: float | None, digits: int) -> float | None:
    return round(value, digits) if value is not None and math.isfinite(value) else None


def _seconds(value: float) -> float | None:
    return _finite(value, 3)
