"""Sampling of gate choices in the worker, and the configs that allow it."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.config import Config
from service.engine.vllm.worker.gate_access import RoutedLayer
from service.engine.vllm.worker.gate_capture import GateCapture
from service.errors import ConfigError

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


def load_told(recorded: dict[str, Any], expert: str) -> list[list[int]]:
    return np.frombuffer(recorded[expert]["load"], np.int64).reshape(-1, EXPERTS).tolist()


def test_gate_capture_counts_by_running_expert_and_resets_after_a_snapshot() -> None:
    worker = Worker()
    assert worker.capture.shape == {"layers": [0, 3], "experts": EXPERTS, "top_k": 2}
    worker.step([[0, 1]], [[2, 3]], requests={"cmpl-1": 1})
    worker.running = "b"
    worker.step([[0, 1], [0, 2]], [[2, 3], [1, 3]], requests={"cmpl-2": 1, "cmpl-3": 1}, padding=3)
    counts = worker.capture.snapshot()
    assert load_told(counts, "a") == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert load_told(counts, "b") == [[2, 1, 1, 0], [0, 1, 1, 2]]
    assert (counts["a"]["tokens"], counts["b"]["tokens"]) == (1, 2)
    assert worker.capture.snapshot() == {}


def test_gate_capture_samples_one_step_in_n() -> None:
    worker = Worker(every=3)
    for _ in range(3000):
        worker.step([[0, 1]], [[2, 3]], requests={"cmpl-1": 1})
    seen = worker.capture.snapshot()["a"]["tokens"]
    assert 900 < seen < 1100


def test_gate_capture_random_sampling_misses_no_periodic_step() -> None:
    # Every fourth step brings a prompt: it must not be always seen, nor never.
    worker = Worker(every=4)
    prompts = 0
    for i in range(2000):
        tokens = 5 if i % 4 == 0 else 1
        worker.step([[0, 1]] * tokens, [[2, 3]] * tokens, requests={"cmpl-1": tokens})
        prompts += tokens == 5
    seen = worker.capture.snapshot()["a"]["tokens"]
    assert 0.2 < seen / (5 * prompts + 3 * prompts) < 0.3


def test_gate_capture_ignores_the_canary_request() -> None:
    worker = Worker()
    worker.step([[3, 1]], [[2, 3]], requests={"cmpl-canary-77-0": 1})
    worker.step([[0, 1]], [[2, 3]], requests={"cmpl-1": 1})
    assert load_told(worker.capture.snapshot(), "a") == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_gate_capture_keeps_a_few_stretches_of_long_prompts() -> None:
    worker = Worker()
    rows = [[i % 3, i % 3 + 1] for i in range(10 + 33 + 50 + 60)]
    others = [[0, i % 3 + 1] for i in range(len(rows))]
    worker.step(rows, others, requests={"short": 10, "one": 33, "long": 50, "over": 60})
    (counts,) = worker.capture.snapshot().values()
    kept = [np.frombuffer(data, np.int16).reshape(shape) for *shape, data in counts["stretches"]]
    assert [item.shape for item in kept] == [(2, 33, 2), (2, 40, 2)]
    assert kept[0][0].tolist() == rows[10:43]
    assert kept[1][1].tolist() == others[43:83]


def test_gate_capture_layers_with_a_smaller_top_k_leave_empty_places() -> None:
    worker = Worker(stretches=1)
    worker.step([[1]] * 32, [[2, 3]] * 32, requests={"one": 32})
    (counts,) = worker.capture.snapshot().values()
    *shape, data = counts["stretches"][0]
    assert np.frombuffer(data, np.int16).reshape(shape)[:, 0].tolist() == [[1, -1], [2, 3]]


def test_gate_capture_expert_chosen_twice_by_a_token_counts_once() -> None:
    worker = Worker(stretches=1)
    # As a rule that gives sure tokens fewer experts fills the places that are left.
    worker.step([[2, 2]] * 32, [[3, 1]] * 32, requests={"one": 32})
    (counts,) = worker.capture.snapshot().values()
    assert load_told({"a": counts}, "a") == [[0, 0, 32, 0], [0, 32, 0, 32]]
    *shape, data = counts["stretches"][0]
    assert np.frombuffer(data, np.int16).reshape(shape)[:, 0].tolist() == [[2, -1], [1, 3]]


def test_gate_capture_detached_model_is_not_sampled() -> None:
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


def test_config_moe_capture_on_cpu_without_enforce_eager_raises() -> None:
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


def test_plan_pool_moe_capture_without_a_moe_model_raises() -> None:
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
