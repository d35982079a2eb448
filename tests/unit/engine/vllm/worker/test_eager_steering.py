"""Steering of gates in a worker, without an engine."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")


class CPURouter:
    """Stands for vLLM's."""

    def __init__(self, **other: Any) -> None:
        self.use_grouped_topk = False
        self.scoring_func = "softmax"
        self.custom_routing_function: Any = None
        self.__dict__.update(other)

    def _compute_routing(self, hidden: Any, logits: Any) -> str:
        return "its own"


class FusedTopKRouter:
    """Stands for a GPU's: it knows neither groups nor a model's own code."""

    def __init__(self, scoring_func: str = "softmax") -> None:
        self.scoring_func = scoring_func


class GroupedTopKRouter(FusedTopKRouter):
    """Stands for another of a GPU's."""


@pytest.mark.parametrize(
    ("router", "words"),
    [
        (CPURouter(), None),
        (FusedTopKRouter(), None),
        (FusedTopKRouter("sigmoid"), "has a FusedTopKRouter that chooses by sigmoid, not"),
        (
            GroupedTopKRouter(),
            "layer 3 has a GroupedTopKRouter; steered can be a CPURouter or a FusedTopKRouter",
        ),
        (CPURouter(use_grouped_topk=True), "chooses in groups, not by softmax and top-k"),
        (CPURouter(scoring_func="sigmoid"), "chooses by sigmoid, not"),
        (CPURouter(custom_routing_function=min), "chooses by the model's own code, not"),
    ],
)
def test_gate_unsupported_for_steering_is_refused_with_the_reason(
    router: Any, words: str | None
) -> None:
    from service.engine.vllm.worker.gate_access import RoutedLayer

    why = RoutedLayer(3, 4, 2, router).unsteerable_reason()
    assert why is None if words is None else why is not None and words in why


class Experts:
    """Stands for vLLM's kernel of a layer."""

    def apply(self, **_: Any) -> str:
        return "its own"


@pytest.mark.parametrize(
    ("rule", "drops"),
    [
        ({}, False),
        ({"top_k": 1}, False),
        ({"boost": [2.0, 1.0]}, False),
        ({"boost": [0.0, 1.0]}, True),
        ({"top_p": 0.5}, True),
        ({"null": 0.0}, True),
    ],
)
def test_steering_kernel_computes_kept_choices_while_a_rule_may_drop_some(
    monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any], drops: bool
) -> None:
    import torch

    from service.engine.vllm.worker import eager_steering
    from service.engine.vllm.worker.gate_access import RoutedLayer

    router, kernel = CPURouter(renormalize=True), Experts()
    gates = {0: RoutedLayer(0, 2, 2, router, "Experts", kernel)}
    monkeypatch.setattr(eager_steering, "gates_of", lambda _: gates)
    layer = {"layer": 0, "mask": [0, 0], "bias": [0, 0], "boost": [1, 1], "top_k": 1, "top_p": None}
    fields = {"experts": 2, "top_k": 2, "renormalize": True, "layers": [layer | rule]}
    steered = eager_steering.SteeredGates.of(torch.nn.Linear(1, 1), fields)
    steered.install()
    assert steered.verify()
    assert ("apply" in kernel.__dict__) is drops
    steered.remove()
    assert kernel.apply() == "its own"
    assert not steered.verify()


def test_steering_rules_are_applied_and_removed_without_a_trace() -> None:
    import torch

    from service.engine.vllm.worker.eager_steering import SteeredGates, rule_of

    router = CPURouter()
    before = dict(router.__dict__)
    layer = {"mask": [0, 1], "bias": [0, 0], "boost": [2, 1], "top_k": None, "top_p": None}
    rule = rule_of(layer, {"top_k": 1, "renormalize": True})
    steered = SteeredGates(((router, rule),))
    assert not steered.verify()
    steered.install()
    assert steered.verify()
    weights, ids = router._compute_routing(None, torch.tensor([[0.0, 9.0]]))
    assert (weights, ids) == (torch.tensor([[2.0]]), torch.tensor([[0]]))
    steered.remove()
    steered.remove()
    assert not steered.verify()
    assert router._compute_routing(None, None) == "its own"
    assert router.__dict__ == before
