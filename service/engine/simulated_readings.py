"""What the simulated engine makes of texts that it only reads: scores, ranks and classes.

Shapes are vLLM's. A score is the share of words that two texts have in common, so that documents
that are about the query come first. A class is drawn by the words of a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from service.errors import InvalidRequestError

CLASSES = ("negative", "neutral", "positive")


def tokens_of(text: str) -> int:
    """The tokens of a text: its words, and at least one."""
    return max(1, len(text.split()))


def texts_of(body: dict[str, Any], name: str) -> list[str]:
    """The texts in a field of a body.

    Raises:
        InvalidRequestError: The field holds something else, or nothing.
    """
    given = body.get(name)
    texts: list[Any] = given if isinstance(given, list) else [given]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError(f"`{name}` must be a string or a list of strings", param=name)
    return texts


def likeness(first: str, second: str) -> float:
    """The share of the words of two texts that both have, in [0, 1]."""
    words, others = ({*text.lower().split()} for text in (first, second))
    return len(words & others) / max(1, len(words | others))


def _rank(expert: str, request_id: str, body: dict[str, Any]) -> dict[str, Any]:
    query, documents = texts_of(body, "query")[0], texts_of(body, "documents")
    top_n = body.get("top_n") or len(documents)
    results: list[dict[str, Any]] = [
        {"index": i, "document": {"text": text}, "relevance_score": likeness(query, text)}
        for i, text in enumerate(documents)
    ]
    results.sort(key=lambda result: -result["relevance_score"])
    return {
        "id": f"score-{request_id}",
        "model": expert,
        "usage": _usage([query] * len(documents) + documents),
        "results": results[:top_n],
    }


def _score(expert: str, request_id: str, body: dict[str, Any]) -> dict[str, Any]:
    first, second = texts_of(body, "text_1"), texts_of(body, "text_2")
    first = first * len(second) if len(first) == 1 else first
    if len(first) != len(second):
        raise InvalidRequestError("`text_1` and `text_2` differ in length", param="text_1")
    data = [
        {"index": i, "object": "score", "score": likeness(*pair)}
        for i, pair in enumerate(zip(first, second, strict=True))
    ]
    return {
        "id": f"score-{request_id}",
        "object": "list",
        "model": expert,
        "data": data,
        "usage": _usage(first + second),
    }


def _classify(expert: str, request_id: str, body: dict[str, Any]) -> dict[str, Any]:
    texts = texts_of(body, "input")
    data = []
    for i, text in enumerate(texts):
        digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=len(CLASSES)).digest()
        values = [byte + 1 for byte in digest]
        probs = [value / sum(values) for value in values]
        label = CLASSES[probs.index(max(probs))]
        data.append({"index": i, "label": label, "probs": probs, "num_classes": len(CLASSES)})
    return {
        "id": f"classify-{request_id}",
        "object": "list",
        "model": expert,
        "data": data,
        "usage": _usage(texts),
    }


def _usage(texts: list[str]) -> dict[str, int]:
    count = sum(map(tokens_of, texts))
    return {"prompt_tokens": count, "total_tokens": count}


READINGS: dict[str, Callable[[str, str, dict[str, Any]], dict[str, Any]]] = {
    "/v1/rerank": _rank,
    "/v1/score": _score,
    "/v1/classify": _classify,
}
