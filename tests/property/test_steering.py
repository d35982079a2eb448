"""Steering follows its definition for any token and expert; profiles round-trip."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.moe.steering_profile import (
    LayerSteering,
    MoeShape,
    SteeringProfile,
    check_profile,
    read_profile,
    steer,
    write_profile,
)

_small = st.integers(-80, 80).map(lambda n: n / 16)


@st.composite
def shapes(draw: st.DrawFn) -> MoeShape:
    experts = draw(st.integers(2, 9))
    return MoeShape(
        tuple(sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=3)))),
        experts,
        draw(st.integers(1, experts)),
        draw(st.booleans()),
        draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
    )


@st.composite
def layers(draw: st.DrawFn, shape: MoeShape) -> LayerSteering:
    """One that fits."""
    n = shape.experts
    k = draw(st.none() | st.integers(1, n))
    masked = draw(st.sets(st.integers(0, n - 1), max_size=n - (k or shape.top_k)))
    return LayerSteering.of(
        n,
        mask=[i in masked for i in range(n)],
        bias=draw(st.lists(_small, min_size=n, max_size=n)),
        boost=[abs(b) for b in draw(st.lists(_small, min_size=n, max_size=n))],
        top_k=k,
        top_p=draw(st.none() | st.integers(1, 64).map(lambda i: i / 64)),
        null=draw(st.none() | _small),
    )


def by_hand(row: list[float], layer: LayerSteering, shape: MoeShape) -> dict[int, float]:
    """Weight by expert for one token, those of weight 0 included."""
    odds = {
        e: math.exp(row[e] + float(layer.bias[e]))
        for e in range(shape.experts)
        if not layer.mask[e]
    }
    total = sum(odds.values())
    order = sorted(odds, key=lambda e: (-odds[e], e))[: layer.top_k or shape.top_k]
    stay = {}
    reached = 0.0
    for e in order:
        if layer.top_p is not None and stay and reached >= layer.top_p - 1e-6:
            break
        stay[e] = odds[e] / total
        reached += stay[e]
    if layer.null is not None:
        stay = {e: p for e, p in stay.items() if row[e] + float(layer.bias[e]) >= layer.null}
    scale = 1 / sum(stay.values()) if shape.renormalize and stay else 1.0
    return {e: stay.get(e, 0.0) * scale * float(layer.boost[e]) for e in order}


@settings(deadline=None)
@given(st.data())
def test_steer_choice_follows_the_definition(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    layer = data.draw(layers(shape))
    rows = data.draw(
        st.lists(
            st.lists(_small, min_size=shape.experts, max_size=shape.experts), min_size=1, max_size=4
        )
    )
    # At the very edge of top_p either answer is right.
    if layer.top_p is not None:
        for row in rows:
            for p in np.cumsum(list(_probabilities(row, layer).values())):
                if abs(p - layer.top_p) < 1e-5:
                    return
    weights, ids = steer(np.array(rows, np.float64), layer, shape)
    assert weights.dtype == np.float32
    assert ids.dtype == np.int32
    for row, weight, chosen in zip(rows, weights, ids, strict=True):
        expected = by_hand(row, layer, shape)
        assert list(chosen) == list(expected)
        np.testing.assert_allclose(weight, list(expected.values()), rtol=1e-4, atol=1e-6)


@settings(deadline=None)
@given(st.data())
def test_steer_engine_choice_equals_the_reference(data: st.DataObject) -> None:
    torch = pytest.importorskip("torch")
    from service.engine.vllm.worker.eager_steering import choose, rule_of

    shape = data.draw(shapes())
    layer = data.draw(layers(shape))
    rows = data.draw(st.lists(st.lists(_small, min_size=shape.experts, max_size=shape.experts)))
    logits = np.array(rows, np.float32).reshape(-1, shape.experts)
    fields = {
        "mask": layer.mask.tolist(),
        "bias": layer.bias.tolist(),
        "boost": layer.boost.tolist(),
        "top_k": layer.top_k,
        # The sum of what comes before may differ in its last bit.
        "top_p": None if layer.top_p is None else layer.top_p + 1e-4,
        "null": layer.null,
    }
    base = {"top_k": shape.top_k, "renormalize": shape.renormalize}
    weights, ids = choose(torch.from_numpy(logits), rule_of(fields, base))
    wanted = replace(layer, top_p=fields["top_p"])
    expected, chosen = steer(logits, wanted, shape)
    # What top-p leaves out, whatever its boost: its place names the first choice.
    kept, _ = steer(logits, replace(wanted, boost=np.ones_like(layer.boost)), shape)
    assert ids.numpy().tolist() == np.where(kept > 0, chosen, chosen[:, :1]).tolist()
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert ids.is_contiguous()
    assert weights.is_contiguous()
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-5, atol=1e-7)


def _probabilities(row: list[float], layer: LayerSteering) -> dict[int, float]:
    odds = {e: math.exp(x + float(layer.bias[e])) for e, x in enumerate(row) if not layer.mask[e]}
    return {e: odds[e] / sum(odds.values()) for e in sorted(odds, key=lambda e: (-odds[e], e))}


@settings(deadline=None)
@given(st.data())
def test_profile_written_and_read_is_equal(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    profile = SteeringProfile(
        shape,
        {
            index: data.draw(layers(shape))
            for index in sorted(data.draw(st.sets(st.sampled_from(shape.layers))))
        },
        about=data.draw(st.text(max_size=20)),
    )
    check_profile(profile, shape)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.safetensors"
        write_profile(profile, path)
        back = read_profile(path)
    check_profile(back, shape)
    assert back.shape == shape
    assert back.about == profile.about
    for index, layer in profile.layers.items():
        if layer.is_neutral:
            assert index not in back.layers
            continue
        found = back.layers[index]
        for name in ("mask", "bias", "boost"):
            np.testing.assert_array_equal(getattr(found, name), getattr(layer, name))
        assert (found.top_k, found.top_p, found.null) == (layer.top_k, layer.top_p, layer.null)
