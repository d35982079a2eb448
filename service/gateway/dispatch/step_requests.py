"""The requests of a recipe's later steps: reviews, revised answers, and the aggregator's. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson

from service.broker.peer_review import MAX_CORRECTION_CHARS
from service.broker.prompt_fences import shown_bytes
from service.gateway.request.conversation_text import media_parts, with_last_message
from service.gateway.request.conversation_turns import TurnState
from service.gateway.request.parsing import InferenceRequest
from service.types import Recipe

LEAST_TOKENS = 16
"""A step whose calls may not be this long is not taken."""
# Bytes of a title, two marks and the line breaks around them.
_FENCE_BYTES = 128


def review_request(
    request: InferenceRequest, prompt: str, most_tokens: int, *, greedy: bool
) -> InferenceRequest:
    """Return the request that asks for a review.

    It has nothing of the client's body but images and sounds: forms of answers, stops and samplings
    are for the answer.

    Args:
        request: The client's request, as it is sent to one member.
        prompt: The prompt for the reviewer.
        most_tokens: The bound of the review.
        greedy: Whether the expert takes a temperature of 0; some endpoints refuse any temperature.
            Without it, the expert's own default holds.
    """
    thinking = request.thinking
    if thinking.budget_tokens is not None:
        # The client's budget is for an answer. A review that is all thinking tells nothing.
        least = max(1, min(thinking.budget_tokens, most_tokens // 2))
        thinking = replace(thinking, budget_tokens=least)
    media = media_parts(request.data)
    content: Any = [{"type": "text", "text": prompt}, *media] if media else prompt
    data: dict[str, Any] = {
        "model": request.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": most_tokens,
    }
    if greedy:
        data["temperature"] = 0.0
    return replace(
        request,
        data=data,
        raw=b"",
        needs=(request.needs - {"json"}) | {"chat"},
        body_bytes=len(orjson.dumps(data)),
        clipped=None,
        thinking=thinking,
        # Its prompt is no turn of the conversation, and leaves nothing of it in a prefix cache.
        turn=TurnState(),
    )


def shown_bytes_of(recipe: Recipe, most_tokens: int | None) -> int:
    """The most bytes that a call of a recipe adds to the prompt: template, answers, corrections.

    Args:
        recipe: The recipe.
        most_tokens: The bound of each answer; None without one.
    """
    answer = shown_bytes(most_tokens) + _FENCE_BYTES
    others = len(recipe.members) - 1
    if (settings := recipe.deliberation) is not None:
        review = len(settings.review.encode()) + others * answer
        correction = 4 * MAX_CORRECTION_CHARS + _FENCE_BYTES
        revised = len(settings.revise.encode()) + answer + others * correction
        return max(review, revised)
    if recipe.recruitment is not None:
        return len(recipe.recruitment.prompt.encode()) + recipe.recruitment.k * answer
    return 0


def revised_request(request: InferenceRequest, prompt: str) -> InferenceRequest:
    """Return a request whose last message also has what other experts answered.

    Args:
        request: The request.
        prompt: The text that is added.
    """
    return replace(
        request,
        data={**request.data, "messages": with_last_message(request.data, prompt)},
        raw=b"",
        body_bytes=request.body_bytes + len(orjson.dumps(prompt)) + 64,
        combinable=False,
    )
