"""The parts of the multilingual table's making."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from router_models.multilingual_table import (
    directions,
    make,
    small_tokenizer,
    token_vectors,
    wanted,
)
from service.errors import ArtifactError
from service.models.use_conversion import PARTS, convert
from tests.unit.models.test_use_conversion import PIECES, sentencepiece, weights


@pytest.mark.parametrize(
    ("piece", "kept"),
    [
        ("▁law", True),
        ("法律", True),
        ("▁право", True),
        ("ß", True),
        ("▁Law", False),
        ("ÄB", False),
        ("▁법", False),
        ("กฎ", False),
        ("a법", False),
    ],
)
def test_wanted_keeps_lower_case_in_the_scripts_of_the_router(piece: str, kept: bool) -> None:
    assert wanted(piece) == kept


def test_token_vectors_have_length_one_and_the_encoder_s_directions(tmp_path: Path) -> None:
    arrays = weights()
    np.savez(tmp_path / "weights.npz", **arrays)  # type: ignore[arg-type]
    (tmp_path / "sp.model").write_bytes(sentencepiece())
    model = tmp_path / "model.onnx"
    convert(tmp_path / "weights.npz", tmp_path / "sp.model", model, tmp_path / "tokenizer.json")
    found = token_vectors(model)
    assert len(found) == len(PIECES)
    for token, vector in enumerate(found):
        part = token % PARTS
        raw = arrays[f"q{part + 1}"][token // PARTS] * arrays["scale"][part] + arrays["lo"][part]
        assert np.allclose(vector, raw / np.linalg.norm(raw), atol=1e-5)


def test_directions_are_orthonormal_and_hold_what_tells_labels_apart() -> None:
    draw = np.random.default_rng(2)
    y = draw.integers(0, 3, 600)
    x = draw.normal(0, 1.0, (600, 20))
    x[:, :2] *= 0.2  # little variance, and all that tells
    x[:, 0] += 0.6 * (y == 0)
    x[:, 1] += 0.6 * (y == 1)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    found = directions(x, np.eye(3)[y], np.ones(600), 6)
    assert found.shape == (20, 6)
    assert np.allclose(found.T @ found, np.eye(6), atol=1e-4)
    assert float((found[:2, :2] ** 2).sum()) > 1.5  # both of the two telling directions


def test_small_tokenizer_numbers_what_is_left_anew() -> None:
    pieces = [["<unk>", 0], ["<s>", 0], ["</s>", 0], ["x1", 0], ["x2", 0], ["x3", 0]]
    pieces += [["▁a", -1.0], ["▁A", -2.0], ["▁법", -3.0], ["b", -4.0]]
    document = {
        "model": {"vocab": pieces},
        "normalizer": {"type": "Lowercase"},
        "post_processor": {"type": "x"},
        "added_tokens": [{"id": 1}],
    }
    small, kept = small_tokenizer(document)
    assert kept.tolist() == [0, 6, 9]
    assert [piece for piece, _ in small["model"]["vocab"]] == ["<unk>", "▁a", "b"]
    assert small["normalizer"] == {"type": "Lowercase"}
    assert small["post_processor"] is None
    assert document["post_processor"] is not None


def test_make_of_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no ONNX model"):
        make(tmp_path, None, tmp_path / "out", 72)
