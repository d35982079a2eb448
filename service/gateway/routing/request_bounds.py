"""A request's own bounds: experts, quality, cost and time. Errors state the nearest ones."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.broker.cost_model import CostModel
from service.broker.pool_state import Floats
from service.broker.quality_cost_bounds import Exclusion, RequestBounds, nearest_bounds, worst_costs
from service.broker.recipe_catalog import Ints, RecipeCatalog
from service.broker.recipe_steps import StepFigures
from service.errors import InfeasibleBoundsError, InvalidRequestError
from service.gateway.request.parsing import InferenceRequest
from service.gateway.routing.route_plan import RoutePlan
from service.http.prompt_endpoints import TABLE


def allowed_experts(request: InferenceRequest, experts: Sequence[str]) -> NDArray[np.bool_] | None:
    """The experts that the request's `allow` and `deny` leave, (experts,); None allows all.

    Raises:
        InvalidRequestError: A name is none of an expert that the tenant may ask.
    """
    if request.allow is None and not request.deny:
        return None
    known = [name for name in experts if request.tenant.may_ask(name)]
    for param, names in (("allow", request.allow or ()), ("deny", request.deny)):
        for name in sorted(names):
            if name not in known:
                close = difflib.get_close_matches(name[:128], known, n=1)
                hint = f" did you mean {close[0]!r}?" if close else ""
                raise InvalidRequestError(
                    f"coe.{param}: there is no expert {name[:128]!r};{hint} "
                    f"experts: {', '.join(known)}",
                    param=f"coe.{param}",
                )
    return np.array(
        [
            (request.allow is None or name in request.allow) and name not in request.deny
            for name in experts
        ]
    )


def bounds_of(
    request: InferenceRequest, plan: RoutePlan, cost_model: CostModel, most_added: Floats | int = 0
) -> RequestBounds:
    """The bounds of a request, as the selection sees them.

    Args:
        request: The request.
        plan: Its candidates.
        cost_model: Knows the prices.
        most_added: (experts,), the most tokens that the defaults of each expert add to the prompt.
    """
    deadline_s = request.deadline_ms / 1000 if request.own_deadline else math.inf
    if request.max_cost is None:
        return RequestBounds(plan.allowed, request.min_quality, deadline_s=deadline_s)
    answers = request.answers if TABLE[request.endpoint].generates else 0
    floor = cost_model.floor(request.most_prompt_tokens + most_added, answers)
    return RequestBounds(plan.allowed, request.min_quality, request.max_cost, floor, deadline_s)


def within_bounds(
    catalog: RecipeCatalog,
    bounds: RequestBounds,
    plan: RoutePlan,
    cost: Floats,
    idle_s: Floats | None = None,
    steps: StepFigures | None = None,
) -> RoutePlan:
    """Keep the candidates that keep a request's bounds.

    Args:
        catalog: The recipes.
        bounds: The bounds.
        plan: The candidates.
        cost: (experts,), expected cost of one call.
        idle_s: (rows,), the candidates' `idle_times`; None where the client set no deadline.
        steps: What experts write and read in the steps of recipes.

    Raises:
        InfeasibleBoundsError: No candidate keeps them.
    """
    worst = worst_costs(catalog, plan.rows, cost, steps, plan.recruitable)
    broken = bounds.exclusions(catalog, plan.rows, plan.quality, worst, idle_s)
    keeps = broken == 0
    if not keeps.any():
        raise infeasible_error(catalog, bounds, plan.rows, plan.quality, worst, idle_s)
    at = None if plan.session is None else plan.session.position(plan.rows)
    kept = plan.only(keeps, None if at is None else Exclusion(int(broken[at])).name.lower())
    first = catalog.recipes[int(kept.rows[kept.quality.argmax()])].experts[0]
    return kept if first == kept.first else replace(kept, first=first)


def infeasible_error(
    catalog: RecipeCatalog,
    bounds: RequestBounds,
    rows: Ints,
    quality: Floats,
    worst: Floats,
    idle_s: Floats | None,
) -> InfeasibleBoundsError:
    """The error for bounds that no candidate keeps; see `nearest_bounds` for the arguments."""
    found = nearest_bounds(bounds, catalog, rows, quality, worst, idle_s)
    asked: dict[str, float] = {}
    if bounds.min_quality > 0:
        asked["min_quality"] = bounds.min_quality
    if math.isfinite(bounds.max_cost):
        asked["max_cost"] = bounds.max_cost
    if math.isfinite(bounds.deadline_s):
        asked["deadline_ms"] = round(1000 * bounds.deadline_s)
    asked_bounds = " and ".join(_listed(asked))
    alone = _named(found.min_quality, found.max_cost, found.deadline_s)
    nearest: dict[str, Any] = {name: alone[name] for name in alone if name in asked}
    options = _listed(nearest)
    if found.together is not None:
        all_of_them = _named(*found.together)
        together = {name: value for name, value in all_of_them.items() if name in asked}
        nearest["together"] = together
        options.append(" with ".join(_listed(together)))
    if not options:
        return InfeasibleBoundsError(
            "coe.allow and coe.deny leave no candidate that can answer this request",
            param="coe.allow",
            nearest={},
        )
    among = "" if bounds.allowed is None else " among the experts that allow and deny leave"
    return InfeasibleBoundsError(
        f"no candidate{among} keeps {asked_bounds}; nearest possible: {', or '.join(options)}",
        param=f"coe.{next(iter(asked))}",
        nearest=nearest,
    )


def _listed(bounds: Mapping[str, float]) -> list[str]:
    return [
        f"{name} {value}" if isinstance(value, int) else f"{name} {value:g}"
        for name, value in bounds.items()
    ]


def _named(
    min_quality: float | None, max_cost: float | None, deadline_s: float | None
) -> dict[str, float]:
    """Name bounds as requests do, without those that are None."""
    deadline_ms = None if deadline_s is None else max(1, math.ceil(1000 * deadline_s))
    values = {"min_quality": min_quality, "max_cost": max_cost, "deadline_ms": deadline_ms}
    return {name: value for name, value in values.items() if value is not None}
