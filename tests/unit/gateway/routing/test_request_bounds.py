"""The bounds of a request, as the selection sees them and as the gateway holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.broker.cost_model import CostModel
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.token_prices import Price
from service.config import Config
from service.errors import InvalidRequestError
from service.gateway.request.expert_defaults import RequestDefaults
from service.gateway.request.parsing import parse_request
from service.gateway.request.token_limits import within_cost
from service.gateway.routing.candidate_planner import CandidatePlanner, selection_request
from service.gateway.routing.quality_model import QualityModel

PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9},
    "/v1/responses": {"input": "hello"},
    "/v1/completions": {"prompt": "hello"},
}


@settings(deadline=None, max_examples=150)
@given(
    path=st.sampled_from([*PATHS]),
    systems=st.tuples(*[st.one_of(st.none(), st.integers(1, 5000))] * 2),
    prices=st.tuples(*[st.floats(1, 1000)] * 4),
    max_cost=st.floats(1e-3, 8),
    own=st.booleans(),
)
def test_bounds_the_selection_takes_what_the_gateway_can_hold_within_max_cost(
    path: str,
    systems: tuple[int | None, int | None],
    prices: tuple[float, ...],
    max_cost: float,
    own: bool,
) -> None:
    experts = {}
    for name, size in zip("ab", systems, strict=True):
        set_here = {"max_tokens": 7, **({"system": "x" * size} if size else {})}
        experts[name] = {"model": f"m/{name}", "defaults": set_here}
    recipe = {"kind": "cascade", "members": ["a"], "later": ["b"], "quality": {"general": 0.9}}
    config = Config.model_validate(
        {"experts": experts, "recipes": {"r": recipe}, "pools": {"p": {"engine": "simulated"}}}
    )
    body = {**PATHS[path], "coe": {"max_cost": max_cost}}
    if own and "messages" in body:
        body["messages"] = [{"role": "system", "content": "y"}, *PATHS[path]["messages"]]
    request = parse_request(path, orjson.dumps(body), {}, 1000)
    catalog = RecipeCatalog(("a", "b"), [one.recipe() for one in config.recipes.values()])
    cost_model = CostModel(
        ("a", "b"), ("general",), {"a": Price(*prices[:2]), "b": Price(*prices[2:])}
    )
    worth = QualityModel(config, catalog, ("general",))
    plan = CandidatePlanner(config, catalog, worth, None, cost_model.per_token).plan(request)
    defaults = RequestDefaults(config)
    wanted = selection_request(
        cost_model, request, plan, added=defaults.added(request, catalog.experts)
    )
    free = np.zeros(len(plan.rows))  # the floor alone decides, not what is expected
    least = wanted.bounds.least_cost(catalog, plan.rows, free)
    broken = wanted.bounds.exclusions(catalog, plan.rows, plan.quality, free)
    for row, cost, excluded in zip(plan.rows, least, broken, strict=True):
        assume(abs(cost - max_cost) > 1e-9)
        names = catalog.recipes[int(row)].experts
        added = [defaults.system_bytes(request, name) for name in names]
        if excluded:
            with pytest.raises(InvalidRequestError, match="may cost more than"):
                within_cost(request, names, cost_model, (), added)
        else:
            within_cost(request, names, cost_model, (), added)
