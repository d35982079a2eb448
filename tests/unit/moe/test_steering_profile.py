"""Steering profiles: gates are found in model files, and profiles that don't fit are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from service.errors import InvalidProfileError, ModelStoreError
from service.moe.gate_shapes import STEERABLE
from service.moe.steering_profile import (
    LayerSteering,
    MoeShape,
    SteeringProfile,
    check_profile,
    moe_shape,
    read_profile,
    steer,
    why_not_steerable,
    write_profile,
)

SHAPE = MoeShape((0, 1, 2), 4, 2, True, "ab" * 32)


def gates(
    folder: Path, config: dict[str, Any], name: str, layers: tuple[int, ...] = (0, 1)
) -> Path:
    """A model folder with nothing but gates and a tensor that must not be taken for one."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name.format(i): np.full((4, 8), i, np.float32) for i in layers} | {
        "model.layers.0.mlp.shared_expert_gate.weight": np.zeros((1, 8), np.float32)
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("kind", "name", "told", "renormalize"),
    [
        ("mixtral", "model.layers.{}.block_sparse_moe.gate.weight", None, True),
        ("qwen3_moe", "model.layers.{}.mlp.gate.weight", True, True),
        ("qwen2_moe", "model.layers.{}.mlp.gate.weight", None, False),
        ("olmoe", "model.layers.{}.mlp.gate.weight", True, False),
        ("granitemoe", "model.layers.{}.block_sparse_moe.router.layer.weight", None, True),
    ],
)
def test_moe_shape_is_read_from_the_gates_of_each_model_type(
    tmp_path: Path, kind: str, name: str, told: bool | None, renormalize: bool
) -> None:
    config: dict[str, Any] = {"model_type": kind, "num_experts_per_tok": 2}
    if told is not None:
        config["norm_topk_prob"] = told
    shape = moe_shape(gates(tmp_path / "one", config, name))
    assert shape is not None
    assert (shape.layers, shape.experts, shape.top_k) == ((0, 1), 4, 2)
    assert shape.renormalize is renormalize
    assert why_not_steerable(tmp_path / "one") is None
    again = moe_shape(gates(tmp_path / "two", config, name))
    assert again == shape
    other = moe_shape(gates(tmp_path / "three", config, name, layers=(0, 2)))
    assert other is not None
    assert other.gates != shape.gates


def test_moe_shape_of_a_dense_model_is_none(tmp_path: Path) -> None:
    folder = gates(tmp_path, {"model_type": "llama"}, "model.layers.{}.mlp.gate_proj.weight")
    assert moe_shape(folder) is None


def test_moe_shape_of_an_incomplete_folder_raises(tmp_path: Path) -> None:
    name = "model.layers.{}.mlp.gate.weight"
    with pytest.raises(ModelStoreError, match="num_experts_per_tok"):
        moe_shape(gates(tmp_path, {"model_type": "olmoe"}, name))
    with pytest.raises(ModelStoreError, match="can't be read"):
        moe_shape(tmp_path / "nowhere")


def test_why_not_steerable_names_unsupported_model_types(tmp_path: Path) -> None:
    config = {"model_type": "deepseek_v3", "num_experts_per_tok": 2}
    why = why_not_steerable(gates(tmp_path, config, "model.layers.{}.mlp.gate.weight"))
    assert why is not None
    assert "deepseek_v3" in why
    assert all(name in why for name in STEERABLE)


def test_documented_steerable_models_are_those_of_the_code() -> None:
    text = (Path(__file__).parents[3] / "docs/concepts/moe.md").read_text()
    table = text.partition("| can be steered |\n| --- |\n")[2].partition("\n\n")[0]
    assert [line.strip("| `") for line in table.splitlines()] == sorted(STEERABLE)


def of(**settings: Any) -> SteeringProfile:
    return SteeringProfile(SHAPE, {1: LayerSteering.of(4, **settings)})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask": [1, 1, 1, 1]}, "layer 1: all 4 experts are masked"),
        ({"mask": [1, 1, 1, 0]}, "layer 1: 1 of 4 experts are not masked, and 2 are chosen"),
        ({"mask": [1, 0, 0, 0], "top_k": 4}, "layer 1: 3 of 4 experts are not masked, and 4"),
        ({"top_k": 5}, "layer 1: top_k is 5; allowed: 1 to 4"),
        ({"top_k": 0}, "layer 1: top_k is 0; allowed: 1 to 4"),
        ({"top_p": 0.0}, "layer 1: top_p is 0;"),
        ({"top_p": 1.5}, "layer 1: top_p is 1.5;"),
        ({"top_p": float("nan")}, "layer 1: top_p is nan;"),
        ({"null": float("-inf")}, "layer 1: null is -inf; it must be a finite number"),
        ({"bias": [0, 0, np.nan, 0]}, "layer 1: bias of expert 2 is no finite number"),
        ({"boost": [1, np.inf, 1, 1]}, "layer 1: boost of expert 1 is no finite number"),
        ({"boost": [1, 1, 1, -0.5]}, "layer 1: boost of expert 3 is -0.5"),
        ({"bias": [1, 0, 0]}, r"layer 1: bias has shape \(3,\), and the model 4 experts"),
        ({"mask": [0] * 5}, r"layer 1: mask has shape \(5,\), and the model 4 experts"),
    ],
)
def test_profile_that_does_not_fit_the_model_raises(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidProfileError, match=words) as caught:
        check_profile(of(**settings), SHAPE)
    assert caught.value.code == "invalid_profile"
    # A file may hold it; it is refused in the same words once it is held against its base.
    if settings.get("mask") != [0] * 5:
        write_profile(of(**settings), tmp_path / "p")
        with pytest.raises(InvalidProfileError, match=words):
            check_profile(read_profile(tmp_path / "p"), SHAPE)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (MoeShape((0, 1, 2), 8, 2, True, "ab" * 32), "of 4 experts; this one has 8"),
        (MoeShape((0, 1), 4, 2, True, "ab" * 32), "3 layers with a gate; this one has 2"),
        (MoeShape((0, 1, 3), 4, 2, True, "ab" * 32), "layers 0-2; .* layers 0-1, 3"),
        (MoeShape((0, 1, 2), 4, 1, True, "ab" * 32), "2 experts per token; this one has 1"),
        (MoeShape((0, 1, 2), 4, 2, True, "cd" * 32), "abababababab….* cdcdcdcdcdcd…"),
        (MoeShape((0, 1, 2), 4, 2, False, "ab" * 32), "normalised; this one's are not"),
    ],
)
def test_profile_of_another_base_raises(other: MoeShape, words: str) -> None:
    with pytest.raises(InvalidProfileError, match=words):
        check_profile(of(top_k=1), other)


def test_profile_with_unknown_layers_or_masked_protected_experts_raises() -> None:
    neutral = LayerSteering.of(4)
    with pytest.raises(
        InvalidProfileError, match="layer 7: the model has gates in layers 0-2 only"
    ):
        check_profile(SteeringProfile(SHAPE, {7: neutral}), SHAPE)
    masked = {2: LayerSteering.of(4, mask=[0, 0, 0, 1])}
    check_profile(SteeringProfile(SHAPE, masked, {2: (0, 1)}), SHAPE)
    with pytest.raises(InvalidProfileError, match="layer 2: expert 3 is protected"):
        check_profile(SteeringProfile(SHAPE, masked, {2: (0, 3)}), SHAPE)
    with pytest.raises(InvalidProfileError, match="layer 1: expert 4 is protected and not there"):
        check_profile(SteeringProfile(SHAPE, {}, {1: (4,)}), SHAPE)


def test_read_profile_of_other_files_raises(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(InvalidProfileError, match=r"p.safetensors: can't be read"):
        read_profile(path)
    path.write_bytes(b"no such thing at all")
    with pytest.raises(InvalidProfileError, match="not a safetensors file"):
        read_profile(path)
    save_file({"layers.0.mask": np.zeros(4, np.uint8)}, path)
    with pytest.raises(InvalidProfileError, match="its format is None"):
        read_profile(path)
    meta = {"format": "coe.steering/1"}
    save_file({}, path, meta)
    with pytest.raises(InvalidProfileError, match="its metadata is damaged: 'shape'"):
        read_profile(path)
    write_profile(of(), path)
    fields = {"format": "coe.steering/1", "shape": json.dumps(_shape())}
    for tensors, words in (
        ({"layers.0.weight": np.zeros(4, np.float32)}, "'layers.0.weight' is no part"),
        ({"layers.0.mask": np.zeros(4, np.float32)}, "layer 0: mask is float32"),
        ({"layers.0.top_k": np.zeros(1, np.int32)}, r"layer 0: top_k is int32 \(1,\)"),
    ):
        save_file(tensors, path, fields)
        with pytest.raises(InvalidProfileError, match=words):
            read_profile(path)


def _shape() -> dict[str, Any]:
    return {"layers": [0], "experts": 4, "top_k": 2, "renormalize": True, "gates": "00"}


def test_steer_boosted_weights_are_not_renormalised() -> None:
    logits = np.log(np.array([[4.0, 2.0, 1.0, 1.0]]))
    weights, ids = steer(logits, LayerSteering.of(4, boost=[3, 1, 1, 1]), SHAPE)
    assert ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(weights, [[2.0, 1 / 3]], rtol=1e-6)


def test_steer_top_p_keeps_at_least_one_expert() -> None:
    weights, ids = steer(np.zeros((1, 4)), LayerSteering.of(4, top_p=1e-3), SHAPE)
    assert ids.tolist() == [[0, 1]]
    assert weights.tolist() == [[1.0, 0.0]]
