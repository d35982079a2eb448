"""Salts of prompts, which keep tenants apart in an engine's prefix cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

# The salt of the request that this task, or a task started by it, works on.
_CACHE_SALT: ContextVar[str] = ContextVar("cache_salt", default="")


def set_cache_salt(salt: str) -> None:
    """Set the salt of the request that this task, and tasks that it starts, work on."""
    _CACHE_SALT.set(salt)


def cache_salt() -> str:
    """Return the salt of the request that this task works on; empty without one."""
    return _CACHE_SALT.get()


def with_salt(prompt: Any, salt: str) -> Any:
    """Put a salt into a prompt, so that only requests with the same salt share its cached blocks.

    A client's own salt divides a tenant's cache further. It never joins the caches of two tenants.

    Args:
        prompt: A prompt in any of vLLM's forms.
        salt: The tenant's salt. An empty salt leaves the prompt unchanged.

    Raises:
        TypeError: The form of the prompt is unknown. Such a prompt must not run without its salt.
    """
    if not salt:
        return prompt
    if isinstance(prompt, str):
        return {"prompt": prompt, "cache_salt": salt}
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt, "cache_salt": salt}
    if isinstance(prompt, Mapping):
        changed = {**prompt, "cache_salt": combine_salts(salt, prompt.get("cache_salt"))}
        # In a model with an encoder, the blocks of the decoder are cached.
        for part in ("decoder_prompt", "encoder_prompt"):
            if prompt.get(part) is not None:
                changed[part] = with_salt(prompt[part], salt)
        return changed
    if hasattr(prompt, "cache_salt"):
        prompt.cache_salt = combine_salts(salt, prompt.cache_salt)
        return prompt
    raise TypeError(f"a prompt of type {type(prompt).__name__} can't be kept apart by tenant")


def combine_salts(salt: str, client_salt: object) -> str:
    """Combine the tenant's salt with the client's salt, if the client has set a salt."""
    if not client_salt:
        return salt
    return hashlib.sha256(f"{salt}\0{client_salt}".encode()).hexdigest()
