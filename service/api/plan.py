"""From what was asked to who shall answer: the experts to try, in order, and why."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.api.body import AUTO, GENERAL, Asked
from service.broker.choice import Option, Wish
from service.config import Config
from service.errors import Forbidden, InvalidRequest, UnknownModel
from service.types import CategoryScores

# Quality per second: what a wait is worth against a better answer.
PRESETS = {"fast": 0.05, "": 0.01, "best": 0.001}
# Of an expert on a category that the config says nothing of.
_OWN, _FALLBACK, _OTHER = 1.0, 0.5, 0.0
# An expert worth less than this is no answer, however idle.
_LEAST = 0.05

Classify = Callable[[Mapping[str, Any]], CategoryScores]


@dataclass(frozen=True, slots=True)
class Plan:
    """Experts that may answer, best first. `category` is empty where the client named one.

    `quality`: what each is expected to be worth on this prompt, in [0, 1].
    `time_price`: quality per second.
    """

    preference: tuple[str, ...]
    category: str
    confidence: float
    reason: str
    scores: CategoryScores | None = None
    quality: tuple[float, ...] = (1.0,)
    time_price: float = PRESETS[""]

    def wish(self, tokens: int) -> Wish:
        """For the broker."""
        return Wish(dict(zip(self.preference, self.quality, strict=True)), self.time_price, tokens)


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
            if not asked.tenant.may_ask(model):
                raise Forbidden(f"this key may not ask for expert {model!r}", param="model")
            lacking = asked.needs - self._capabilities[model]
            if lacking:
                raise InvalidRequest(
                    f"expert {model!r} can't do {', '.join(sorted(lacking))}; "
                    f"it can do {', '.join(sorted(self._capabilities[model]))}",
                    param="model",
                )
            return Plan((model,), "", 1.0, "named")
        preset, category = self._auto(model)
        price = PRESETS[preset]
        if category is not None:
            return self._able(asked, {category: 1.0}, category, 1.0, "named category", None, price)
        scores = self._classify(asked.data) if self._classify is not None else None
        if scores is None:
            return self._able(asked, {GENERAL: 1.0}, GENERAL, 0.0, "no classifier", None, price)
        # Where the classifier would rather not say, the prompt counts as general.
        sure = scores.category == scores.labels[_best(scores)]
        posterior = (
            dict(zip(scores.labels, scores.probabilities, strict=True))
            if sure
            else {scores.category: 1.0}
        )
        known = scores.category in self._map
        reason = "classified" if known else "category without an expert"
        return self._able(
            asked, posterior, scores.category, scores.confidence, reason, scores, price
        )

    def _auto(self, model: str) -> tuple[str, str | None]:
        """`auto[:preset][/category]` taken apart. Raises UnknownModel."""
        name, slash, category = model.partition("/")
        head, colon, preset = name.partition(":")
        if head != AUTO:
            raise self._unknown(model)
        if preset not in PRESETS or (colon and not preset):
            raise UnknownModel(
                f"no preset {preset[:128]!r}; presets: auto:fast, auto, auto:best", param="model"
            )
        if slash and category not in self._map:
            raise UnknownModel(
                f"no category {category[:128]!r}; categories: {', '.join(sorted(self._map))}",
                param="model",
            )
        return preset, category if slash else None

    def quality(self, expert: str, posterior: Mapping[str, float]) -> float:
        """Q of the design: Σ over categories of p(c) · W[c, expert]."""
        given = self._experts[expert].quality
        total = 0.0
        for category, p in posterior.items():
            own = self._map.get(category, self._fallback) == expert
            worth = _OWN if own else _FALLBACK if expert == self._fallback else _OTHER
            total += p * given.get(category, worth)
        return min(1.0, total)

    def _able(
        self,
        asked: Asked,
        posterior: Mapping[str, float],
        category: str,
        confidence: float,
        reason: str,
        scores: CategoryScores | None,
        price: float,
    ) -> Plan:
        """The experts that can do what is needed and are worth anything here, best first."""
        able = [name for name in self._experts if asked.needs <= self._capabilities[name]]
        if able and not (able := [name for name in able if asked.tenant.may_ask(name)]):
            raise Forbidden("this key may not ask for any expert that can do this", param="model")
        if not able:
            raise InvalidRequest(
                f"no expert can do {', '.join(sorted(asked.needs))}", param="model"
            )
        worth = {name: self.quality(name, posterior) for name in able}
        kept = (
            sorted(
                (name for name in able if worth[name] >= _LEAST),
                key=lambda name: (-worth[name], name),
            )
            or able[:1]
        )
        return Plan(
            tuple(kept),
            category,
            confidence,
            reason,
            scores,
            tuple(worth[name] for name in kept),
            price,
        )

    def _unknown(self, model: str) -> UnknownModel:
        # Names are that long at most, and likeness of megabytes takes seconds.
        close = difflib.get_close_matches(model[:128], self._experts, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return UnknownModel(
            f"the model {model[:128]!r} does not exist.{hint} "
            f"Models: auto, {', '.join(self._experts)}",
            param="model",
        )


def _best(scores: CategoryScores) -> int:
    return max(range(len(scores.labels)), key=scores.probabilities.__getitem__)


def explain(plan: Plan, candidates: Sequence[Option]) -> dict[str, Any]:
    """A decision for people: the posterior, and every candidate with what decided."""
    scores = plan.scores
    posterior = dict(zip(scores.labels, scores.probabilities, strict=True)) if scores else {}
    return {
        "category": plan.category,
        "confidence": round(plan.confidence, 4),
        "novelty": round(scores.novelty, 4) if scores else None,
        "posterior": {label: round(p, 4) for label, p in posterior.items()},
        "reason": plan.reason,
        "time_price": plan.time_price,
        "chosen": candidates[0].expert if candidates else None,
        "candidates": [
            {
                "expert": one.expert,
                "pool": one.boot,
                "quality": round(one.quality, 4),
                "wait_s": round(one.wait_s, 3),
                "answer_s": round(one.answer_s, 3),
                "displaced_s": round(one.displaced_s, 3),
                "utility": round(one.utility, 4),
                "behind": round(candidates[0].utility - one.utility, 4),
            }
            for one in candidates
        ],
    }
