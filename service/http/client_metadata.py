"""Metadata that clients attach to objects that are kept for them."""

from __future__ import annotations

from service.errors import InvalidRequestError

_MAX_PAIRS, _MAX_KEY, _MAX_VALUE = 16, 64, 512


def check_metadata(given: object) -> dict[str, str] | None:
    """Check a body's `metadata`.

    Raises:
        InvalidRequestError: It is too large, or has other values than texts.
    """
    if given is None:
        return None
    fits = isinstance(given, dict) and len(given) <= _MAX_PAIRS
    if not fits or not all(
        isinstance(value, str) and len(name) <= _MAX_KEY and len(value) <= _MAX_VALUE
        for name, value in given.items()  # type: ignore[attr-defined]  # it is a dict by now
    ):
        raise InvalidRequestError(
            f"`metadata` must be an object of at most {_MAX_PAIRS} texts of at most {_MAX_VALUE} "
            f"characters, under names of at most {_MAX_KEY}",
            param="metadata",
        )
    return dict(given)  # type: ignore[call-overload, no-any-return]
