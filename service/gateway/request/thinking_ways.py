"""How each expert is told to think, and which requests it can't answer as they ask.

A request's terms (`thinking_terms`) are written anew for the expert that answers, in the fields
that its engine or endpoint obeys. A term that it can't obey excludes it from the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from service.config import Config
from service.errors import InvalidRequestError
from service.gateway.request.thinking_terms import (
    ARGUMENTS,
    BUDGET,
    LEAST_ANTHROPIC,
    SWITCHES,
    ThinkingTerms,
    without_thinking_fields,
)
from service.http.prompt_endpoints import TABLE

_CHAT = "/v1/chat/completions"
_MESSAGES = "/v1/messages"
_COUNT_TOKENS = "/v1/messages/count_tokens"
_RESPONSES = "/v1/responses"
_INPUT_TOKENS = "/v1/responses/input_tokens"
_COMPLETIONS = "/v1/completions"
# The part of an expert's own budget that an effort may use; others may use all of it.
_PARTS = {"minimal": 1 / 8, "low": 1 / 4, "medium": 1 / 2}
# An expert's own budget leaves this part of the answer's bound for what follows the thinking.
_ANSWER_PART = 1 / 4

# Who asks for so much is not bounded by what was learned.
_LONG = ("high", "xhigh", "max")
# What a model that thinks is told where the request asks for no certain effort.
_USUAL_EFFORT = "medium"

Form = Literal["local", "openai", "anthropic", "vllm"]
Data = dict[str, Any]
# The endpoints on which each form has a budget.
_BUDGETED: Mapping[Form, tuple[str, ...]] = {
    "local": (_CHAT, _COMPLETIONS, _RESPONSES, _MESSAGES),
    "vllm": (_CHAT, _COMPLETIONS),
    "anthropic": (_CHAT, _MESSAGES),
    "openai": (),
}


@dataclass(frozen=True, slots=True)
class ThinkingWay:
    """How one expert thinks, and how it is told.

    Attributes:
        form: `local` for engines of pools, else the fields that the endpoint takes.
        enabled: Whether it thinks; None where each request says.
        budget_tokens: Most tokens of thinking of each answer; None without a bound.
        bounded: Whether the engines of its pools can end its thinking.
        by_command: Whether a command starts its server.
    """

    form: Form = "local"
    enabled: bool | None = None
    budget_tokens: int | None = None
    bounded: bool = True
    by_command: bool = False

    def form_on(self, endpoint: str) -> Form:
        """The form on an endpoint. Messages has one form at all endpoints but ours."""
        return "anthropic" if endpoint == _MESSAGES and self.form != "local" else self.form

    def refusal(self, endpoint: str, terms: ThinkingTerms) -> str | None:
        """Why it can't answer as a request asks, as the rest of a sentence; None if it can."""
        if terms.enabled is False:
            return "always thinks" if self.enabled else None
        if self.enabled is False:
            return "never thinks" if terms.enabled else None
        form = self.form_on(endpoint)
        if terms.budget_tokens is not None and TABLE[endpoint].generates:
            if endpoint not in _BUDGETED[form]:
                return "is remote, and its endpoint takes no budget of thinking here"
            if form == "anthropic" and terms.budget_tokens < LEAST_ANTHROPIC:
                return f"is remote, and takes budgets of at least {LEAST_ANTHROPIC} tokens"
            if self.by_command:
                return "can't bound its thinking: a command starts its server"
            if not self.bounded:
                return "can't bound its thinking: its pools have no vllm.reasoning_parser"
        unbudgeted = terms.budget_tokens is None and self.budget_tokens is None
        if form == "anthropic" and endpoint == _CHAT and terms.enabled and unbudgeted:
            return "is remote, and thinks only with a budget"
        return None

    def budget(
        self, terms: ThinkingTerms, most_tokens: int | None, learned: int | None = None
    ) -> int | None:
        """Most tokens of thinking of one answer; None without a bound, or where it does not think.

        Args:
            terms: What the request says.
            most_tokens: The bound of the answer, thinking included; None without one.
            learned: The budget that was learned for prompts like this one; None without one.
        """
        if self.thinks(terms) is False:
            return None
        own: list[int] = []
        if self.budget_tokens is not None:
            own.append(max(1, int(self.budget_tokens * _PARTS.get(terms.effort or "", 1))))
        if learned is not None and terms.budget_tokens is None and terms.effort not in _LONG:
            own.append(learned)
        if own and most_tokens is not None:
            own.append(max(1, int(most_tokens * (1 - _ANSWER_PART))))
        if terms.budget_tokens is not None:
            own.append(terms.budget_tokens)
            if most_tokens is not None:
                own.append(max(1, most_tokens - 1))
        return min(own, default=None)

    def thinks(self, terms: ThinkingTerms) -> bool | None:
        """Whether it thinks in its answer to a request; None where nobody says."""
        return self.enabled if terms.enabled is None else terms.enabled

    def write(
        self,
        endpoint: str,
        data: Data,
        terms: ThinkingTerms,
        most_tokens: int | None,
        learned: int | None = None,
    ) -> tuple[Data, int | None]:
        """Tell it how to think. A second call changes nothing.

        Args:
            endpoint: The path.
            data: The body.
            terms: What the client's body said.
            most_tokens: The bound of the answer, thinking included; None without one.
            learned: The budget that was learned for prompts like this one; None without one.

        Returns:
            The body, and the most tokens of thinking; None without a bound.
        """
        if not terms and self.enabled is None:
            return data, None
        form = self.form_on(endpoint)
        budget = None
        if endpoint in _BUDGETED[form]:
            budget = self.budget(terms, most_tokens, learned)
        if form == "anthropic" and budget is not None:
            # A request's own budget is no smaller, or it would have been refused.
            budget = max(budget, LEAST_ANTHROPIC)
        if endpoint == _COMPLETIONS:
            # There is no template, so that only the prompt can begin to think.
            rest = {name: value for name, value in data.items() if name != BUDGET}
            return (rest if budget is None else {**rest, BUDGET: budget}), budget
        vllm = form in ("local", "vllm")
        # An expert that the config says nothing of gets the template's arguments as they are given.
        rest = without_thinking_fields(data, arguments=not vllm or self.enabled is not None)
        enabled = self.thinks(terms)
        match form:
            case "anthropic":
                if endpoint == _RESPONSES:
                    # Those who serve Anthropic's models there take OpenAI's field.
                    return _openai(endpoint, rest, enabled, terms.effort, self.enabled), budget
                room = math.inf if most_tokens is None else most_tokens
                if budget is not None and not LEAST_ANTHROPIC <= budget < room:
                    enabled, budget = False, None  # the answer has no room for it
                return _anthropic(endpoint, rest, enabled, terms.effort, budget), budget
            case "openai":
                return _openai(endpoint, rest, enabled, terms.effort, self.enabled), budget
        rest = self._vllm(endpoint, rest, enabled, terms.effort)
        # On Messages and Responses only our own engine knows the field.
        return (rest if budget is None else {**rest, BUDGET: budget}), budget

    def _vllm(self, endpoint: str, data: Data, enabled: bool | None, effort: str | None) -> Data:
        """The fields of vLLM but for the budget."""
        switches = dict.fromkeys(SWITCHES, enabled)
        if self.enabled is not None:
            # vLLM tells the template what an effort means, but not in every template's words.
            data = _with_arguments(data, switches)
            return data if effort is None else _with_effort(endpoint, data, effort)
        if effort is None and enabled is False:
            effort = "none"
        if effort is not None:
            return _with_effort(endpoint, data, effort)
        given = data.get(ARGUMENTS)
        said = isinstance(given, dict) and any(given.get(name) is not None for name in SWITCHES)
        return data if said or enabled is None else _with_arguments(data, switches)


def _with_effort(endpoint: str, data: Data, effort: str) -> Data:
    """Return a body with an effort, in the endpoint's own field."""
    if endpoint in (_RESPONSES, _INPUT_TOKENS):
        return _nested(data, "reasoning", effort)
    if endpoint in (_MESSAGES, _COUNT_TOKENS):
        if effort == "none":
            return {**data, "thinking": {"type": "disabled"}}
        return _nested(data, "output_config", "low" if effort == "minimal" else effort)
    if endpoint == _CHAT:
        return {**data, "reasoning_effort": effort}
    return _with_arguments(data, {"reasoning_effort": effort, "enable_thinking": effort != "none"})


def _with_arguments(data: Data, arguments: Data) -> Data:
    given = data.get(ARGUMENTS)
    if given is not None and not isinstance(given, dict):
        return data  # the engine says what is wrong with it
    return {**data, ARGUMENTS: {**(given or {}), **arguments}}


def _nested(data: Data, name: str, effort: str) -> Data:
    given = data.get(name)
    if given is not None and not isinstance(given, dict):
        return data  # the engine says what is wrong with it
    return {**data, name: {**(given or {}), "effort": effort}}


def _openai(
    endpoint: str, data: Data, enabled: bool | None, effort: str | None, own: bool | None
) -> Data:
    """OpenAI's fields. A model that never thinks refuses an effort, so that it gets none."""
    if own is False:
        return data
    if enabled is False:
        effort = "none"
    elif effort is None and enabled and own is None:
        effort = _USUAL_EFFORT
    return data if effort is None else _with_effort(endpoint, data, effort)


def _anthropic(
    endpoint: str, data: Data, enabled: bool | None, effort: str | None, budget: int | None
) -> Data:
    """Anthropic's fields. Its chat completions have no effort."""
    if endpoint == _MESSAGES and effort not in (None, "none"):
        data = _with_effort(endpoint, data, str(effort))
    if enabled is False:
        return {**data, "thinking": {"type": "disabled"}}
    if not enabled:
        return data  # it does not think unless it is told to
    if budget is None:
        return {**data, "thinking": {"type": "adaptive"}}
    return {**data, "thinking": {"type": "enabled", "budget_tokens": budget}}


class ThinkingWays:
    """How each expert of a config thinks."""

    def __init__(self, config: Config) -> None:
        self._ways = {name: _way(config, name) for name in config.experts}

    def get(self, expert: str) -> ThinkingWay | None:
        """How an expert thinks; None for a name that is no expert's, such as `auto`."""
        return self._ways.get(expert)

    def refusals(self, endpoint: str, terms: ThinkingTerms) -> Mapping[str, str]:
        """The experts that can't answer as a request asks, each with the reason."""
        if not terms:
            return {}
        found = {name: way.refusal(endpoint, terms) for name, way in self._ways.items()}
        return {name: why for name, why in found.items() if why is not None}


def _way(config: Config, name: str) -> ThinkingWay:
    expert = config.experts[name]
    own = expert.thinking
    return ThinkingWay(
        "local" if expert.remote is None else expert.remote.thinking_fields,
        None if own is None else own.enabled,
        None if own is None else own.budget_tokens,
        expert.remote is not None or config.bounds_thinking(name),
        config.experts[config.owner_of(name)].command is not None,
    )


def refused(terms: ThinkingTerms, reasons: Mapping[str, str]) -> InvalidRequestError:
    """The error for a request that none of these experts can answer as it asks."""
    listed = [f"expert {name!r} {why}" for name, why in list(reasons.items())[:3]]
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    field = terms.fields[0]
    return InvalidRequestError(f"`{field}` can't be kept: {'; '.join(listed)}{more}", param=field)
