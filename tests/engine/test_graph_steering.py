"""Steering rules in compiled gates, as on a GPU, in vLLM on a CPU.

vLLM traces the model once and never runs its Python again, so the gates must be prepared for
steering before that. All tests share one engine, which holds its weights as on a GPU.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from service.config import MoeCapture
from service.engine.shared_weight_cache import EngineShare, SharedWeightCache
from service.engine.vllm.routing_stats_poller import RoutingStatsPoller
from service.errors import ExpertFailedError
from tests.support.engine.real_engines import ENVIRONMENT, ON_ONE_ENGINE, Swapping, greedy
from tests.support.engine.routing_sample_recorder import Watch
from tests.support.engine.steered_tiny_mixtral import PROMPT, RULES, TOKENS, Steering
from tests.support.engine.tiny_mixtral import EXPERTS, LAYERS

pytestmark = ON_ONE_ENGINE
_CAPTURE = MoeCapture(every=1, stretches=2, tokens=40)
# vLLM's own tests' way to have a model traced on CPU without waiting for a compiler.
_TRACED = "VLLM_CPU_CI_ENV"


class Compiled(Swapping):
    """Started as on a GPU, but for the worker that its worker is made of."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._uses_graph_steering = self._records_choices = True
        self.cache = SharedWeightCache(None)
        self._share = EngineShare(self.cache)
        self.watch = Watch(_CAPTURE)
        self._routing_stats = RoutingStatsPoller(self.worker_rpc, self.watch, _CAPTURE)

    async def look(self) -> None:
        assert self._routing_stats is not None
        await self._routing_stats.poll()

    def _launch_settings(self) -> Any:
        settings = super()._launch_settings()
        assert settings.worker_cls == "service.engine.vllm.worker.gpu_worker.GraphSteeringWorker"
        assert settings.additional_config == {"coe_record_choices": True, "coe_places": 4}
        settings.worker_cls = "tests.support.engine.gate_observer_cpu.SeeingCpuWorker"
        settings.worker_extension_cls = "tests.support.engine.gate_observer.SeeingExtension"
        settings.enforce_eager = False
        return settings


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def steering(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Steering]:
    os.environ.update(ENVIRONMENT)
    made = await asyncio.to_thread(Steering, tmp_path_factory.mktemp("standing"), Compiled)
    os.environ[_TRACED] = "1"
    try:
        report = await made.engine.start()
        assert report.details["eager"] == "false"
        made.first = await made.say("plain", 4)
        for name in made.profiles:
            await made.engine.load_to_host(name)
        yield made
    finally:
        del os.environ[_TRACED]
        await made.engine.stop()
        made.engine.cache.close()


@pytest.mark.parametrize("name", ["plain", *RULES, "half"])
async def test_graph_steered_engine_equals_the_reference(steering: Steering, name: str) -> None:
    assert await steering.go_to(name) == ("" if name == "plain" else "steer")
    answers, _ = await steering.say(name)
    profile = steering.profiles.get(name)
    expected, chosen = await asyncio.to_thread(steering.reference.say, PROMPT, TOKENS, profile)
    assert answers == expected
    # All of it in one step.
    whole = [*PROMPT, *answers[:-1]]
    assert (await greedy(steering.engine, name, whole, 1))["token_ids"] == answers[-1:]
    seen = await steering.engine.worker_rpc("coe_seen", len(whole))
    for layer in range(LAYERS):
        assert {len(row) for row in seen[layer]} == {4}, "as many places as any profile needs"
        rows = [sorted(set(row)) for row in seen[layer]]
        assert rows == [sorted(row) for row in chosen[layer]], f"layer {layer}"


@pytest.mark.parametrize("name", ["masked", "three", "plain"])
async def test_graph_steering_capture_sees_the_steered_choices(
    steering: Steering, name: str
) -> None:
    """Nothing of ours runs in the routers: what they wrote down is read after each step."""
    await steering.engine.look()
    before = steering.engine.watch.load(name)
    await steering.go_to(name)
    answers, _ = await steering.say(name)
    await steering.engine.look()
    profile = steering.profiles.get(name)
    _, chosen = await asyncio.to_thread(steering.reference.say, PROMPT, len(answers), profile)
    load = [[sum(e in row for row in rows) for e in range(EXPERTS)] for rows in chosen.values()]
    assert (steering.engine.watch.load(name) - before).tolist() == load


async def test_graph_steering_swaps_leave_no_trace(steering: Steering) -> None:
    own = {}
    for name in steering.profiles:
        await steering.go_to(name)
        own[name] = await steering.say(name, 4)
    assert len({repr(text) for text in (steering.first, *own.values())}) == len(own) + 1
    compiled = await steering.engine.worker_rpc("coe_compiled")
    assert compiled > 0
    before = (await steering.engine.memory())["resident_bytes"]
    names = itertools.cycle([*steering.profiles, "plain"])
    for name in itertools.islice(names, 2 * (len(own) + 1)):
        assert await steering.go_to(name) == "steer"
        expected = steering.first if name == "plain" else own[name]
        assert await steering.say(name, 4) == expected, "not bit for bit what it was"
    assert await steering.engine.worker_rpc("coe_compiled") == compiled
    grown = (await steering.engine.memory())["resident_bytes"] - before
    assert grown < 8 * 1024**2, f"{grown} bytes leaked"


async def test_graph_steering_load_of_weights_that_can_not_be_seen_raises(
    steering: Steering,
) -> None:
    """A CPU's kernels keep packed weights in objects of C++, of which a copy would be fatal."""
    assert {"plain", "other", *steering.profiles} <= steering.engine.swappable_experts
    with pytest.raises(ExpertFailedError, match=r"other.* not be loaded: .*may be addresses"):
        await steering.engine.load_to_host("other")
    assert await steering.go_to("masked") in ("steer", "")
    assert steering.engine.failure() is None


async def test_graph_steering_of_a_profile_for_other_gates_raises(steering: Steering) -> None:
    with pytest.raises(ExpertFailedError, match=r"layer 0 has 4 experts, of which 2 are .* 4, 3"):
        await steering.engine.load_to_host("odd")
    assert steering.engine.failure() is None


async def test_graph_steering_supports_the_gate_class_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check calls and results of vLLM's own class, with its kernel replaced."""
    import torch
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router

    from service.engine.vllm.worker import graph_steering
    from service.engine.vllm.worker.gate_access import RoutedLayer

    def topk_softmax(
        weights: Any, ids: Any, _: Any, logits: Any, renormalize: bool, **_more: Any
    ) -> None:
        odds, chosen = torch.topk(torch.softmax(logits.float(), dim=-1), weights.shape[1])
        weights.copy_(odds / odds.sum(dim=-1, keepdim=True) if renormalize else odds)
        ids.copy_(chosen)
        ids[-1] = -1  # a row that only fills the batch up

    monkeypatch.setattr(fused_topk_router.ops, "topk_softmax", topk_softmax)
    router = fused_topk_router.FusedTopKRouter(2, 4)
    gates = {0: RoutedLayer(0, 4, 2, router, "TritonExperts")}
    monkeypatch.setattr(graph_steering, "gates_of", lambda _: gates)
    hidden, logits = torch.zeros(6, 8, dtype=torch.bfloat16), torch.randn(6, 4)
    own, own_ids = router.select_experts(hidden, logits)
    rules = graph_steering.GraphSteering(torch.nn.Linear(1, 1), 3)
    weights, ids = router.select_experts(hidden, logits)
    assert torch.equal(weights[:, :2], own)
    assert torch.equal(ids[:, :2], own_ids)
    layer = {"layer": 0, "mask": [True, False, False, False], "bias": [0.0] * 4}
    layer |= {"boost": [1.0] * 4, "top_k": 3, "top_p": None}
    fields = {"experts": 4, "top_k": 2, "renormalize": True, "layers": (layer,)}
    rules.write(rules.table_for(fields))
    captured: list[Any] = []
    router.set_capture_fn(captured.append)
    weights, ids = router.select_experts(hidden, logits, torch.int64)
    assert ids.dtype == torch.int64
    assert {tuple(sorted(row)) for row in ids[:-1].tolist()} == {(1, 2, 3)}
    assert torch.equal(captured[0], ids), "who looks on sees what is computed"
    assert ids[-1].tolist() == [-1, -1, -1]
    torch.testing.assert_close(weights[:-1].sum(dim=-1), torch.ones(5))
