"""Puts an expert's defaults into a request, where the request does not set the fields itself.

A system prompt is added only to a request without one. Every endpoint has its own names for the
fields, and lacks some. `thinking_ways` tells the expert how to think.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from service.broker.pool_state import Floats
from service.broker.thinking_lengths import ThinkingWorth
from service.config import Config
from service.config.expert_request_defaults import DefaultsConfig
from service.gateway.request.learned_budgets import LearnedBudgets
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request.thinking_terms import ThinkingTerms
from service.gateway.request.thinking_ways import ThinkingWays
from service.http.prompt_endpoints import TABLE
from service.http.token_usage import estimate_tokens

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
COUNT_TOKENS = "/v1/messages/count_tokens"
INPUT_TOKENS = "/v1/responses/input_tokens"
TOKENIZE = "/tokenize"

Data = dict[str, Any]
# The roles of a system prompt in a list of messages.
_SYSTEM_ROLES = ("system", "developer")
# Arguments of chat templates that a request's own field for reasoning stands for.
_THINKING = ("enable_thinking", "thinking")


@dataclass(frozen=True, slots=True)
class Field:
    """The place of a default in a body.

    Attributes:
        path: The keys that lead to it.
        also: Other keys of the body that set the same, or exclude it.
        convert: Makes the endpoint's form of the value; None for a value that it can't express.
    """

    path: tuple[str, ...]
    also: tuple[str, ...] = ()
    convert: Callable[[Any], Any] = lambda value: value


def _flat_schema(form: Data) -> Data:
    """Convert a response format to that of Responses, which has no inner object."""
    inner = form.get("json_schema", {})
    return {"type": form["type"], **inner}


def _messages_schema(form: Data) -> Data | None:
    """Convert a response format to that of Messages, which has schemas only."""
    if form["type"] == "text":
        return None
    schema = form.get("json_schema", {}).get("schema", {"type": "object"})
    return {"type": "json_schema", "schema": schema}


def _messages_effort(effort: str) -> str | None:
    return {"none": None, "minimal": "low"}.get(effort, effort)


def _same(*names: str) -> dict[str, Field]:
    return {name: Field((name,)) for name in names}


_SAMPLING = _same("temperature", "top_p", "top_k")
_PENALTIES = _same("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")
_ARGUMENTS = _same("chat_template_kwargs")
_FORMAT = {"response_format": Field(("response_format",), also=("structured_outputs",))}

_OF_RESPONSES = {
    **_SAMPLING,
    **_PENALTIES,
    **_ARGUMENTS,
    **_same("stop"),
    "response_format": Field(("text", "format"), ("structured_outputs",), _flat_schema),
    "reasoning_effort": Field(("reasoning", "effort")),
}
# The fields of each endpoint, by the names of defaults; `system` and `max_tokens` stand apart.
FIELDS: Mapping[str, Mapping[str, Field]] = {
    CHAT: {
        **_SAMPLING,
        **_PENALTIES,
        **_ARGUMENTS,
        **_FORMAT,
        **_same("stop", "min_tokens", "reasoning_effort"),
    },
    COMPLETIONS: {**_SAMPLING, **_PENALTIES, **_FORMAT, **_same("stop", "min_tokens")},
    RESPONSES: _OF_RESPONSES,
    INPUT_TOKENS: _OF_RESPONSES,
    MESSAGES: {
        **_SAMPLING,
        **_ARGUMENTS,
        "stop": Field(("stop_sequences",)),
        "response_format": Field(("output_config", "format"), convert=_messages_schema),
        "reasoning_effort": Field(("output_config", "effort"), ("thinking",), _messages_effort),
    },
    COUNT_TOKENS: _ARGUMENTS,
    TOKENIZE: _ARGUMENTS,
}
# The field of each endpoint that holds its system prompt, or the messages that may hold one.
SYSTEM: Mapping[str, str] = {
    CHAT: "messages",
    TOKENIZE: "messages",
    RESPONSES: "instructions",
    INPUT_TOKENS: "instructions",
    MESSAGES: "system",
    COUNT_TOKENS: "system",
}


@dataclass(frozen=True, slots=True)
class AddedPrompt:
    """What the defaults of each expert add to a prompt.

    Attributes:
        tokens: (experts,), the tokens to expect; 0 where no expert adds any.
        most_tokens: (experts,), a bound on them: a text never has more tokens than bytes.
    """

    tokens: Floats | int
    most_tokens: Floats | int


NOTHING_ADDED = AddedPrompt(0, 0)
_NO_DEFAULTS = DefaultsConfig()


class RequestDefaults:
    """The defaults of a config's experts."""

    def __init__(self, config: Config, learned: LearnedBudgets | None = None) -> None:
        """Read a config.

        Args:
            config: The config.
            learned: Learned budgets of thinking; None has none.
        """
        self._learned = learned
        self._defaults = {
            name: expert.defaults
            for name, expert in config.experts.items()
            if expert.defaults is not None
        }
        self._ways = ThinkingWays(config)
        self._adds_system = any(defaults.system is not None for defaults in self._defaults.values())

    def apply(
        self,
        request: InferenceRequest,
        expert: str,
        category: str = "",
        worth: ThinkingWorth | None = None,
    ) -> InferenceRequest:
        """Return a request with an expert's defaults. A second call changes nothing.

        Args:
            request: The request.
            expert: The expert that answers it; any other name, such as `auto`, has no defaults.
            category: The prompt's category; empty where it was not classified.
            worth: What the expert's thinking is worth; None leaves out learned budgets.
        """
        way, defaults = self._ways.get(expert), self._defaults.get(expert)
        if way is None or (defaults is None and way.enabled is None and not request.thinking):
            return request
        defaults = defaults or _NO_DEFAULTS
        data = dict(request.data)
        if system := self._system(request, defaults):
            _add_system(request.endpoint, data, system)
        bounded = request.bounded
        if defaults.max_tokens is not None:
            bounded = _bound(request, data, defaults.max_tokens) or bounded
        most_tokens = replace(request, data=data).most_tokens
        learned = None
        if self._learned is not None and worth is not None:
            learned = self._learned.budget(expert, category, worth)
        data, budget = way.write(request.endpoint, data, request.thinking, most_tokens, learned)
        for name, field in FIELDS.get(request.endpoint, {}).items():
            if name == "reasoning_effort" and _rules_out_effort(request.thinking):
                continue
            if (value := getattr(defaults, name)) is not None:
                _add(data, field, value)
        _lower_least_tokens(request, data)
        if data == request.data and budget == request.thinking_budget:
            return request
        more = len(system.encode())
        return replace(
            request,
            data=data,
            raw=request.raw if data == request.data else b"",
            bounded=bounded,
            body_bytes=request.body_bytes + more,
            thinking_budget=budget,
        )

    def system_bytes(self, request: InferenceRequest, expert: str) -> int:
        """Return the bytes of the system prompt that an expert would add to a request."""
        defaults = self._defaults.get(expert)
        return len(self._system(request, defaults).encode()) if defaults is not None else 0

    def added(self, request: InferenceRequest, experts: Sequence[str]) -> AddedPrompt:
        """Return what each expert's system prompt adds to a request."""
        if not self._adds_system:
            return NOTHING_ADDED
        sizes = [self.system_bytes(request, name) for name in experts]
        return AddedPrompt(
            np.array([estimate_tokens(size) for size in sizes], dtype=np.float64),
            np.array(sizes, dtype=np.float64),
        )

    def saved_thinking(
        self, request: InferenceRequest, experts: Sequence[str], category: str
    ) -> Floats | None:
        """Return what a request's budget of thinking saves of each expert's expected tokens."""
        budget = request.thinking.budget_tokens
        if budget is None or self._learned is None:
            return None
        return np.array([self._learned.excess(name, category, budget) for name in experts])

    @staticmethod
    def _system(request: InferenceRequest, defaults: DefaultsConfig) -> str:
        """Return the system prompt to add; empty where there is one, or can't be one."""
        field = SYSTEM.get(request.endpoint)
        if defaults.system is None or field is None or _has_system(request.data, field):
            return ""
        return defaults.system


def _rules_out_effort(terms: ThinkingTerms) -> bool:
    return terms.enabled is False or "thinking" in terms.fields


def _has_system(data: Data, field: str) -> bool:
    if field == "messages":
        # Only /tokenize can lack messages, and then takes a plain text.
        return field not in data or _has_system_message(data[field])
    return field in data or (field == "instructions" and _has_system_message(data.get("input")))


def _has_system_message(messages: object) -> bool:
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("role") in _SYSTEM_ROLES for message in messages
    )


def _add_system(endpoint: str, data: Data, system: str) -> None:
    field = SYSTEM[endpoint]
    if field == "messages":
        data[field] = [{"role": "system", "content": system}, *data[field]]
    else:
        data[field] = system


def _add(data: Data, field: Field, value: Any) -> None:
    """Set a field to a default where the body does not set it."""
    *outer, name = field.path
    if any(other in data for other in field.also):
        return
    value = list(value) if isinstance(value, tuple) else field.convert(value)
    holder: Any = data
    for key in outer:
        holder = holder.get(key, {})
        if not isinstance(holder, dict):
            return  # the engine says what is wrong with it
    if name == "chat_template_kwargs":
        value = _merged(data, value)
    elif holder.get(name) is not None:
        return
    if value is None:
        return
    if outer:
        data[outer[0]] = {**holder, name: value}
    else:
        data[name] = value


def _merged(data: Data, defaults: Data) -> Data | None:
    """Merge arguments of the chat template. What the request asks for itself stays."""
    given = data.get("chat_template_kwargs", {})
    if not isinstance(given, dict):
        return None
    nested = (data.get("reasoning"), data.get("output_config"))
    efforts = [
        section["effort"] for section in nested if isinstance(section, dict) and "effort" in section
    ]
    if "reasoning_effort" in data or "thinking" in data or efforts:
        defaults = {name: value for name, value in defaults.items() if name not in _THINKING}
    return {**defaults, **given} or None


def _bound(request: InferenceRequest, data: Data, tokens: int) -> bool:
    """Bound the answers, unless the request does; return whether this bound is ours."""
    names = TABLE[request.endpoint].lengths
    if not names:
        return False
    given = [name for name in names if data.get(name) is not None]
    if not given:
        data[names[-1]] = tokens
    elif request.bounded:
        data[given[0]] = min(tokens, data[given[0]])
    else:
        return False
    return True


def _lower_least_tokens(request: InferenceRequest, data: Data) -> None:
    """Keep a default of the fewest tokens within the bound of the request."""
    least = data.get("min_tokens")
    if least is None or "min_tokens" in request.data:
        return
    endpoint = TABLE[request.endpoint]
    bounds = [data[name] for name in endpoint.lengths if data.get(name) is not None]
    most = min(bounds or [endpoint.usual_length or least])
    data["min_tokens"] = max(0, min(least, most))
