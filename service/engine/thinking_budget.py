"""The most tokens of thinking of a request, where vLLM's API has no field for it.

vLLM's chat completions and completions have `thinking_token_budget`. Its Responses and Messages
have no such field, or take no small budgets, so that the engine's client sets the budget there.
"""

from __future__ import annotations

from contextvars import ContextVar

import orjson

FIELD = "thinking_token_budget"
_WITHOUT_FIELD = frozenset({"/v1/responses", "/v1/messages"})

# The budget of the request that this task, or a task started by it, works on.
_BUDGET: ContextVar[int | None] = ContextVar("thinking_budget", default=None)


def set_thinking_budget(endpoint: str, body: bytes) -> None:
    """Set the budget of the request that this task, and tasks that it starts, work on.

    Args:
        endpoint: The request's path.
        body: Its body. The gateway has checked the budget in it.
    """
    _BUDGET.set(_budget_in(body) if endpoint in _WITHOUT_FIELD else None)


def thinking_budget() -> int | None:
    """Return the budget of the request that this task works on; None where vLLM reads it itself."""
    return _BUDGET.get()


def _budget_in(body: bytes) -> int | None:
    if FIELD.encode() not in body:
        return None
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None  # vLLM refuses the body
    budget = data.get(FIELD) if isinstance(data, dict) else None
    return budget if isinstance(budget, int) and budget >= 0 else None
