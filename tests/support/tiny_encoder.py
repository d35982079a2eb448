"""A sentence encoder of a few kilobytes: random vectors of words, and ONNX around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SUBJECTS = {
    "law": "court contract lawyer crime judge sue tenant landlord custody patent statute appeal",
    "food": "recipe lasagna bake oven flour sugar soup dinner garlic roast noodles sauce",
    "code": "python function loop compile regex array bug thread class method import pointer",
}
"""Words of one subject have like vectors, so that there is something to tell apart."""

OTHERS = "the a of to is how what do i my for in and me give write please about"


def vocabulary() -> dict[str, int]:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *OTHERS.split()]
    words += [word for words_of in SUBJECTS.values() for word in words_of.split()]
    return {word: i for i, word in enumerate(words)}


def make_encoder(folder: Path, dims: int = 12, seed: int = 0) -> Path:
    """Write a tiny encoder into `folder`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    known = vocabulary()
    draw = np.random.default_rng(seed)
    table = draw.normal(size=(len(known), dims)).astype(np.float32) * 0.1
    for subject in SUBJECTS.values():
        table[[known[word] for word in subject.split()]] += draw.normal(size=dims)
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])],
        "tiny",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "s"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["b", "s", dims])],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(folder / "model.onnx"))
    return folder


def prompts(subject: str, count: int, seed: int = 0) -> list[str]:
    """Different prompts of a subject."""
    draw = np.random.default_rng([seed, *subject.encode()])
    words, others = SUBJECTS[subject].split(), OTHERS.split()
    found: list[str] = []
    while len(found) < count:
        text = " ".join([*draw.choice(others, 3), *draw.choice(words, 3)])
        if text not in found:
            found.append(text)
    return found
