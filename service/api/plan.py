"""From what was asked to who shall answer: the experts to try, in order, and why."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from service.api.body import AUTO, Asked
from service.config import Config
from service.errors import InvalidRequest, UnknownModel
from service.types import CategoryScores

Classify = Callable[[Mapping[str, Any]], CategoryScores]


@dataclass(frozen=True, slots=True)
class Plan:
    """Experts in order of preference. `category` is empty where the client named an expert."""

    preference: tuple[str, ...]
    category: str
    confidence: float
    reason: str
    scores: CategoryScores | None = None


class Planner:
    """Stage 1 and 2 of the router for one config.

    `classify` is None where the config names no artifact: then `auto` is the fallback.
    """

    def __init__(self, config: Config, classify: Classify | None) -> None:
        self._experts = config.experts
        self._map = config.category_map()
        self._fallback = config.fallback
        self._classify = classify
        self._capabilities = {
            name: frozenset(expert.capabilities) for name, expert in config.experts.items()
        }

    def plan(self, asked: Asked) -> Plan:
        """Who shall answer. Raises UnknownModel; InvalidRequest where nobody is able to."""
        model = asked.model
        if model in self._experts:
            lacking = asked.needs - self._capabilities[model]
            if lacking:
                raise InvalidRequest(
                    f"expert {model!r} can't do {', '.join(sorted(lacking))}; "
                    f"it can do {', '.join(sorted(self._capabilities[model]))}",
                    param="model",
                )
            return Plan((model,), "", 1.0, "named")
        if model == AUTO:
            scores = self._classify(asked.data) if self._classify is not None else None
            if scores is None:
                return self._able(asked, Plan((self._fallback,), "general", 0.0, "no classifier"))
            return self._able(asked, self._mapped(scores))
        if model.startswith(AUTO + "/"):
            category = model[len(AUTO) + 1 :]
            if category not in self._map:
                raise UnknownModel(
                    f"no category {category[:128]!r}; categories: {', '.join(sorted(self._map))}",
                    param="model",
                )
            return self._able(asked, Plan((self._map[category],), category, 1.0, "named category"))
        raise self._unknown(model)

    def _mapped(self, scores: CategoryScores) -> Plan:
        expert = self._map.get(scores.category, self._fallback)
        reason = "classified" if scores.category in self._map else "category without an expert"
        return Plan((expert,), scores.category, scores.confidence, reason, scores)

    def _able(self, asked: Asked, plan: Plan) -> Plan:
        """Those of the plan that can do what is needed, then the others that can."""
        order = dict.fromkeys((*plan.preference, self._fallback, *self._experts))
        able = tuple(name for name in order if asked.needs <= self._capabilities[name])
        if not able:
            raise InvalidRequest(
                f"no expert can do {', '.join(sorted(asked.needs))}", param="model"
            )
        # The expert chosen and the fallback stand in for each other; further ones
        # only where neither is able.
        kept = tuple(name for name in able if name in (*plan.preference, self._fallback))
        return Plan(kept or able[:1], plan.category, plan.confidence, plan.reason, plan.scores)

    def _unknown(self, model: str) -> UnknownModel:
        # Names are that long at most, and likeness of megabytes takes seconds.
        close = difflib.get_close_matches(model[:128], self._experts, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return UnknownModel(
            f"the model {model[:128]!r} does not exist.{hint} "
            f"Models: auto, {', '.join(self._experts)}",
            param="model",
        )
