"""A pool's row that follows its snapshots equals one that is computed from the last snapshot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from service.broker.pool_state import PoolStateTable, PoolView
from service.broker.rendezvous_hash import rendezvous_hash
from service.rpc.expert_latency import PRIOR
from service.rpc.snapshot import ExpertState, Queue, Snapshot, Speed, decode, encode
from service.types import Residency

INDEX = {name: i for i, name in enumerate("abcde")}
# `x` is in no catalog, as an expert that a reload removed.
names = st.sampled_from("abcdx")
seconds = st.sampled_from([0.0, 0.5, 1.0, 7.0])
small = st.integers(0, 2)
states = st.builds(
    ExpertState,
    st.sampled_from(Residency),
    eta_s=seconds,
    swap_s=seconds,
    slot=small,
    max_model_len=small,
)
speeds = st.builds(Speed, seconds, seconds, seconds)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """A pool with some experts, each of them in a slot, with or without queue and speed.

    A table may have entries of experts that the pool does not have.
    """
    experts = draw(st.dictionaries(names, states))
    held = names if draw(st.booleans()) else st.nothing()
    return Snapshot(
        "boot",
        "cpu",
        draining=draw(st.booleans()),
        experts=experts,
        queues=draw(st.dictionaries(held, st.builds(Queue, small, small, small, small))),
        capacity=draw(st.dictionaries(held, small)),
        speeds=draw(st.dictionaries(held, speeds)),
        idle_speeds=draw(st.dictionaries(held, speeds)),
        shares=draw(st.dictionaries(held, held)),
    )


@st.composite
def histories(draw: st.DrawFn) -> list[Snapshot]:
    """Snapshots of a pool that keeps its experts and slots, so that rows change in place."""
    found = [draw(snapshots())]
    for _ in range(draw(st.integers(1, 6))):
        last, now = found[-1], draw(snapshots())
        experts = {
            name: structs.replace(now.experts.get(name, state), slot=state.slot)
            for name, state in last.experts.items()
        }
        found.append(replace(now, experts=experts, capacity=last.capacity, shares=last.shares))
    return found


@given(st.one_of(st.lists(snapshots(), min_size=1, max_size=8), histories()), st.booleans())
def test_row_that_follows_snapshots_equals_the_last_snapshots_row(
    given_states: list[Snapshot], over_the_wire: bool
) -> None:
    table = PoolStateTable(INDEX)
    received: Snapshot | None = None
    sent: Snapshot | None = None
    for state in given_states:
        delta = None
        if over_the_wire:
            received, delta = decode(encode(state, sent), received)
        else:
            received = state
        sent = state
        table.update("boot", received, delta)
        matrix = table.to_matrix([PoolView("boot", received, 0.0, {})])
        expected = expected_figures(state)
        usable = {name for name, i in INDEX.items() if matrix.usable[0, i]}
        assert usable == expected.keys()
        for name, figures in expected.items():
            found = {figure: float(getattr(matrix, figure)[0, INDEX[name]]) for figure in figures}
            assert found == figures, name


def expected_figures(snapshot: Snapshot) -> dict[str, dict[str, float]]:
    """The figures of each usable expert by their definitions, one expert after the other."""
    measured = [snapshot.speeds[name] for name in snapshot.experts if name in snapshot.speeds]
    guess = PRIOR
    if measured:
        guess = Speed(
            *(
                float(np.mean([getattr(one, field) for one in measured]))
                for field in ("first_s", "chunk_s", "per_token_s")
            )
        )

    def queue(name: str) -> Queue:
        return snapshot.queues.get(name, Queue())

    def requests(name: str) -> int:
        return queue(name).waiting + queue(name).running

    found = {}
    for name, state in snapshot.experts.items():
        if name not in INDEX or snapshot.draining or state.state is Residency.FAILED:
            continue
        slot = [other for other, it in snapshot.experts.items() if it.slot == state.slot]
        own = [
            other
            for other in snapshot.experts
            if snapshot.weights_of(other) == snapshot.weights_of(name)
        ]
        waiting = sum(map(requests, own))
        others = sum(map(requests, slot)) - waiting
        speed = snapshot.speeds.get(name, guess)
        idle = snapshot.idle_speeds.get(name, Speed())
        away = state.state is not Residency.DEVICE
        found[name] = {
            "eta": state.eta_s,
            "first": speed.first_s,
            "per_token": speed.per_token_s,
            "chunk": speed.chunk_s,
            "capacity": max(1, snapshot.capacity.get(name, 1)),
            "ahead": sum(queue(other).ahead for other in slot),
            "displaced": 2 * state.swap_s * others / (1 + waiting) if away else 0.0,
            "context": state.max_model_len,
            "prompts": sum(queue(other).waiting_tokens for other in slot),
            "idle_first": idle.first_s,
            "idle_per_token": idle.per_token_s,
            "idle_chunk": idle.chunk_s,
            "far": 0.25 * rendezvous_hash(name, snapshot.boot) * state.eta_s,
        }
    return found
