"""A sentence encoder on ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from service.encoder.onnx_encoder import OnnxEncoder
from service.errors import ArtifactError
from tests.support.tiny_encoder import make_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> OnnxEncoder:
    return OnnxEncoder(make_encoder(tmp_path_factory.mktemp("encoder")))


def test_encode_batch_of_different_lengths_equals_each_text_alone(encoder: OnnxEncoder) -> None:
    texts = ["court", "how do i bake lasagna in my oven", "", "python " * 50, "\ud800 contract"]
    together = encoder.encode(texts)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_encode_long_text_reads_both_ends(tmp_path: Path) -> None:
    encoder = OnnxEncoder(make_encoder(tmp_path), max_tokens=8)
    middle = ["court " * 20 + word * 100 + "recipe " * 20 for word in ("python ", "garlic ")]
    first, second = encoder.encode(middle)
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert len(encoder.token_ids(middle)[0]) == 8


def test_encode_pools_by_the_first_token_where_the_folder_says_so(tmp_path: Path) -> None:
    make_encoder(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    settings = {"pooling_mode_cls_token": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    first, second = OnnxEncoder(tmp_path).encode(["court", "lasagna recipe"])
    np.testing.assert_allclose(first, second, atol=1e-6)  # both begin with [CLS]


def _other_output(folder: Path) -> None:
    """A model whose output has no dimension of tokens or vectors."""
    graph = helper.make_graph(
        [helper.make_node("Cast", ["input_ids"], ["y"], to=TensorProto.FLOAT)],
        "wrong",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "s"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    graph.node.append(helper.make_node("ReduceMean", ["y"], ["z"], keepdims=0))
    graph.output[0].name = "z"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(folder / "model.onnx"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "model.onnx").unlink(), "no ONNX model"),
        (lambda f: (f / "model.onnx").write_bytes(b"\x80\x04pickle"), "can't be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "can't be loaded"),
        (lambda f: (f / "tokenizer.json").unlink(), "can't be loaded"),
        (_other_output, "shape"),
    ],
)
def test_load_damaged_folder_is_refused_with_the_reason(
    tmp_path: Path, damage: object, said: str
) -> None:
    make_encoder(tmp_path)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=said):
        OnnxEncoder(tmp_path)
