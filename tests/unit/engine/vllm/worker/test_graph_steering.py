"""Steering of gates under captured graphs, without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.engine.steering_data import PLACES_KEY, SteeredLayer, Steering
from service.moe.steering_profile import LayerSteering, MoeShape, steer

torch = pytest.importorskip("torch")

E, K, WIDTH, T = 8, 2, 4, 64
PROFILES: dict[str, dict[str, Any]] = {
    "masked": {"mask": [True, False, False, True, False, True, False, False]},
    "biased": {"bias": [0.0, 1.5, -0.75, 0.25, 0.0, 0.0, 3.0, -1.0]},
    "boosted": {"boost": [2.0, 0.25, 1.0, 1.5, 1.0, 1.0, 1.0, 0.5]},
    "one": {"top_k": 1},
    "three": {"top_k": 3},
    "four": {"top_k": 4},
    "sure": {"top_p": 0.4},
    "surer": {"top_p": 0.75, "top_k": 4},
    "null": {"null": 1.0, "top_k": 4},
    "all": {
        "mask": [True, True, True, True, True, False, False, False],
        "bias": [0, 0, 0, 0, 0, 0.5, -0.5, 0],
        "boost": [1, 1, 1, 1, 1, 0.5, 2, 3],
        "top_k": 3,
        "top_p": 0.9,
    },
}


class FusedTopKRouter:
    """Stands for a GPU's, with -1 for rows that only fill a batch up.

    Its own choice is the least probable, so that nobody's is taken for the other's.
    """

    def __init__(self, renormalize: bool = True, **other: Any) -> None:
        self.renormalize = renormalize
        self.scoring_func = "softmax"
        self.padding = 0
        self.__dict__.update(other)

    def _compute_routing(
        self, hidden: Any, logits: Any, indices_type: Any = None, *, input_ids: Any = None
    ) -> tuple[Any, Any]:
        weights, ids = torch.topk(torch.softmax(logits, dim=-1), K, dim=-1, largest=False)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        rows = torch.arange(len(logits))[:, None] < len(logits) - self.padding
        return weights, torch.where(rows, ids, -1).to(torch.int32)

    def choose(self, logits: Any) -> tuple[Any, Any]:
        """As vLLM's base class calls it."""
        chosen: tuple[Any, Any] = self._compute_routing(None, logits, None, input_ids=None)
        return chosen


def standing(
    monkeypatch: pytest.MonkeyPatch,
    routers: Mapping[int, Any],
    *,
    places: int = WIDTH,
    kernel: str = "TritonExperts",
) -> Any:
    """Rules in those routers, by layer."""
    from service.engine.vllm.worker import graph_steering
    from service.engine.vllm.worker.gate_access import RoutedLayer

    gates = {layer: RoutedLayer(layer, E, K, router, kernel) for layer, router in routers.items()}
    monkeypatch.setattr(graph_steering, "gates_of", lambda _: gates)
    return graph_steering.GraphSteering(torch.nn.Linear(1, 1), places)


def steering_data(
    profile: Mapping[str, Any], *layers: int, renormalize: bool = True
) -> dict[str, Any]:
    """What an engine is told of a profile for those layers."""
    one = LayerSteering.of(E, **profile)
    made = [
        SteeredLayer(
            layer,
            tuple(one.mask),
            tuple(one.bias),
            tuple(one.boost),
            one.top_k,
            one.top_p,
            one.null,
        )
        for layer in layers
    ]
    return asdict(Steering("base", E, K, renormalize, tuple(made)))


def some_logits(seed: int = 0) -> Any:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("name", PROFILES)
def test_graph_steering_choice_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, name: str, ties: bool, renormalize: bool
) -> None:
    router, profile = FusedTopKRouter(renormalize), PROFILES[name]
    rules = standing(monkeypatch, {0: router})
    rules.write(rules.table_for(steering_data(profile, 0, renormalize=renormalize)))
    logits = some_logits().round() if ties else some_logits()
    weights, ids = router.choose(logits)
    assert (weights.shape, ids.shape) == ((T, WIDTH), (T, WIDTH))
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    expected, chosen = steer(
        logits.numpy(), LayerSteering.of(E, **profile), MoeShape((0,), E, K, renormalize, "")
    )
    for row in range(T):
        k = int((expected[row] > 0).sum())
        assert ids[row, :k].tolist() == chosen[row][:k].tolist()
        np.testing.assert_allclose(weights[row, :k].numpy(), expected[row][:k], rtol=2e-6)
        # What is left of the places is computed for nobody else.
        assert not weights[row, k:].any()
        assert set(ids[row, k:].tolist()) <= {int(ids[row, 0])}


@pytest.mark.parametrize("places", [K, WIDTH])
def test_graph_steering_without_a_profile_equals_the_gate_s_own_choice(
    monkeypatch: pytest.MonkeyPatch, places: int
) -> None:
    router, logits = FusedTopKRouter(), some_logits()
    own, own_ids = router.choose(logits)
    rules = standing(monkeypatch, {0: router}, places=places)
    profile = rules.table_for(steering_data(PROFILES["masked"], 0))
    for written in (None, profile, None):
        rules.write(written)
        weights, ids = router.choose(logits)
        same = torch.equal(weights[:, :K], own) and torch.equal(ids[:, :K], own_ids)
        assert same is (written is None)
        if written is None:
            assert not weights[:, K:].any()
            assert torch.equal(ids[:, K:], own_ids[:, :1].expand(-1, places - K))


def test_graph_steering_leaves_layers_outside_the_profile_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    routers = {3: FusedTopKRouter(), 5: FusedTopKRouter()}
    logits = some_logits()
    own, _ = routers[3].choose(logits)
    rules = standing(monkeypatch, routers, places=K)
    rules.write(rules.table_for(steering_data(PROFILES["boosted"], 5)))
    assert torch.equal(routers[3].choose(logits)[0], own)
    assert not torch.equal(routers[5].choose(logits)[0], own)


def test_graph_steering_keeps_padding_rows_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    router = FusedTopKRouter(padding=5)
    rules = standing(monkeypatch, {0: router})
    rules.write(rules.table_for(steering_data(PROFILES["three"], 0)))
    _, ids = router.choose(some_logits())
    assert bool((ids[-5:] == -1).all())
    assert bool((ids[:-5] >= 0).all())


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_graph_steering_rules_take_effect_without_recompilation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = FusedTopKRouter()
    rules = standing(monkeypatch, {0: router})
    torch._dynamo.reset()
    # Without a break in the graph: nothing asks the device, nothing depends on what it says.
    compiled = torch.compile(router.choose, fullgraph=True, backend="eager")
    seen = torch._dynamo.utils.counters["stats"]
    before = seen["unique_graphs"]
    for name in (None, *PROFILES, None):
        rules.write(rules.table_for(steering_data(PROFILES[name], 0)) if name is not None else None)
        for seed in range(2):
            weights, ids = compiled(some_logits(seed))
            expected, chosen = router.choose(some_logits(seed))
            assert torch.equal(ids, chosen)
            torch.testing.assert_close(weights, expected)
    assert seen["unique_graphs"] - before == 1, "it was compiled anew"


def test_graph_steering_rules_take_effect_in_a_recorded_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The operations alone, replayed without a line of Python, as a captured graph would be."""
    from torch.fx.experimental.proxy_tensor import make_fx

    router = FusedTopKRouter()
    rules = standing(monkeypatch, {0: router})
    recorded = make_fx(lambda logits: router.choose(logits))(some_logits())
    operations = {str(node.target) for node in recorded.graph.nodes}
    assert any("sort" in operation for operation in operations)
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
    assert not [operation for operation in operations if any(word in operation for word in waits)]
    for name, profile in PROFILES.items():
        rules.write(rules.table_for(steering_data(profile, 0)))
        for seed in range(2):
            weights, ids = recorded(some_logits(seed))
            expected, chosen = router.choose(some_logits(seed))
            assert torch.equal(ids, chosen), name
            assert torch.equal(weights, expected), name


def test_graph_steering_invalid_rules_raise_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    odd = FusedTopKRouter(scoring_func="sigmoid")
    with pytest.raises(ValueError, match="layer 1 has a FusedTopKRouter that chooses by sigmoid"):
        standing(monkeypatch, {1: odd})
    assert "_compute_routing" not in odd.__dict__
    rules = standing(monkeypatch, {0: FusedTopKRouter()}, places=K)
    with pytest.raises(ValueError, match=r"layer 0: top_k is 3, .* started for at most 2"):
        rules.table_for(steering_data(PROFILES["three"], 0))
    with pytest.raises(ValueError, match="layer 7 has no gate"):
        rules.table_for(steering_data({}, 7))
    with pytest.raises(ValueError, match="normalised: True; the profile is for 8, 2, False"):
        rules.table_for(steering_data({}, 0, renormalize=False))


def test_graph_steering_kernels_with_fixed_top_k_get_no_extra_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = FusedTopKRouter()
    rules = standing(monkeypatch, {0: router}, kernel="SomeExperts")
    assert router.choose(some_logits())[1].shape == (T, K)
    rules.table_for(steering_data(PROFILES["one"], 0))
    with pytest.raises(
        ValueError, match=r"top_k is 4, and SomeExperts, .* is made \(.*: triton .*\) for at most 2"
    ):
        rules.table_for(steering_data(PROFILES["four"], 0))


class Loads:
    """Stands for vLLM's worker."""

    def load_model(self) -> None:
        self.rank = 0
        self.vllm_config = SimpleNamespace(
            additional_config={PLACES_KEY: WIDTH}, parallel_config=SimpleNamespace(world_size=1)
        )
        model = torch.nn.Linear(2, 2)
        self.model_runner = SimpleNamespace(model=model, get_model=lambda: model)


def worker() -> Any:
    """A GPU's worker as vLLM makes it of ours and our extension."""
    from service.engine.vllm.worker.graph_steering import SteeringMixin
    from service.engine.vllm.worker.pinned_swap_extension import PinnedExtension

    return type("Worker", (SteeringMixin, Loads, PinnedExtension), {})()


def test_graph_steering_worker_loads_swaps_and_verifies_profiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from service.engine.vllm.worker import graph_steering, pinned_swap_extension
    from service.engine.vllm.worker.gate_access import RoutedLayer

    router, logits = FusedTopKRouter(), some_logits()
    own, own_ids = router.choose(logits)
    gates = {0: RoutedLayer(0, E, K, router, "TritonExperts")}
    monkeypatch.setattr(graph_steering, "gates_of", lambda _: gates)

    def odd(_: Any) -> None:
        raise ValueError("mlp has weights of FusedMoE; they can't be copied")

    monkeypatch.setattr(pinned_swap_extension, "check_copyable", odd)
    one = worker()
    one.load_model()
    assert one.coe_register_initial("base") == "mlp has weights of FusedMoE; they can't be copied"
    assert one.coe_memory()["host_bytes"] == 0
    with pytest.raises(ValueError, match="the weights of 'base' are not held"):
        worker().coe_steer("masked", steering_data(PROFILES["masked"], 0))
    assert one.coe_steer("masked", steering_data(PROFILES["masked"], 0)) == 4 * (2 * E + 4)
    one.coe_steer("three", steering_data(PROFILES["three"], 0))
    assert one.coe_load_result("three")["state"] == "host"
    results = {}
    for name in ("masked", "three", "base", "masked", "base", "three"):
        done = one.coe_swap_in(name)
        assert (done["ok"], done["method"]) == (True, "steer")
        weights, ids = router.choose(logits)
        assert torch.equal(results.setdefault(name, (weights, ids))[0], weights)
    assert torch.equal(results["base"][0][:, :K], own)
    assert torch.equal(results["base"][1][:, :K], own_ids)
    assert not one.coe_evict("three")
    assert one.coe_evict("masked")
    # Somebody else wrote there.
    one._coe_graph_steering.table[0, 0] = 1.0
    assert not one._coe_verify(one._coe().held["three"], whole=False)


def test_graph_steering_unsupported_model_runs_and_gives_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from service.engine.vllm.worker import graph_steering

    def none(_: Any) -> Any:
        raise ValueError("layer 0 is routed inside its kernel (X)")

    monkeypatch.setattr(graph_steering, "gates_of", none)
    one = worker()
    one.load_model()
    one.coe_share("base", str(tmp_path / "base"), "token")
    assert one.coe_register_initial("base") == ""
    with pytest.raises(ValueError, match=r"layer 0 is routed inside its kernel \(X\)"):
        one.coe_steer("masked", steering_data({}, 0))
    one._coe_graph_steering = None
    with pytest.raises(ValueError, match="was not started for steered experts"):
        one.coe_steer("masked", steering_data({}, 0))


def test_swappable_experts_depend_on_how_the_engine_was_started() -> None:
    from service.config import VllmOptions
    from service.engine.vllm.swapping_engine import SwappingVllmEngine, Weights

    def steered(base: str, k: int) -> Weights:
        layer = SteeredLayer(0, (False,), (0.0,), (1.0,), k, None)
        return Weights("/m", steering=Steering(base, E, K, True, (layer,)))

    weights = {
        "a": Weights("/m"),
        "other": Weights("/n"),
        "one": steered("a", 1),
        "four": steered("a", 4),
        "far": steered("other", 1),
        "lost": Weights("/m", fault="no such profile"),
    }

    def engine(*, on_cpu: bool, places: int, fixed: str) -> set[str]:
        made = SwappingVllmEngine(
            "a", weights, VllmOptions(), on_cpu=on_cpu, canary_interval=1, canaries={}
        )
        made._places, made._fixed = places, fixed
        return set(made.swappable_experts)

    assert engine(on_cpu=True, places=0, fixed="") == set(weights)
    # Started before there were any; for fewer experts; with weights that can't be copied.
    assert engine(on_cpu=False, places=0, fixed="") == {"a", "other", "lost"}
    assert engine(on_cpu=False, places=2, fixed="") == set(weights) - {"four"}
    assert engine(on_cpu=False, places=4, fixed="a") == {"a", "one", "four", "lost"}
