"""Sampling of gate choices in the worker, and the configs that allow it."""

from __future__ import annotations

import ast
import importlib.util
import random
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.config import Config
from service.engine.vllm.worker.gate_access import RoutedLayer
from service.engine.vllm.worker.gate_capture import CaptureExtension, GateCapture
from service.errors import ConfigError

torch = pytest.importorskip("torch")

from service.engine.vllm.worker import gate_choice_recorder  # noqa: E402
from tests.support.engine import fake_cuda  # noqa: E402

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


class FirstRunner:
    """vLLM's first model runner, with what it has of a step."""

    def __init__(self) -> None:
        from vllm.v1.worker.gpu_input_batch import InputBatch

        # Made without its tables, which take the device.
        self.input_batch: Any = InputBatch.__new__(InputBatch)
        self.query_start_loc = SimpleNamespace(np=np.zeros(9, np.int32))

    def schedule(self, requests: dict[str, int]) -> None:
        self.input_batch._req_ids = list(requests)
        self.input_batch.req_id_to_index = {name: i for i, name in enumerate(requests)}
        self.query_start_loc.np[1 : len(requests) + 1] = np.cumsum(list(requests.values()))

    def sample(self) -> None:
        pass


class SecondRunner:
    """vLLM's second model runner, the default on GPUs, with classes of its own for a step."""

    def __init__(self) -> None:
        self.execute_model_state: Any = None

    def schedule(self, requests: dict[str, int]) -> None:
        from vllm.v1.worker.gpu.input_batch import InputBatch

        fields = dict.fromkeys(InputBatch.__dataclass_fields__)
        starts = np.cumsum([0, *requests.values()]).astype(np.int32)
        # More rows than requests, as in a batch that is padded for a captured graph.
        padded = np.concatenate([starts, np.full(3, starts[-1], np.int32)])
        fields |= {"req_ids": list(requests), "num_reqs": len(requests)}
        fields |= {"query_start_loc_np": padded, "num_tokens": int(starts[-1])}
        batch = InputBatch(**fields)
        self.execute_model_state = _second_state(batch)

    def sample(self) -> None:
        self.execute_model_state = None


def _second_state(batch: Any) -> Any:
    """`ExecuteModelState`, whose module can't be imported without Triton: by its source."""
    fields = _fields_in_source("vllm.v1.worker.gpu.model_runner", "ExecuteModelState")
    made = namedtuple("ExecuteModelState", fields)  # type: ignore[misc]
    return made(**{**dict.fromkeys(fields), "input_batch": batch})


def _fields_in_source(module: str, name: str) -> list[str]:
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    (class_,) = (
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    return [
        node.target.id
        for node in class_.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


@pytest.mark.filterwarnings("ignore")  # of vLLM's imports
@pytest.mark.parametrize("kind", [FirstRunner, SecondRunner])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_gate_capture_reads_the_batch_of_both_model_runners(
    kind: Any, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = fake_cuda.FakeCuda()
    monkeypatch.setattr(gate_choice_recorder, "cuda_runtime", lambda: cuda if on_gpu else None)
    runner = kind()
    one = CaptureExtension()
    one.model_runner = runner
    routers = [Router(), Router()]
    layers = tuple(RoutedLayer(3 * i, EXPERTS, 2, r) for i, r in enumerate(routers))
    monkeypatch.setattr(gate_choice_recorder, "routed_layers", lambda _: layers)
    one._coe_choices = gate_choice_recorder.ChoiceBuffer(torch.nn.Linear(1, 1), 64, 2)
    assert one.coe_capture("a", 1, 2, 40) == {"layers": [0, 3], "experts": EXPERTS, "top_k": 2}

    def step(requests: dict[str, int], *chosen: Any) -> None:
        runner.schedule(requests)
        for router, rows in zip(routers, chosen, strict=True):
            router.capture_fn(torch.tensor([*rows, [0, 1]], dtype=torch.int32))
        one._coe_stepped()
        for copy in cuda.behind:
            copy.end()
        runner.sample()

    step({"cmpl-1": 1, "cmpl-2": 1}, [[0, 1], [0, 2]], [[2, 3], [1, 3]])
    step({"cmpl-canary-7": 1}, [[3, 3]], [[0, 0]])
    rows, others = [[i % 3, i % 3 + 1] for i in range(33)], [[0, i % 3 + 1] for i in range(33)]
    step({"cmpl-3": 33}, rows, others)
    one._coe_stepped()  # nothing was scheduled, as for a model that makes embeddings
    assert not sum(copy.waited for copy in cuda.behind), "a step waited for the device"
    counts = one.coe_captured()["a"]
    assert counts["tokens"] == 2 + 33 + (kind is FirstRunner) * 33
    *shape, data = counts["stretches"][0]
    kept = np.frombuffer(data, np.int16).reshape(shape)
    assert kept.tolist() == [rows, others]
    assert len(cuda.behind) == (2 + (kind is FirstRunner)) * on_gpu


def test_gate_capture_waits_for_the_device_only_for_a_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = fake_cuda.FakeCuda()
    monkeypatch.setattr(gate_choice_recorder, "cuda_runtime", lambda: cuda)
    runner, router = SecondRunner(), Router()
    layers = (RoutedLayer(0, EXPERTS, 2, router),)
    monkeypatch.setattr(gate_choice_recorder, "routed_layers", lambda _: layers)
    buffer = gate_choice_recorder.ChoiceBuffer(torch.nn.Linear(1, 1), 64, 2)
    capture = GateCapture(
        runner, lambda: "a", every=1, stretches=1, tokens=40, chance=random.Random(1)
    )
    capture.follow(buffer)
    runner.schedule({"cmpl-1": 1})
    router.capture_fn(torch.tensor([[1, 2]], dtype=torch.int32))
    capture.stepped()
    assert not cuda.behind[0].waited
    assert load_told(capture.snapshot(), "a") == [[0, 1, 1, 0]]
    assert cuda.behind[0].waited == 1
    assert capture.snapshot() == {}


def test_gate_capture_of_an_unknown_model_runner_is_refused() -> None:
    one = CaptureExtension()
    one.model_runner = SimpleNamespace()
    assert "does not tell" in one.coe_capture("a", 1, 2, 40)["refused"]


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
