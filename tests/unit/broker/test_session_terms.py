"""The terms of a session: the lock, the hand-over cost, and the release."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from service.broker.pool_state import PoolStateTable, PoolView, idle_view
from service.broker.quality_cost_bounds import Exclusion, RequestBounds
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.selection import PrefixCacheHint, Selection, SelectionRequest, select
from service.broker.session_terms import SessionDecision, SessionTerms
from service.rpc.snapshot import Speed
from service.types import MAX_LATER, Recipe

EXPERTS = ("a", "b", "c")
BOOK = RecipeCatalog(EXPERTS, [Recipe("cascade", ("a",), ("b",), 0.5)])
VIEW = idle_view(EXPERTS)


def chosen(
    terms: SessionTerms | None,
    quality: tuple[float, ...] = (0.5, 0.8, 0.6, 0.55),
    views: tuple[PoolView, ...] = (VIEW,),
    **more: object,
) -> tuple[str, Selection]:
    wish = SelectionRequest(
        rows=BOOK.everything,
        quality=np.array(quality),
        escalation_prob=np.zeros((4, MAX_LATER)),
        tokens=np.full(3, 20.0),
        cost=np.zeros(3),
        prompt_tokens=1000,
        time_price=1e-6,
        session=terms,
    )
    matrix = PoolStateTable(BOOK.index).to_matrix(views)
    found = select(BOOK, matrix, replace(wish, **more))  # type: ignore[arg-type]
    at = found.best_position()
    assert at is not None
    return BOOK.recipes[at].name, found


def decision(selection: Selection) -> tuple[SessionDecision, str | None]:
    at = selection.best_position()
    assert at is not None
    outcome = selection.session_outcome(at)
    assert outcome is not None
    return outcome.decision, outcome.reason


def test_select_without_a_session_has_no_outcome() -> None:
    name, found = chosen(None)
    assert name == "b"
    assert found.session_outcome(1) is None
    assert not found.locked


def test_select_open_call_leaves_its_expert_and_no_unmet_demand() -> None:
    name, found = chosen(SessionTerms(0, True, 0.1))
    assert name == "a"
    assert decision(found) == (SessionDecision.LOCKED, None)
    assert found.exclusion[1:].tolist() == [Exclusion.OPEN_TOOL_CALL] * 3
    assert found.unmet_experts(0) == ()


@pytest.mark.parametrize(
    ("cost", "name", "expected"),
    [(0.29, "b", SessionDecision.SWITCHED), (0.31, "a", SessionDecision.KEPT)],
)
def test_select_hands_over_for_a_gain_above_the_cost(
    cost: float, name: str, expected: SessionDecision
) -> None:
    got, found = chosen(SessionTerms(0, False, cost))
    assert got == name
    assert decision(found) == (expected, None)


def test_select_recipe_may_be_what_a_session_holds_on_to() -> None:
    name, found = chosen(SessionTerms(3, False, 0.3))
    assert name == BOOK.recipes[3].name
    assert decision(found) == (SessionDecision.KEPT, None)


def test_select_lost_prefix_counts_beside_the_hand_over_cost() -> None:
    slow = replace(VIEW.snapshot, speeds={name: Speed(0.1, 0.01, 0.001) for name in EXPERTS})
    views = (replace(VIEW, snapshot=slow),)
    quality = (0.5, 0.58, 0.0, 0.0)
    terms = SessionTerms(0, False, 0.05)
    # A second of prefill at 0.05 a second is worth 0.05.
    assert chosen(terms, quality, views, time_price=0.05)[0] == "b"
    hint = PrefixCacheHint("a", VIEW.boot, 1000)
    assert chosen(terms, quality, views, time_price=0.05, prefix_cache=hint)[0] == "a"


ALLOWED = np.array([False, True, True])


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"excluded": [("a", VIEW.boot)]}, "circuit_open"),
        ({"bounds": RequestBounds(ALLOWED)}, "not_allowed"),
        ({"bounds": RequestBounds(min_quality=0.55)}, "min_quality"),
        ({"views": (idle_view(("b", "c")),)}, "no_pool"),
    ],
)
def test_select_expert_that_cannot_answer_is_released(
    locked: bool, more: dict[str, object], reason: str
) -> None:
    name, found = chosen(SessionTerms(0, locked, 1.0), **more)  # type: ignore[arg-type]
    assert name == "b"
    assert decision(found) == (SessionDecision.RELEASED, reason)


@pytest.mark.parametrize("locked", [True, False])
def test_select_absent_recipe_is_released_with_its_reason(locked: bool) -> None:
    name, found = chosen(SessionTerms(None, locked, 1.0, "gone"))
    assert name == "b"
    assert decision(found) == (SessionDecision.RELEASED, "gone")


def test_select_locked_expert_in_a_silent_pool_is_not_released() -> None:
    silent = replace(idle_view(("a",)), boot="silent", age_s=3.0)
    views = (idle_view(("b", "c")), silent)
    assert chosen(SessionTerms(0, True), views=views)[0] == "a"
    # Without an open call a silent pool is the last resort.
    assert chosen(SessionTerms(0, False, 1.0), views=views)[0] == "b"
