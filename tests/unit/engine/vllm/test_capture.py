"""Watching routers: the worker's counting, the pool's sums, what is told and what is refused."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
from rich.console import Console

from service.cli.moe.show import draw, heat_map, shade
from service.config import Config
from service.engine.base import RoutingSample
from service.engine.vllm.worker.capture import GateCapture
from service.engine.vllm.worker.gates import RoutedLayer
from service.errors import ConfigError, ConflictError
from service.moe.load_statistics import cacheability
from service.moe.routing_counts import RoutingCounts
from service.telemetry import metrics
from service.telemetry.labels import MAX_SERIES
from service.telemetry.metric_types import Side
from service.telemetry.moe_collector import MoeCollector
from service.telemetry.registry import MetricsRegistry

EXPERTS = 4


class Router:
    """As much of vLLM's as is needed."""

    capture_fn: Any = None

    def set_capture_fn(self, capture_fn: Any) -> None:
        self.capture_fn = capture_fn


class Ids:
    """A tensor that is on the CPU already."""

    def __init__(self, rows: Any) -> None:
        self._rows = np.array(rows, np.int32)

    def cpu(self) -> Any:
        return self._rows


class Worker:
    """A worker with two layers that route, and the steps it makes."""

    def __init__(self, **options: int) -> None:
        self.runner = SimpleNamespace(
            input_batch=SimpleNamespace(req_ids=[], num_reqs=0),
            query_start_loc=SimpleNamespace(np=np.zeros(9, np.int32)),
        )
        self.running = "a"
        self.routers = [Router(), Router()]
        settings = {"every": 1, "stretches": 2, "tokens": 40, **options}
        self.capture = GateCapture(
            self.runner, lambda: self.running, chance=random.Random(1), **settings
        )
        self.capture.attach([RoutedLayer(3 * i, EXPERTS, 2, r) for i, r in enumerate(self.routers)])

    def step(self, *chosen: Any, requests: dict[str, int], padding: int = 0) -> None:
        """One forward pass: what each layer chooses for the tokens of these requests."""
        self.runner.input_batch.req_ids = list(requests)
        self.runner.input_batch.num_reqs = len(requests)
        self.runner.query_start_loc.np[1 : len(requests) + 1] = np.cumsum(list(requests.values()))
        for router, rows in zip(self.routers, chosen, strict=True):
            if router.capture_fn is not None:
                router.capture_fn(Ids([*rows, *[[0, 1]] * padding]))


def load_told(told: dict[str, Any], expert: str) -> list[list[int]]:
    return np.frombuffer(told[expert]["load"], np.int64).reshape(-1, EXPERTS).tolist()


def test_a_worker_counts_by_the_expert_that_runs_and_tells_once() -> None:
    worker = Worker()
    assert worker.capture.shape == {"layers": [0, 3], "experts": EXPERTS, "top_k": 2}
    worker.step([[0, 1]], [[2, 3]], requests={"cmpl-1": 1})
    worker.running = "b"
    worker.step([[0, 1], [0, 2]], [[2, 3], [1, 3]], requests={"cmpl-2": 1, "cmpl-3": 1}, padding=3)
    told = worker.capture.snapshot()
    assert load_told(told, "a") == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert load_told(told, "b") == [[2, 1, 1, 0], [0, 1, 1, 2]]
    assert (told["a"]["tokens"], told["b"]["tokens"]) == (1, 2)
    assert worker.capture.snapshot() == {}


def test_one_step_of_so_many_is_looked_at() -> None:
    worker = Worker(every=3)
    for _ in range(3000):
        worker.step([[0, 1]], [[2, 3]], requests={"cmpl-1": 1})
    seen = worker.capture.snapshot()["a"]["tokens"]
    assert 900 < seen < 1100


def test_steps_are_drawn_so_that_no_rhythm_is_missed() -> None:
    # Every fourth step brings a prompt: it must not be always seen, nor never.
    worker = Worker(every=4)
    prompts = 0
    for i in range(2000):
        tokens = 5 if i % 4 == 0 else 1
        worker.step([[0, 1]] * tokens, [[2, 3]] * tokens, requests={"cmpl-1": tokens})
        prompts += tokens == 5
    seen = worker.capture.snapshot()["a"]["tokens"]
    assert 0.2 < seen / (5 * prompts + 3 * prompts) < 0.3


def test_the_canary_is_left_out() -> None:
    worker = Worker()
    worker.step([[3, 1]], [[2, 3]], requests={"cmpl-canary-77-0": 1})
    worker.step([[0, 1]], [[2, 3]], requests={"cmpl-1": 1})
    assert load_told(worker.capture.snapshot(), "a") == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_few_stretches_are_kept_of_prompts_long_enough() -> None:
    worker = Worker()
    rows = [[i % 3, i % 3 + 1] for i in range(10 + 33 + 50 + 60)]
    others = [[0, i % 3 + 1] for i in range(len(rows))]
    worker.step(rows, others, requests={"short": 10, "one": 33, "long": 50, "over": 60})
    (told,) = worker.capture.snapshot().values()
    kept = [np.frombuffer(data, np.int16).reshape(shape) for *shape, data in told["stretches"]]
    assert [one.shape for one in kept] == [(2, 33, 2), (2, 40, 2)]
    assert kept[0][0].tolist() == rows[10:43]
    assert kept[1][1].tolist() == others[43:83]


def test_layers_that_choose_fewer_leave_places_empty() -> None:
    worker = Worker(stretches=1)
    worker.step([[1]] * 32, [[2, 3]] * 32, requests={"one": 32})
    (told,) = worker.capture.snapshot().values()
    *shape, data = told["stretches"][0]
    assert np.frombuffer(data, np.int16).reshape(shape)[:, 0].tolist() == [[1, -1], [2, 3]]


def test_an_expert_that_is_named_again_counts_once() -> None:
    worker = Worker(stretches=1)
    # As a rule that gives sure tokens fewer experts fills the places that are left.
    worker.step([[2, 2]] * 32, [[3, 1]] * 32, requests={"one": 32})
    (told,) = worker.capture.snapshot().values()
    assert load_told({"a": told}, "a") == [[0, 0, 32, 0], [0, 32, 0, 32]]
    *shape, data = told["stretches"][0]
    assert np.frombuffer(data, np.int16).reshape(shape)[:, 0].tolist() == [[2, -1], [1, 3]]


def test_a_model_that_goes_is_no_longer_looked_at() -> None:
    worker = Worker()
    old = worker.routers
    worker.routers = [Router(), Router()]
    worker.capture.attach([RoutedLayer(i, EXPERTS, 2, r) for i, r in enumerate(worker.routers)])
    assert [router.capture_fn for router in old] == [None, None]
    worker.step([[0, 1]], [[2, 3]], requests={"cmpl-1": 1})
    assert worker.capture.snapshot()["a"]["tokens"] == 1
    worker.capture.detach()
    worker.step([[0, 1]], [[2, 3]], requests={"cmpl-1": 1})
    assert worker.capture.snapshot() == {}


def chosen(expert: str = "a", *, tokens: int = 0, seed: int = 0, layers: int = 2) -> RoutingSample:
    shape = (tuple(range(layers)), EXPERTS, 2)
    if not tokens:
        return RoutingSample(expert, *shape)
    rows = np.random.default_rng(seed).random((layers, tokens, EXPERTS)).argsort(axis=2)[:, :, :2]
    load = np.stack([np.bincount(row.ravel(), minlength=EXPERTS) for row in rows])
    return RoutingSample(expert, *shape, tokens, load, (rows.astype(np.int16),))


@pytest.mark.asyncio
async def test_a_pool_adds_up_and_reckons_when_asked() -> None:
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
async def test_another_model_of_that_name_begins_anew() -> None:
    routes = MoeCollector(1, lambda: 0.0)
    routes.add_sample(chosen(tokens=50))
    routes.add_sample(chosen(tokens=60, layers=3))
    assert (await routes.tally("a")).tokens == 60
    routes.forget("a")
    with pytest.raises(ConflictError):
        await routes.tally("a")


@pytest.mark.asyncio
async def test_why_nothing_is_told() -> None:
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
async def test_metrics_are_by_layer_and_go_with_their_expert() -> None:
    routes, meter = MoeCollector(1, lambda: 0.0), MetricsRegistry(Side.POOL)
    routes.add_sample(chosen(tokens=50))
    routes.add_sample(chosen("b", tokens=10))
    await routes.compute()
    routes.read(meter)
    tally = await routes.tally("a")
    assert meter.value(metrics.MOE_TOKENS, "a") == 50
    assert meter.value(metrics.MOE_IMBALANCE, "a", "1") == tally.balance(1).imbalance
    assert meter.value(metrics.MOE_SEGMENT_ROUTING, "a", "0") == tally.balance(0).srp
    # Too short to tell: no value, not 0.
    told = [
        s.labels
        for f in meter.families()
        if f.name == metrics.MOE_SEGMENT_ROUTING.name
        for s in f.samples
    ]
    assert {one["expert"] for one in told} == {"a"}
    routes.forget("a")
    routes.read(meter)
    assert meter.value(metrics.MOE_IMBALANCE, "a", "1") == 0
    assert meter.value(metrics.MOE_ROUTED_TOKENS, "a", "1", "0") == 0


def test_tokens_of_each_routed_expert_are_told_while_there_is_room() -> None:
    routes, meter = MoeCollector(1, lambda: 0.0), MetricsRegistry(Side.POOL)
    small, more = chosen(tokens=50, seed=1), chosen(tokens=40, seed=2)
    layers, experts = 80, 50
    load = np.ones((layers, experts), np.int64)
    routes.add_sample(RoutingSample("large", tuple(range(layers)), experts, 1, experts, load, ()))
    for one in (small, more):
        routes.add_sample(one)
        routes.read(meter)
    assert small.load is not None
    assert more.load is not None
    told = [
        (sample.labels["expert"], sample.value)
        for family in meter.families()
        for sample in family.samples
        if sample.name == metrics.MOE_ROUTED_TOKENS.name
    ]
    # Of the large one nothing, rather than some of it by name and the rest as "other".
    assert told == [("a", value) for value in (small.load + more.load).ravel().tolist()]
    assert load.size > MAX_SERIES


def told_of(layers: int = 2, experts: int = EXPERTS) -> dict[str, Any]:
    rows = [
        {
            "layer": i,
            "load": [100 if e == i else 1 for e in range(experts)],
            "imbalance": 2.0,
            "entropy": 0.5,
            "entropy_bits": 1.0,
            "srp": None,
            "sch": 1.0,
        }
        for i in range(layers)
    ]
    shape = {"layers": layers, "experts": experts, "top_k": 2}
    return {"expert": "[a]", "shape": shape, "tokens": 9, "every": 1, "layers": rows}


@pytest.mark.parametrize("experts", [4, 40, 300])
def test_the_heat_map_fits_and_needs_no_colours(experts: int) -> None:
    plain = Console(width=90, no_color=True, force_terminal=True)
    with plain.capture() as capture:
        plain.print(heat_map(told_of(experts=experts), 90))
    text = re.sub(r"\x1b\[[0-9;]*m", "", capture.get())
    assert "[a]: 2 layers" in text
    first, second = (line for line in text.splitlines() if "2.00" in line)
    assert len(first) <= 90
    assert first.index("█") < second.index("█") or experts == 300
    assert "–" in first
    assert ("share a mark" in text) == (experts == 300)
    colours = Console(width=90, color_system="256", force_terminal=True)
    with colours.capture() as capture:
        colours.print(heat_map(told_of(), 90))
    assert "38;5;202" in capture.get() or "38;5;196" in capture.get()


def test_shades_grow_with_load() -> None:
    assert shade(0, 10) == shade(5, 0) == (" ", 233)
    assert [shade(load, 10)[0] for load in (1, 4, 10, 20, 99)] == ["·", "░", "▒", "▓", "█"]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    draw(told_of(), tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_capture_needs_layers_that_are_called_one_by_one() -> None:
    experts = {"experts": {"base": {"model": "m"}}}
    with pytest.raises(ValueError, match="moe_capture needs enforce_eager: true"):
        Config.model_validate({**experts, "pools": {"cpu": {"vllm": {"moe_capture": {}}}}})
    vllm = {"moe_capture": {}, "enforce_eager": True}
    config = Config.model_validate({**experts, "pools": {"cpu": {"vllm": vllm}}})
    capture = config.pools["cpu"].vllm.moe_capture
    assert capture is not None
    assert (capture.every, capture.stretches, capture.tokens) == (16, 4, 64)
    # On a GPU captured graphs write it down.
    Config.model_validate({**experts, "pools": {"gpu": {"gpus": 1, "vllm": {"moe_capture": {}}}}})


def test_capture_needs_a_mixture_of_experts() -> None:
    from service.models import MoeInfo
    from service.pool.memory_plan import plan_pool
    from tests.unit.pool.test_memory_plan import model

    vllm = {
        "dtype": "float32",
        "kv_cache_bytes": "128MiB",
        "enforce_eager": True,
        "moe_capture": {"every": 4},
    }
    config = Config.model_validate(
        {"experts": {"base": {"model": "m"}}, "pools": {"cpu": {"vllm": vllm}}}
    )
    with pytest.raises(ConfigError, match="none of its experts is a mixture of experts"):
        plan_pool(config, "cpu", {"base": model()}.__getitem__)
    assert plan_pool(config, "cpu", {"base": model(moe=MoeInfo(4, 2, 64))}.__getitem__).engines
