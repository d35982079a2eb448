"""A locked session never switches while its expert can answer, whatever the others offer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.broker.pool_state import PoolStateTable, PoolView
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.selection import SelectionRequest, select
from service.broker.session_terms import SessionDecision, SessionTerms
from service.types import MAX_LATER
from tests.property.test_selection import EXPERTS, TOGETHER, pools

BOOK = RecipeCatalog(EXPERTS, TOGETHER)


@given(
    pools(),
    st.lists(st.floats(0, 1), min_size=5, max_size=5),
    st.integers(0, 2),
    st.sampled_from([np.inf, 5.0]),
    st.floats(0, 1),
    st.sampled_from([0, 500]),
    st.sets(st.tuples(st.sampled_from(EXPERTS), st.sampled_from("012"))),
)
def test_select_session_terms_hold_where_the_expert_can_answer(
    views: list[PoolView],
    quality: list[float],
    row: int,
    deadline_s: float,
    cost: float,
    context_tokens: int,
    excluded: set[tuple[str, str]],
) -> None:
    matrix = PoolStateTable(BOOK.index).to_matrix(views)
    wish = SelectionRequest(
        rows=BOOK.everything,
        quality=np.array(quality),
        escalation_prob=np.full((5, MAX_LATER), 0.5) * (BOOK.later < len(EXPERTS)),
        tokens=np.full(3, 20.0),
        cost=np.zeros(3),
        prompt_tokens=30,
        deadline_s=deadline_s,
        context_tokens=context_tokens,
        excluded=excluded,
    )
    free = select(BOOK, matrix, wish)
    alone = select(
        BOOK,
        matrix,
        replace(
            wish,
            rows=np.array([row]),
            quality=wish.quality[[row]],
            escalation_prob=wish.escalation_prob[[row]],
        ),
    )
    locked = select(BOOK, matrix, replace(wish, session=SessionTerms(row, True)))
    sticky = select(BOOK, matrix, replace(wish, session=SessionTerms(row, False, cost)))
    at = locked.best_position()
    if free.best_position() is None:
        assert at is None
        return
    assert at is not None
    outcome = locked.session_outcome(at)
    assert outcome is not None
    if outcome.decision is SessionDecision.RELEASED:
        # Then the choice is the free one, and the expert was none of its options.
        assert at == free.best_position()
        assert free.exclusion[row]
    else:
        assert at == row
        assert outcome.decision is SessionDecision.LOCKED
        assert alone.best_position() == 0
    # A session that may hand over never gains less than the cost by it.
    to = sticky.best_position()
    assert to is not None
    if not sticky.exclusion[row] and to != row:
        assert free.utility[to] - free.utility[row] >= cost - 1e-9
