"""How fast an expert is taken to be: learned from answers, and doubted as time passes."""

from __future__ import annotations

import itertools
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.rpc.expert_latency import (
    PRIOR,
    EngineOccupancy,
    ExpertLatency,
    LatencyEstimator,
    ResponseTimer,
)
from service.rpc.snapshot import Speed


def test_latency_of_an_unmeasured_expert_is_the_prior() -> None:
    assert LatencyEstimator().speed(1e6) == Speed()


def test_latency_slow_measurements_decay_to_the_prior() -> None:
    meter = LatencyEstimator()
    # As on a machine that had too much to do: 64 tokens would miss a deadline of two minutes.
    meter.streamed(10, 6.0, 2.0, 1000.0)
    assert meter.speed(1000.0) == Speed(6.0, 2.0)
    seen = [meter.speed(1000.0 + 60 * minute).chunk_s for minute in range(120)]
    assert seen == sorted(seen, reverse=True)
    assert 64 * seen[5] < 120
    assert round(seen[10], 2) == round((2.0 + PRIOR.chunk_s) / 2, 2)
    assert seen[-1] < 1.05 * PRIOR.chunk_s
    # One answer is enough to know better.
    meter.streamed(10, 6.0, 2.0, 9000.0)
    assert meter.speed(9001.0).chunk_s == 2.0


def test_latency_fast_measurements_do_not_decay() -> None:
    meter = LatencyEstimator()
    meter.streamed(10, 0.05, 0.004, 0.0)
    assert meter.speed(1e6) == meter.speed(0.0) == Speed(0.05, 0.004)


@given(
    st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 500)), min_size=1, max_size=30),
    st.floats(0.001, 1.0),
    st.floats(0.0, 0.001),
    st.floats(0.001, 0.05),
)
def test_latency_of_whole_answers_predicts_times_that_follow_both_lengths(
    lengths: list[tuple[int, int]], first_s: float, per_token_s: float, chunk_s: float
) -> None:
    meter = LatencyEstimator()
    for prompt, answer in lengths:
        meter.whole(prompt, first_s + per_token_s * prompt + chunk_s * answer, answer, 0.0)
    speed = meter.speed(0.0)
    assert min(speed.first_s, speed.per_token_s) >= 0
    assert speed.chunk_s > 0
    # The average answer takes the average time, whichever part of it is put down to what.
    weights = [1.0]
    for _ in lengths[1:]:
        weights = [0.8 * weight for weight in weights] + [0.2]
    for_prompt = sum(w * prompt for w, (prompt, _) in zip(weights, lengths, strict=True))
    for_answer = sum(w * answer for w, (_, answer) in zip(weights, lengths, strict=True))
    expected = first_s + per_token_s * for_prompt + chunk_s * for_answer
    found = speed.first_s + speed.per_token_s * for_prompt + speed.chunk_s * for_answer
    assert found == pytest.approx(expected, rel=0.02, abs=0.01)


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.floats(0.0, 1e6)),
        min_size=1,
        max_size=30,
    )
)
def test_latency_of_whole_answers_of_any_times_is_not_negative(
    answers: list[tuple[int, int, float]],
) -> None:
    meter = LatencyEstimator()
    for prompt, answer, total_s in answers:
        meter.whole(prompt, total_s, answer, 0.0)
    speed = meter.speed(0.0)
    assert min(speed.first_s, speed.per_token_s, speed.chunk_s) >= 0
    # An answer of one token each takes no longer than the longest one did.
    shortest = speed.first_s + speed.per_token_s + speed.chunk_s
    assert shortest <= 1.001 * max(total_s for *_, total_s in answers) + 0.001


def test_latency_of_whole_answers_tells_prompts_from_answers_where_both_vary() -> None:
    meter = LatencyEstimator()
    for i in range(60):
        prompt, answer = 500 + 997 * i % 3000, 10 + 89 * i % 300
        meter.whole(prompt, 0.05 + 0.0005 * prompt + 0.02 * answer, answer, 0.0)
    assert meter.speed(0.0) == Speed(
        pytest.approx(0.05, abs=0.01), pytest.approx(0.02), pytest.approx(0.0005)
    )


def test_latency_of_whole_answers_of_one_length_grows_with_the_prompt() -> None:
    """As agents do: short answers, and a prompt that is longer at each turn."""
    meter = LatencyEstimator()
    for turn in range(12):
        prompt = 600 * (turn + 1)
        meter.whole(prompt, 0.0005 * prompt + 0.02 * 8, 8, 0.0)
    speed = meter.speed(0.0)
    assert speed.per_token_s == pytest.approx(0.0005, rel=0.05)
    assert speed.chunk_s == pytest.approx(0.02, rel=0.05)


@given(
    st.lists(
        st.tuples(st.sampled_from([7, 900]), st.integers(1, 500), st.floats(0.0, 9.0)),
        min_size=1,
        max_size=12,
    )
)
def test_latency_of_whole_answers_in_any_times_is_a_speed(
    answers: list[tuple[int, int, float]],
) -> None:
    """Long answers may come sooner than short ones, and all prompts may have one length."""
    meter = LatencyEstimator()
    for prompt, answer, time_s in answers:
        meter.whole(prompt, time_s, answer, 0.0)
        speed = meter.speed(0.0)
        assert min(speed.first_s, speed.per_token_s, speed.chunk_s) >= 0
    alike = LatencyEstimator()
    for _, answer, _ in answers:
        alike.whole(7, 1 / answer, answer, 0.0)
        assert alike.speed(0.0).chunk_s >= 0


def test_latency_published_values_change_in_steps() -> None:
    meter = LatencyEstimator()
    meter.whole(10, 8.0, 4, 0.0)
    assert meter.speed(59.0) == meter.speed(0.0)
    assert meter.speed(61.0) != meter.speed(0.0)


@pytest.mark.parametrize("order", list(itertools.permutations(["in1", "out1", "in2", "out2"])))
def test_occupancy_a_request_is_alone_only_if_no_other_one_was_there(
    order: tuple[str, ...],
) -> None:
    at = {step: order.index(step) for step in order}
    if at["out1"] < at["in1"] or at["out2"] < at["in2"]:
        return
    engine, stacks, stays = EngineOccupancy(), {"1": ExitStack(), "2": ExitStack()}, []
    for step in order:
        if step.startswith("in"):
            stays.append(stacks[step[-1]].enter_context(engine.stay()))
        else:
            stacks[step[-1]].close()
    apart = at["out1"] < at["in2"] or at["out2"] < at["in1"]
    assert [stay.alone for stay in stays] == [apart, apart]


def test_latency_of_an_idle_engine_is_not_learned_beside_others() -> None:
    latency = ExpertLatency()
    for began_s, first_s, alone in ((0.0, 0.1, True), (10.0, 3.0, False), (20.0, 3.0, False)):
        timer = ResponseTimer(began_s)
        head = {"status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        timer.on_bytes({"type": "http.response.start", **head}, began_s + first_s)
        timer.on_bytes({"type": "http.response.body", "body": b"x"}, began_s + first_s)
        latency.learn(timer, 10, alone=alone)
    assert latency.idle.speed(30.0).first_s == pytest.approx(0.1)
    assert latency.usual.speed(30.0).first_s > 1.0


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("sequences", [1, 3, 8])
def test_latency_of_a_token_is_the_same_for_several_answers_at_once(
    streams: bool, sequences: int
) -> None:
    latency, timer = ExpertLatency(), ResponseTimer(0.0)
    kind = b"text/event-stream" if streams else b"application/json"
    head = {"status": 200, "headers": [(b"content-type", kind)]}
    if streams:
        timer.on_bytes({"type": "http.response.start", **head}, 0.0)
        for i in range(100 * sequences + 2):
            body = {"type": "http.response.body", "body": b"x"}
            timer.on_bytes(body, 2.0 * i / (100 * sequences + 1))
    else:
        usage = f'{{"usage": {{"completion_tokens": {100 * sequences}}}}}'.encode()
        timer.on_bytes({"type": "http.response.start", **head}, 2.0)
        timer.on_bytes({"type": "http.response.body", "body": usage}, 2.0)
    latency.learn(timer, 10, sequences, alone=True)
    for one in (latency.usual, latency.idle):
        assert one.speed(2.0).chunk_s == pytest.approx(0.02, rel=0.05)
