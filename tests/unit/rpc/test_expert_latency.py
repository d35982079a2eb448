"""How fast an expert is taken to be: learned from answers, and doubted as time passes."""

from __future__ import annotations

from service.rpc.expert_latency import PRIOR, LatencyEstimator
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


def test_latency_published_values_change_in_steps() -> None:
    meter = LatencyEstimator()
    meter.whole(10, 8.0, 4, 0.0)
    assert meter.speed(59.0) == meter.speed(0.0)
    assert meter.speed(61.0) != meter.speed(0.0)
