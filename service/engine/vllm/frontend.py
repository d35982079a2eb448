"""What of an engine an expert's own OpenAI layer sees, and when two experts need not have two.

All prompts go through it, of every endpoint: here they get the salt that keeps tenants apart in
the engine's prefix cache, and vLLM's ids of a call's requests are noted, which its layer makes up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from service.engine.cache_salt import CACHE_SALT, salted
from service.models.file_version import files_in

# vLLM's ids of the requests of the call that is worked on in this task and those it starts.
REQUEST_IDS: ContextVar[list[str] | None] = ContextVar("request_ids", default=None)
# Files of a model's folder that say nothing of how text becomes tokens and back: its weights, and
# what people read. All others count, whatever they are called: tokenizers have many forms.
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
# In JSON of Hugging Face: who wrote it, and what the weights are stored as.
_NEUTRAL_KEYS = frozenset(
    {"_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype"}
)
_CONFIGS = ("config.json", "generation_config.json")


class EngineClient:
    """The engine client as one expert's OpenAI layer sees it: its own config and renderer."""

    def __init__(self, llm: Any, vllm_config: Any, renderer: Any) -> None:
        self._llm = llm
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer

    def generate(self, prompt: Any, *args: Any, **more: Any) -> Any:
        """As the engine's, with the request's salt."""
        _note(args, more)
        return self._llm.generate(salted(prompt, CACHE_SALT.get()), *args, **more)

    def encode(self, prompt: Any, *args: Any, **more: Any) -> Any:
        """As the engine's, with the request's salt."""
        _note(args, more)
        return self._llm.encode(salted(prompt, CACHE_SALT.get()), *args, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)


def _note(args: Sequence[Any], more: Mapping[str, Any]) -> None:
    """Remember vLLM's id of a request; it comes second after the prompt, or by name."""
    if (ids := REQUEST_IDS.get()) is not None:
        ids.append(str(more["request_id"] if "request_id" in more else args[1]))


def tokenizer_digest(folder: str) -> str:
    """The same for folders whose text becomes tokens, and back, in the same way.

    Rather two for what is the same than one for what is not: then an expert has an OpenAI layer and
    a tokenizer of its own, which costs memory. Raises OSError where a file can't be read.
    """
    root = Path(folder)
    digest = hashlib.sha256()
    for path in files_in(root):
        name = path.relative_to(root).as_posix()
        told = name.lower()
        if told.endswith((*_WEIGHTS, *_FOR_PEOPLE)) or told.startswith(("license", "notice")):
            continue
        digest.update(name.encode() + b"\0" + _contents(path))
    return digest.hexdigest()


def _contents(path: Path) -> bytes:
    with path.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").digest()
    if path.name not in _CONFIGS:
        return whole
    try:
        told = json.loads(path.read_bytes())
    except ValueError:
        return whole
    if not isinstance(told, dict):
        return whole
    kept = {key: value for key, value in told.items() if key not in _NEUTRAL_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).digest()
