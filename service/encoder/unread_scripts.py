"""Tells texts in scripts that a tokeniser does not read, such as Hindi for one of Latin letters.

Their vectors say nothing: all such texts have nearly the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

UNREAD_SHARE = 0.25
"""A text of which so many tokens are unknown is not read."""
_UNKNOWN = ("<unk>", "[UNK]")


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """Return the number of the token that stands for all that a tokeniser does not know."""
    found = (tokenizer.token_to_id(name) for name in _UNKNOWN)
    return next((number for number in found if number is not None), None)


def is_unread(text: str, ids: Sequence[int], unknown: int | None) -> bool:
    """Whether too many of a text's tokens are unknown. Every tokeniser reads ASCII."""
    if unknown is None or text.isascii() or not ids:
        return False
    return ids.count(unknown) >= UNREAD_SHARE * len(ids)
