"""What keeps tenants apart in a prefix cache: the salt of a request, put into its prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

# The salt of the request that is being worked on, in this task and those it starts.
CACHE_SALT: ContextVar[str] = ContextVar("cache_salt", default="")


def with_salt(prompt: Any, salt: str) -> Any:
    """A prompt of vLLM's, whichever form it has, whose blocks only the same salt finds again.

    A salt that the client gave divides further; it never brings two of ours together.
    Raises TypeError for a form that is not known: it must not go unsalted.
    """
    if not salt:
        return prompt
    if isinstance(prompt, str):
        return {"prompt": prompt, "cache_salt": salt}
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt, "cache_salt": salt}
    if isinstance(prompt, Mapping):
        given = {**prompt, "cache_salt": combine_salts(salt, prompt.get("cache_salt"))}
        # Models with an encoder: the decoder's blocks are the ones that are cached.
        for part in ("decoder_prompt", "encoder_prompt"):
            if prompt.get(part) is not None:
                given[part] = with_salt(prompt[part], salt)
        return given
    if hasattr(prompt, "cache_salt"):
        prompt.cache_salt = combine_salts(salt, prompt.cache_salt)
        return prompt
    raise TypeError(f"a prompt of type {type(prompt).__name__} can't be kept apart by tenant")


def combine_salts(salt: str, client_s: object) -> str:
    """One salt of the tenant's and, where it gave one, the client's."""
    if not client_s:
        return salt
    return hashlib.sha256(f"{salt}\0{client_s}".encode()).hexdigest()
