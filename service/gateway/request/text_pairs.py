"""Checks the pairs of texts that rerank and score read, and gives them one form. Pure.

Rerank has a query and documents. Score has two texts, or a text and a list, or two lists of one
length. vLLM knows the fields of score by several names; engines get `text_1` and `text_2`, which
all releases know.
"""

from __future__ import annotations

from typing import Any

from service.errors import InvalidRequestError
from service.http.prompt_endpoints import TABLE

_OWN = ("text_1", "text_2")
# Other names of them.
_PAIRS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
_NAMES = frozenset(name for names in (_OWN, *_PAIRS) for name in names)
_TOP_N = "top_n"


def with_usual_names(endpoint: str, data: dict[str, Any]) -> bool:
    """Give the fields of a request for scores the names `text_1` and `text_2`.

    Args:
        endpoint: Its path.
        data: Its body, which changes.

    Returns:
        Whether the body has changed.

    Raises:
        InvalidRequestError: It has names of several pairs. Engines would choose one of them, and
            not the one that was checked and counted.
    """
    if endpoint != "/v1/score":
        return False
    given = _NAMES & data.keys()
    for names in _PAIRS:
        if given == {*names}:
            data["text_1"], data["text_2"] = (data.pop(name) for name in names)
            return True
    if further := sorted(given.difference(_OWN)):
        pairs = ", ".join(f"`{first}` and `{second}`" for first, second in (_OWN, *_PAIRS))
        raise InvalidRequestError(
            f"`{further[0]}` can't be had with the other fields of this request; give one of the "
            f"pairs {pairs}",
            param=further[0],
        )
    return False


def without_top_n_of_all(endpoint: str, data: dict[str, Any]) -> bool:
    """Check `top_n` of a request to rank, and leave out a 0, which means all documents in vLLM.

    Other servers would return none for 0.

    Args:
        endpoint: Its path.
        data: Its body, which changes.

    Returns:
        Whether the body has changed.

    Raises:
        InvalidRequestError: It is no integer, or negative.
    """
    if endpoint != "/v1/rerank" or _TOP_N not in data:
        return False
    given = data[_TOP_N]
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise InvalidRequestError(
            f"`{_TOP_N}` must be an integer from 1 on, or 0 for all documents", param=_TOP_N
        )
    if given == 0:
        del data[_TOP_N]
    return given == 0


def repeated_bytes(endpoint: str, data: dict[str, Any]) -> int:
    """Check the texts of a request for ranks or scores, and count what is read more than once.

    A model that reads pairs reads the query once for each document.

    Args:
        endpoint: Its path.
        data: Its body, whose prompt has the right type.

    Returns:
        Bytes of the query, for each document but the first; 0 for other endpoints.

    Raises:
        InvalidRequestError: A text is missing or is none, or the texts form no pairs.
    """
    first, second = TABLE[endpoint].beside, TABLE[endpoint].prompt
    if not first:
        return 0
    if first not in data:
        raise InvalidRequestError(f"`{first}` is required", param=first)
    left = _texts(first, data[first], alone=endpoint == "/v1/rerank")
    right = _texts(second, data[second])
    if len(left) not in (1, len(right)):
        raise InvalidRequestError(
            f"`{first}` holds {len(left)} texts and `{second}` holds {len(right)}; give one text "
            f"in `{first}`, or as many as in `{second}`",
            param=first,
        )
    return len(left[0].encode("utf-8", "replace")) * (len(right) - 1) if len(left) == 1 else 0


def _texts(name: str, given: object, *, alone: bool = False) -> list[str]:
    texts: list[Any] = given if isinstance(given, list) and not alone else [given]
    if not texts:
        raise InvalidRequestError(f"`{name}` must hold at least one text", param=name)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            where = f"{name}[{i}]" if isinstance(given, list) and not alone else name
            raise InvalidRequestError(f"`{where}` must be a string", param=where)
    return texts
