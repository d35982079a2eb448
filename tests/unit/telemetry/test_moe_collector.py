"""Routing statistics of a pool: sums, samples and metrics."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from service.engine.engine_interface import RoutingSample
from service.errors import ConflictError
from service.moe.load_statistics import cacheability
from service.moe.routing_counts import RoutingCounts
from service.telemetry import metric_declarations
from service.telemetry.label_values import MAX_SERIES
from service.telemetry.metric_types import Side
from service.telemetry.metrics_registry import MetricsRegistry
from service.telemetry.moe_collector import MoeCollector

EXPERTS = 4


def chosen(expert: str = "a", *, tokens: int = 0, seed: int = 0, layers: int = 2) -> RoutingSample:
    shape = (tuple(range(layers)), EXPERTS, 2)
    if not tokens:
        return RoutingSample(expert, *shape)
    rows = np.random.default_rng(seed).random((layers, tokens, EXPERTS)).argsort(axis=2)[:, :, :2]
    load = np.stack([np.bincount(row.ravel(), minlength=EXPERTS) for row in rows])
    return RoutingSample(expert, *shape, tokens, load, (rows.astype(np.int16),))


@pytest.mark.asyncio
async def test_moe_collector_adds_up_samples_and_computes_on_request() -> None:
    now = 100.0
    routes = MoeCollector(16, lambda: now)
    routes.add_sample(chosen())
    now = 150.0
    one, two = chosen(tokens=50, seed=1), chosen(tokens=40, seed=2)
    routes.add_sample(one)
    now = 200.0
    routes.add_sample(two)
    tally = await routes.tally("a")
    assert (tally.tokens, tally.since_s, tally.cache) == (90, 100.0, 4)
    assert one.load is not None
    assert two.load is not None
    assert tally.load.tolist() == (one.load + two.load).tolist()
    both = cacheability(one.stretches[0], EXPERTS, cache=4) + cacheability(
        two.stretches[0], EXPERTS, cache=4
    )
    assert tally.balance(1).srp == both.srp(1)
    assert tally.balance(0).sch == both.sch(0) == 1.0
    # What travels, and two pools together.
    again = RoutingCounts.from_wire(orjson.loads(orjson.dumps(tally.to_wire())))
    assert again.to_wire() == tally.to_wire()
    assert again.like(tally)
    whole = (tally + again).to_json()
    assert whole["tokens"] == 180
    assert whole["layers"][1]["srp"] == tally.balance(1).srp
    assert whole["layers"][1]["imbalance"] == pytest.approx(tally.balance(1).imbalance)
    assert whole["shape"] == {"layers": 2, "experts": EXPERTS, "top_k": 2}


@pytest.mark.asyncio
async def test_moe_collector_another_model_of_that_name_starts_over() -> None:
    routes = MoeCollector(1, lambda: 0.0)
    routes.add_sample(chosen(tokens=50))
    routes.add_sample(chosen(tokens=60, layers=3))
    assert (await routes.tally("a")).tokens == 60
    routes.forget("a")
    with pytest.raises(ConflictError):
        await routes.tally("a")


@pytest.mark.asyncio
async def test_moe_collector_tally_without_samples_raises_the_reason() -> None:
    with pytest.raises(
        ConflictError, match=r"'a' are not sampled: its pool has no vllm.moe_capture"
    ):
        await MoeCollector(0, lambda: 0.0).tally("a")
    routes = MoeCollector(8, lambda: 0.0)
    with pytest.raises(ConflictError, match="no engine has sent routing samples of 'a' yet"):
        await routes.tally("a")
    routes.add_sample(chosen(layers=0))
    with pytest.raises(ConflictError, match="'a' is not a mixture of experts"):
        await routes.tally("a")
    routes.add_sample(chosen("b"))
    with pytest.raises(
        ConflictError, match="no routing sample of 'b' has arrived yet: one step in 8"
    ):
        await routes.tally("b")


@pytest.mark.asyncio
async def test_moe_collector_metrics_are_per_layer_and_removed_with_the_expert() -> None:
    routes, registry = MoeCollector(1, lambda: 0.0), MetricsRegistry(Side.POOL)
    routes.add_sample(chosen(tokens=50))
    routes.add_sample(chosen("b", tokens=10))
    await routes.compute()
    routes.read(registry)
    tally = await routes.tally("a")
    assert registry.value(metric_declarations.MOE_TOKENS, "a") == 50
    assert registry.value(metric_declarations.MOE_IMBALANCE, "a", "1") == tally.balance(1).imbalance
    assert registry.value(metric_declarations.MOE_SEGMENT_ROUTING, "a", "0") == tally.balance(0).srp
    # Too short to tell: no value, not 0.
    found = [
        s.labels
        for f in registry.families()
        if f.name == metric_declarations.MOE_SEGMENT_ROUTING.name
        for s in f.samples
    ]
    assert {item["expert"] for item in found} == {"a"}
    routes.forget("a")
    routes.read(registry)
    assert registry.value(metric_declarations.MOE_IMBALANCE, "a", "1") == 0
    assert registry.value(metric_declarations.MOE_ROUTED_TOKENS, "a", "1", "0") == 0


def test_moe_collector_metrics_per_routed_expert_stay_within_the_series_limit() -> None:
    routes, registry = MoeCollector(1, lambda: 0.0), MetricsRegistry(Side.POOL)
    small, more = chosen(tokens=50, seed=1), chosen(tokens=40, seed=2)
    layers, experts = 80, 50
    load = np.ones((layers, experts), np.int64)
    routes.add_sample(RoutingSample("large", tuple(range(layers)), experts, 1, experts, load, ()))
    for item in (small, more):
        routes.add_sample(item)
        routes.read(registry)
    assert small.load is not None
    assert more.load is not None
    found = [
        (sample.labels["expert"], sample.value)
        for family in registry.families()
        for sample in family.samples
        if sample.name == metric_declarations.MOE_ROUTED_TOKENS.name
    ]
    # Of the large one nothing, rather than some of it by name and the rest as "other".
    assert found == [("a", value) for value in (small.load + more.load).ravel().tolist()]
    assert load.size > MAX_SERIES
