"""Compares the tokenizers, chat templates and configs of experts by a digest.

Experts whose digests are equal share one tokenizer in the process.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from service.models.weights_version import files_in

# Weights and documentation do not change tokenization. All other files count, whatever their names,
# because tokenizers have many formats.
_WEIGHTS = (
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
)
_FOR_PEOPLE = (".md", ".pdf", ".png", ".jpg", ".svg")
# Keys of Hugging Face configs that name the author or the dtype of the stored weights.
_NEUTRAL_KEYS = frozenset(
    {"_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype"}
)
_CONFIGS = ("config.json", "generation_config.json")


def tokenizer_digest(folder: str) -> str:
    """Compute the digest of the files that define tokenization in both directions.

    Equal digests mean equal tokenization. Different digests may also mean equal tokenization. The
    expert then gets its own OpenAI layer and tokenizer, which costs memory but is correct.

    Args:
        folder: A model's folder.

    Returns:
        A SHA-256 digest in hexadecimal.

    Raises:
        OSError: A file can't be read.
    """
    root = Path(folder)
    digest = hashlib.sha256()
    for path in files_in(root):
        name = path.relative_to(root).as_posix()
        lower = name.lower()
        if lower.endswith((*_WEIGHTS, *_FOR_PEOPLE)) or lower.startswith(("license", "notice")):
            continue
        digest.update(name.encode() + b"\0" + _file_digest(path))
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    """Compute the digest of a file. The neutral keys of a config do not count."""
    with path.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").digest()
    if path.name not in _CONFIGS:
        return whole
    try:
        config = json.loads(path.read_bytes())
    except ValueError:
        return whole
    if not isinstance(config, dict):
        return whole
    kept = {key: value for key, value in config.items() if key not in _NEUTRAL_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).digest()
