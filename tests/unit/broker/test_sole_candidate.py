"""One candidate as plain numbers: whatever it returns is what the arrays give."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.pool_state import PoolStateTable, PoolView
from service.broker.quality_cost_bounds import RequestBounds
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.selection import PrefixCacheHint, SelectionRequest, select
from service.broker.session_terms import SessionTerms
from service.broker.sole_candidate import select_sole
from service.rpc.snapshot import ExpertState, Queue, Snapshot, Speed
from service.types import MAX_LATER, Recipe, Residency

EXPERTS = ("a", "b", "c")
CATALOG = RecipeCatalog(EXPERTS, [Recipe("vote", EXPERTS)])
times = st.sampled_from((0.0, 0.001, 0.02, 0.5, 3.0))
counts = st.integers(0, 5)


@st.composite
def snapshots(draw: st.DrawFn, boot: str) -> Snapshot:
    """A pool with some of the experts, in any state."""
    names = draw(st.lists(st.sampled_from(EXPERTS), unique=True))
    return Snapshot(
        boot=boot,
        kind="k",
        draining=draw(st.sampled_from((False, False, False, True))),
        experts={
            name: ExpertState(
                draw(st.sampled_from(Residency)),
                eta_s=draw(times),
                swap_s=draw(times),
                slot=draw(st.integers(0, 1)),
                max_model_len=draw(st.sampled_from((0, 50, 400))),
            )
            for name in names
        },
        queues={
            name: Queue(waiting=draw(counts), running=draw(counts), waiting_tokens=draw(counts))
            for name in names
        },
        capacity={name: draw(st.integers(1, 3)) for name in names},
        speeds={
            name: Speed(draw(times), draw(times), draw(times) / 100)
            for name in names
            if draw(st.booleans())
        },
    )


@st.composite
def views(draw: st.DrawFn) -> list[PoolView]:
    """Up to four pools, one of which may be silent."""
    return [
        PoolView(
            boot,
            draw(snapshots(boot)),
            draw(st.sampled_from((0.1, 0.1, 0.1, 5.0))),
            draw(st.dictionaries(st.sampled_from(EXPERTS), st.integers(1, 3))),
        )
        for boot in draw(st.lists(st.sampled_from(("p", "q", "r", "s")), unique=True))
    ]


def asked(row: int = 0) -> SelectionRequest:
    return SelectionRequest(
        rows=np.array([row]),
        quality=np.array([0.7]),
        escalation_prob=np.zeros((1, MAX_LATER)),
        tokens=np.array([10.0, 60.0, 200.0]),
        cost=np.array([1.0, 2.0, 3.0]),
        prompt_tokens=100,
        cost_price=0.05,
        budget_price=0.01,
    )


@st.composite
def requests(draw: st.DrawFn) -> SelectionRequest:
    """A request for one expert."""
    hint = PrefixCacheHint(
        draw(st.sampled_from(EXPERTS)), draw(st.sampled_from(("p", "q"))), draw(counts) * 40
    )
    return replace(
        asked(draw(st.integers(0, 2))),
        prompt_tokens=draw(counts) * 30,
        context_tokens=draw(st.sampled_from((0, 60, 500))),
        streams=draw(st.booleans()),
        deadline_s=draw(st.sampled_from((math.inf, 60.0, 1.0, 0.01))),
        prefix_cache=draw(st.sampled_from((None, hint))),
        excluded=frozenset(
            draw(st.lists(st.tuples(st.sampled_from(EXPERTS), st.sampled_from("pqr")), max_size=2))
        ),
    )


@given(views(), requests())
def test_select_sole_whatever_it_returns_is_what_select_does(
    pools: list[PoolView], request: SelectionRequest
) -> None:
    table = PoolStateTable(CATALOG.index)
    found = select_sole(CATALOG, table, pools, request)
    whole = select(CATALOG, table.to_matrix(pools), request)
    expert = EXPERTS[int(request.rows[0])]
    if found is None:
        # No fresh pool is there in time, or none has the context.
        fresh = [view for view in pools if view.age_s <= 1]
        alone = select(CATALOG, table.to_matrix(fresh), request)
        late = math.isfinite(request.deadline_s)
        assert alone.best_position() is None or late or request.context_tokens
        return
    for name in ("time", "waiting", "displaced", "cost", "utility", "exclusion", "net_quality"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-9), name
    ours, theirs = found.expert_in_pool(expert), whole.expert_in_pool(expert)
    assert ours is not None
    assert theirs is not None
    for name in ("eta_s", "wait_s", "answer_s", "token_s"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-9), name
    assert (ours.expert, ours.boot) == (theirs.expert, theirs.boot)
    assert found.best_position() == whole.best_position() == 0
    assert found.unmet_experts(0) == whole.unmet_experts(0) == ()
    assert found.members(0) == whole.members(0)
    assert found.ideal == pytest.approx(whole.ideal, rel=1e-9)
    assert all(found.expert_in_pool(other) is None for other in EXPERTS if other != expert)


READY = Snapshot("p", "k", experts={n: ExpertState(Residency.DEVICE) for n in EXPERTS})


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(asked(3), id="a recipe of several"),
        pytest.param(
            replace(
                asked(),
                rows=np.array([0, 1]),
                quality=np.ones(2),
                escalation_prob=np.zeros((2, MAX_LATER)),
            ),
            id="two candidates",
        ),
        *(
            pytest.param(replace(asked(), bounds=bounds), id=str(bounds))
            for bounds in (
                RequestBounds(allowed=np.ones(3, bool)),
                RequestBounds(min_quality=0.1),
                RequestBounds(max_cost=9.0),
                RequestBounds(deadline_s=9.0),
            )
        ),
        pytest.param(replace(asked(), session=SessionTerms(None, locked=False)), id="a session"),
    ],
)
def test_select_sole_leaves_what_only_arrays_can_tell(request_: SelectionRequest) -> None:
    table = PoolStateTable(CATALOG.index)
    pools = [PoolView("p", READY, 0.1, {})]
    assert select_sole(CATALOG, table, pools, asked()) is not None
    assert select_sole(CATALOG, table, pools, request_) is None


def test_select_sole_leaves_many_pools_to_arrays() -> None:
    table = PoolStateTable(CATALOG.index)
    pools = [PoolView(f"p{i}", replace(READY, boot=f"p{i}"), 0.1, {}) for i in range(9)]
    assert select_sole(CATALOG, table, pools[:8], asked()) is not None
    assert select_sole(CATALOG, table, pools, asked()) is None
