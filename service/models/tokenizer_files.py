"""Finds a model folder's tokenizer and chat template by its files alone."""

from __future__ import annotations

from pathlib import Path

from service.errors import ModelStoreError
from service.models.model_config import read_json

# A tokenizer's vocabulary is in one of these files. Other files only describe it.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model*",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
)
# Mistral's own tokenizers bring their templates with them.
_WITH_TEMPLATE = ("tekken.json", "tokenizer.model.v*")


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder has a vocabulary in a known format."""
    return any(_is_there(folder, pattern) for pattern in _VOCABULARIES)


def has_chat_template(folder: Path) -> bool:
    """Return whether the folder has a chat template in a place that transformers reads.

    Raises:
        ModelStoreError: A file that may hold the template can't be read.
    """
    if any(_is_there(folder, pattern) for pattern in _WITH_TEMPLATE):
        return True
    if _is_there(folder, "chat_template.jinja") or _is_there(folder, "chat_templates/*.jinja"):
        return True
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        path = folder / name
        if path.is_file() and read_json(path).get("chat_template"):
            return True
    return False


def _is_there(folder: Path, pattern: str) -> bool:
    try:
        return any(path.is_file() for path in folder.glob(pattern))
    except OSError as error:
        raise ModelStoreError(f"{folder}: can't be read: {error.strerror or error}") from error
