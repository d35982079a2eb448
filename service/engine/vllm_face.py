"""What of an engine an expert's own OpenAI layer sees, and when two experts need not have two.

All prompts go through it, of every endpoint: here they get the salt that keeps tenants apart in
the engine's prefix cache.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from service.engine.salting import CACHE_SALT, salted

# What decides how text becomes tokens and back.
_FACE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class EngineClient:
    """The engine client as one expert's OpenAI layer sees it: its own config and renderer."""

    def __init__(self, llm: Any, vllm_config: Any, renderer: Any) -> None:
        self._llm = llm
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer

    def generate(self, prompt: Any, *args: Any, **more: Any) -> Any:
        """As the engine's, with the request's salt."""
        return self._llm.generate(salted(prompt, CACHE_SALT.get()), *args, **more)

    def encode(self, prompt: Any, *args: Any, **more: Any) -> Any:
        """As the engine's, with the request's salt."""
        return self._llm.encode(salted(prompt, CACHE_SALT.get()), *args, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)


def face_digest(folder: str) -> str:
    """The same for folders whose text becomes tokens, and back, in the same way."""
    digest = hashlib.sha256()
    for name in _FACE_FILES:
        path = Path(folder) / name
        digest.update(name.encode() + b"\0")
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
