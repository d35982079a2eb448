"""Reads what a request says about thinking, in the fields of any API.

| field | from |
| --- | --- |
| `reasoning_effort` | OpenAI's chat completions |
| `reasoning.effort` | OpenAI's Responses |
| `thinking`, `output_config.effort` | Anthropic's Messages |
| `enable_thinking` | Qwen's API |
| `chat_template_kwargs`: `enable_thinking`, `thinking`, `reasoning_effort` | chat templates |
| `thinking_token_budget` | vLLM |

Every endpoint that applies a chat template takes all of them. Fields that contradict each other
are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from service.errors import InvalidRequestError
from service.http.prompt_endpoints import TABLE

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Arguments of chat templates: `enable_thinking` of Qwen's and GLM's, `thinking` of DeepSeek's.
SWITCHES = ("enable_thinking", "thinking")
ARGUMENTS = "chat_template_kwargs"
BUDGET = "thinking_token_budget"
_TYPES = {"enabled": True, "disabled": False, "adaptive": None}
_FIELDS = ("reasoning_effort", "thinking", "enable_thinking", BUDGET)
_NESTED = ("reasoning", "output_config")
# The least budget that Anthropic's API accepts.
LEAST_ANTHROPIC = 1024
# What no model generates; a larger number is a mistake.
_MOST_TOKENS = 2**31


@dataclass(frozen=True, slots=True)
class ThinkingTerms:
    """What a request says about thinking.

    Attributes:
        enabled: Whether the expert has to think; None leaves it open.
        effort: The effort, one of `EFFORTS`; None without one.
        budget_tokens: Most tokens of thinking of each answer; None without a bound.
        fields: The fields that say so, as errors name them.
    """

    enabled: bool | None = None
    effort: str | None = None
    budget_tokens: int | None = None
    fields: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.fields)


NO_TERMS = ThinkingTerms()


@dataclass(frozen=True, slots=True)
class _Said:
    """What one field says."""

    field: str
    enabled: bool | None = None
    effort: str | None = None
    budget_tokens: int | None = None


def thinking_terms(endpoint: str, data: Mapping[str, Any]) -> ThinkingTerms:
    """Read what a body says about thinking.

    Args:
        endpoint: The request's path.
        data: The body, without nulls at its top level.

    Raises:
        InvalidRequestError: A field is not valid, or two contradict each other, or the endpoint
            applies no chat template, so that the field has no meaning there.
    """
    said = list(_said(data))
    if not said:
        return NO_TERMS
    if TABLE[endpoint].needs != "chat" and endpoint != "/tokenize":
        for one in said:
            if one.field != BUDGET or not TABLE[endpoint].generates:
                raise InvalidRequestError(
                    f"`{one.field}` is for chat: {endpoint} applies no chat template",
                    param=one.field,
                )
    enabled = _only(said, "enabled")
    effort = _only(said, "effort")
    budget = _only(said, "budget_tokens")
    if budget is not None and endpoint != "/v1/completions":
        _check_room(endpoint, data, said, budget)
    return ThinkingTerms(enabled, effort, budget, tuple(one.field for one in said))


def _said(data: Mapping[str, Any]) -> Iterator[_Said]:
    if "reasoning_effort" in data:
        yield _of_effort("reasoning_effort", data["reasoning_effort"])
    for name in _NESTED:
        section = data.get(name)
        if isinstance(section, dict) and section.get("effort") is not None:
            effort = _of_effort(f"{name}.effort", section["effort"])
            # Anthropic's effort is also that of answers without thinking.
            yield effort if name == "reasoning" else _Said(effort.field, effort=effort.effort)
    if "thinking" in data:
        yield _of_thinking(data["thinking"])
    if "enable_thinking" in data:
        yield _of_switch("enable_thinking", data["enable_thinking"])
    arguments = data.get(ARGUMENTS)
    if isinstance(arguments, dict):
        for name in SWITCHES:
            if arguments.get(name) is not None:
                yield _of_switch(f"{ARGUMENTS}.{name}", arguments[name])
        if arguments.get("reasoning_effort") is not None:
            yield _of_effort(f"{ARGUMENTS}.reasoning_effort", arguments["reasoning_effort"])
    if BUDGET in data and data[BUDGET] != -1:  # vLLM's word for no bound
        budget = _tokens(BUDGET, data[BUDGET], least=0)
        # No token of thinking is another word for none.
        yield _Said(BUDGET, enabled=None if budget else False, budget_tokens=budget or None)


def _of_effort(field: str, value: object) -> _Said:
    if not isinstance(value, str) or value not in EFFORTS:
        raise InvalidRequestError(f"`{field}` must be one of {', '.join(EFFORTS)}", param=field)
    return _Said(field, enabled=value != "none", effort=value)


def _of_switch(field: str, value: object) -> _Said:
    if not isinstance(value, bool):
        raise InvalidRequestError(f"`{field}` must be true or false", param=field)
    return _Said(field, enabled=value)


def _of_thinking(value: object) -> _Said:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str) or kind not in _TYPES:
        raise InvalidRequestError(
            "`thinking` must be an object whose `type` is enabled, disabled or adaptive",
            param="thinking",
        )
    given = value.get("budget_tokens")
    if given is not None and kind != "enabled":
        raise InvalidRequestError(
            f"`thinking.budget_tokens` needs the type enabled, not {kind}",
            param="thinking.budget_tokens",
        )
    budget = None if given is None else _tokens("thinking.budget_tokens", given, least=1)
    return _Said("thinking", enabled=_TYPES[kind], budget_tokens=budget)


def _tokens(field: str, value: object, *, least: int) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= _MOST_TOKENS:  # type: ignore[operator]  # an int here
        unbounded = ", or -1 for no bound" if field == BUDGET else ""
        raise InvalidRequestError(
            f"`{field}` must be an integer of at least {least}{unbounded}", param=field
        )
    return value  # type: ignore[return-value]  # checked above


def _only(said: list[_Said], name: str) -> Any:
    """What the fields say of one thing; None where none says any.

    Raises:
        InvalidRequestError: Two fields say different things.
    """
    first: _Said | None = None
    for one in said:
        value = getattr(one, name)
        if value is None:
            continue
        if first is not None and getattr(first, name) != value:
            raise InvalidRequestError(
                f"`{first.field}` and `{one.field}` contradict each other", param=one.field
            )
        first = first or one
    return None if first is None else getattr(first, name)


def _check_room(endpoint: str, data: Mapping[str, Any], said: list[_Said], budget: int) -> None:
    """Refuse a budget that leaves no token for the answer. Both count against its bound."""
    field = next(one.field for one in said if one.budget_tokens is not None)
    where = "thinking.budget_tokens" if field == "thinking" else field
    for name in TABLE[endpoint].lengths:
        bound = data.get(name)
        if isinstance(bound, int) and 0 < bound <= budget:
            raise InvalidRequestError(
                f"`{where}` must be less than `{name}` ({bound}): thinking counts against it",
                param=where,
            )


def fitting_thinking(data: Mapping[str, Any], most_tokens: int) -> dict[str, Any]:
    """Return Anthropic's field for a lower bound of the answer; empty where it fits as it is.

    Anthropic's API refuses a budget that is not less than the bound, or less than 1,024.
    """
    thinking = data.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
    if not isinstance(thinking, dict) or not isinstance(budget, int) or budget < most_tokens:
        return {}
    if most_tokens <= LEAST_ANTHROPIC:
        return {"thinking": {"type": "disabled"}}
    return {"thinking": {**thinking, "budget_tokens": most_tokens - 1}}


def without_thinking_fields(data: dict[str, Any], *, arguments: bool) -> dict[str, Any]:
    """Return a body without the fields that `thinking_terms` reads.

    Args:
        data: The body.
        arguments: Whether to remove those of the chat template as well.
    """
    kept = {name: value for name, value in data.items() if name not in _FIELDS}
    inner: dict[str, tuple[str, ...]] = dict.fromkeys(_NESTED, ("effort",))
    if arguments:
        inner[ARGUMENTS] = (*SWITCHES, "reasoning_effort")
    for outer, names in inner.items():
        section = kept.get(outer)
        if not isinstance(section, dict) or section.keys().isdisjoint(names):
            continue
        rest = {name: value for name, value in section.items() if name not in names}
        if rest:
            kept[outer] = rest
        else:
            del kept[outer]
    return kept
