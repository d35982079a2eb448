"""The importance of routed experts, compared with a computation token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from router_models.moe.expert_importance import Importance, keep_best, measure
from router_models.moe.gate_recording_and_steering import (
    NotSteerableError,
    capture_choices,
    find_routed,
    steer_gates,
)
from service.moe.steering_profile import LayerSteering, MoeShape, moe_shape, steer
from tests.support.tiny_moe import EXPERTS, LAYERS, TOP_K, WORDS, save, tiny_moe

KINDS = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe")


def shape_of(kind: str, tmp_path: Path) -> tuple[Any, MoeShape]:
    model = tiny_moe(kind)
    shape = moe_shape(save(model, tmp_path / kind))
    assert shape is not None
    return model, shape


def texts() -> list[list[int]]:
    chance = np.random.default_rng(0)
    return [chance.integers(0, WORDS, length).tolist() for length in (5, 11, 17)]


def slowly(model: Any, all_ids: list[list[int]]) -> np.ndarray:
    """EASY-EP's importance of a Mixtral, one token and one expert at a time."""
    score = np.zeros((LAYERS, EXPERTS))
    for ids in all_ids:
        with torch.no_grad():
            streams = model.model(
                input_ids=torch.tensor([ids]), output_hidden_states=True
            ).hidden_states
            places = torch.arange(len(ids))[None]
            for i, layer in enumerate(model.model.layers):
                attended, _ = layer.self_attn(
                    hidden_states=layer.input_layernorm(streams[i]),
                    position_embeddings=model.model.rotary_emb(streams[i], places),
                    attention_mask=None,
                )
                for h in (streams[i] + attended)[0]:
                    x = layer.post_attention_layernorm(h)
                    odds = torch.softmax(layer.mlp.gate.weight @ x, -1)
                    best = odds.argsort(descending=True)[:TOP_K]
                    weights = odds[best] / odds[best].sum()
                    outputs = []
                    for e in best:
                        gate, up = (layer.mlp.experts.gate_up_proj[e] @ x).chunk(2)
                        inner = torch.nn.functional.silu(gate) * up
                        outputs.append(layer.mlp.experts.down_proj[e] @ inner)
                    added = sum(w * out for w, out in zip(weights, outputs, strict=True))
                    cosine = float(h @ (h + added) / (h.norm() * (h + added).norm()))
                    for e, w, out in zip(best, weights, outputs, strict=True):
                        score[i, int(e)] += float(w) * float(out.norm()) * max(0.0, 1 - cosine)
    return score


def test_importance_equals_the_direct_computation(tmp_path: Path) -> None:
    model, shape = shape_of("mixtral", tmp_path)
    found = measure(model, find_routed(model, shape), shape, texts())
    np.testing.assert_allclose(found.score, slowly(model, texts()), rtol=1e-4, atol=1e-7)
    assert found.uses.sum() == LAYERS * TOP_K * sum(map(len, texts()))
    assert ((found.uses > 0) == (found.peaks > 0)).all()
    assert found.super_experts() == {}


@pytest.mark.parametrize("kind", KINDS)
def test_importance_measures_and_steers_each_model_family(kind: str, tmp_path: Path) -> None:
    model, shape = shape_of(kind, tmp_path)
    layers = find_routed(model, shape)
    before = measure(model, layers, shape, texts())
    best = int(before.score[1].argmax())
    mask = np.zeros(EXPERTS, bool)
    mask[best] = True
    ids = torch.tensor([texts()[2]])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with steer_gates(layers, {1: LayerSteering.of(EXPERTS)}, shape):
            same = model(input_ids=ids).logits
        fields: dict[int, torch.Tensor] = {}
        masked = {1: LayerSteering.of(EXPERTS, mask=mask, top_k=3)}
        with (
            steer_gates(layers, masked, shape),
            capture_choices(layers, lambda layer, ids, _: fields.update({layer: ids})),
        ):
            other = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    # A profile that changes nothing changes nothing; one that is gone is gone.
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(again, plain)
    assert (other - plain).abs().max() > 1e-3
    assert fields[0].shape[-1] == TOP_K
    assert fields[1].shape[-1] == 3
    assert best not in fields[1].unique().tolist()


def test_steered_gate_equals_the_reference(tmp_path: Path) -> None:
    model, shape = shape_of("mixtral", tmp_path)
    layers = find_routed(model, shape)
    layer = LayerSteering.of(
        EXPERTS, bias=np.linspace(-1, 1, EXPERTS), boost=[1, 2] * 4, top_k=3, top_p=0.7
    )
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), steer_gates(layers, {0: layer}, shape):
        logits, weights, ids = layers[0].router(x)
    want_weights, want_ids = steer(logits.numpy(), layer, shape)
    assert (ids.numpy() == want_ids).all()
    np.testing.assert_allclose(weights.numpy(), want_weights, rtol=1e-6)


def test_importance_protects_experts_with_massive_activations(tmp_path: Path) -> None:
    model, shape = shape_of("mixtral", tmp_path)
    layers = find_routed(model, shape)
    loud = int(measure(model, layers, shape, texts()).uses[0].argmax())
    with torch.no_grad():
        # One output of one expert: the sum of the others stays as it is.
        model.model.layers[0].mlp.experts.down_proj[loud, 7] *= 1e6
    found = measure(model, layers, shape, texts())
    assert found.forms.tolist() == [True, False]
    assert found.super_experts() == {0: (loud,)}


def test_importance_large_outputs_without_massive_activations_are_not_protected() -> None:
    peaks = np.ones((2, 4))
    peaks[0, 1] = 50
    one = Importance((3, 5), peaks, peaks, peaks.astype(int), np.array([False, True]))
    assert one.super_experts() == {}
    two = Importance((3, 5), peaks, peaks, peaks.astype(int), np.array([True, True]))
    assert two.super_experts() == {3: (1,)}


@pytest.mark.parametrize(
    ("keep", "least", "protected", "stay"),
    [
        (0.5, 1, (), [1, 3]),
        (0.5, 3, (), [0, 1, 3]),
        (0.5, 1, (2,), [2, 3]),
        (0.25, 1, (0, 2), [0, 2]),
        (1.0, 1, (), [0, 1, 2, 3]),
        (0.26, 1, (), [1, 3]),
    ],
)
def test_importance_keeps_the_best_and_the_protected_experts(
    keep: float, least: int, protected: tuple[int, ...], stay: list[int]
) -> None:
    score = np.array([2.0, 3.0, 1.0, 9.0])
    kept = keep_best(score, keep, least=least, protected=protected)
    assert np.flatnonzero(kept).tolist() == stay


def test_importance_unsupported_gate_class_raises_with_its_name() -> None:
    model = tiny_moe("phimoe")
    shape = MoeShape((0, 1), EXPERTS, TOP_K, True, "")
    with pytest.raises(NotSteerableError, match="PhimoeForCausalLM: layer 0: its gate does not"):
        measure(model, find_routed(model, shape), shape, texts())
    with pytest.raises(NotSteerableError, match="PhimoeForCausalLM: layer 0 has no experts in one"):
        find_routed(model, MoeShape((0,), EXPERTS + 1, TOP_K, True, ""))
    with pytest.raises(NotSteerableError, match="PhimoeForCausalLM: its decoder layers are not"):
        find_routed(model, MoeShape((9,), EXPERTS, TOP_K, True, ""))
