"""From what was asked to what each way of answering is worth: stage 1 and 2 of the router."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.broker.cost_model import LONG_TOKENS, CostModel
from service.broker.pool_state import Floats
from service.broker.recipe_catalog import Ints, RecipeCatalog
from service.broker.selection import PrefixCacheHint, SelectionRequest
from service.classifier.classifier import Assessment
from service.config import Config
from service.errors import ForbiddenError, InvalidRequestError, UnknownModelError
from service.gateway.request.parsing import AUTO, GENERAL, InferenceRequest
from service.gateway.routing.quality import QualityModel
from service.types import MAX_LATER, CategoryScores, Recipe, Tenant

# Quality per second: what a wait is worth against a better answer.
PRESETS = {"fast": 0.05, "": 0.01, "best": 0.001}
# A way of answering worth less than this is none, however idle.
_LEAST = 0.05
# Sets of allowed experts whose recipes are remembered.
_MOST_ALLOWANCES = 1000

# One recipe, named by the client: nobody is asked whether it is worth anything.
_CERTAIN = np.ones(1)
_NO_LATER = np.zeros((1, MAX_LATER))

Assess = Callable[[Mapping[str, Any]], Assessment]


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """The recipes that may answer: rows of the book, and what each is expected to be worth.

    quality (rows,) in [0, 1]; reach (rows, MAX_LATER). `category` is empty where the client
    named who shall answer. time_price: quality per second. posterior (labels,).
    """

    rows: Ints
    quality: Floats
    reach: Floats
    first: str
    category: str
    confidence: float
    reason: str
    scores: CategoryScores | None = None
    posterior: Floats | None = None
    time_price: float = PRESETS[""]

    def only(self, keep: NDArray[np.bool_]) -> RoutePlan:
        """Only some of the rows."""
        if keep.all():
            return self
        return replace(
            self, rows=self.rows[keep], quality=self.quality[keep], reach=self.reach[keep]
        )


def _held_by_request(needs: frozenset[str]) -> str:
    """A clause that says why senses are needed, for whoever does not know our words for them."""
    held = {"vision": "images", "audio": "sound"}
    found = [word for need, word in held.items() if need in needs]
    return f"; the request holds {' and '.join(found)}" if found else ""


class SemanticRouter:
    """Stage 1 and 2 for one config.

    `assess` is None where the config names no artifact: then `auto` is the fallback.
    """

    def __init__(
        self,
        config: Config,
        catalog: RecipeCatalog,
        quality_model: QualityModel,
        assess: Assess | None,
    ) -> None:
        self._experts = config.experts
        self._catalog = catalog
        self._quality_model = quality_model
        self._known = config.category_map()
        self._assess = assess
        self._named = {name: recipe.recipe() for name, recipe in config.recipes.items()}
        kinds = sorted({c for expert in config.experts.values() for c in expert.capabilities})
        self._able = {
            kind: np.array([kind in config.experts[name].capabilities for name in catalog.experts])
            for kind in kinds
        }
        # Vectors of two spaces can't be compared: `auto` must not choose between them.
        self._spaces = {
            name: expert.space or name
            for name, expert in config.experts.items()
            if "embeddings" in expert.capabilities
        }
        self._allowances: dict[frozenset[str], NDArray[np.bool_]] = {}
        self._lacking = {
            kind: (catalog.uses & ~able).any(axis=1) for kind, able in self._able.items()
        }

    def plan(self, request: InferenceRequest) -> RoutePlan:
        """Find the candidates for a request.

        Raises UnknownModelError; InvalidRequestError if no expert is able to answer;
        ForbiddenError if the tenant may use none of those that are.
        """
        model = request.model
        if model in self._experts:
            return self._by_name(request, Recipe("single", (model,)), f"expert {model!r}")
        if model in self._named:
            return self._by_name(request, self._named[model], f"recipe {model!r}")
        preset, category = self._auto(model, request.tenant)
        if "embeddings" in request.needs:
            self._one_space(request.tenant)
        price = PRESETS[preset]
        if category is not None:
            return self._plan(
                request, {category: 1.0}, category, 1.0, "named category", None, price
            )
        if self._assess is None:
            return self._plan(request, {GENERAL: 1.0}, GENERAL, 0.0, "no classifier", None, price)
        assessment = self._assess(request.data)
        scores = assessment.scores
        # Where the classifier would rather not say, the prompt counts as general.
        sure = scores.category == scores.labels[_best(scores)]
        posterior = (
            dict(zip(scores.labels, scores.probabilities, strict=True))
            if sure
            else {scores.category: 1.0}
        )
        known = scores.category in self._known
        reason = "classified" if known else "category without an expert"
        return self._plan(
            request, posterior, scores.category, scores.confidence, reason, assessment, price
        )

    def _one_space(self, tenant: Tenant) -> None:
        """Refuse where the experts that a tenant may ask embed into several spaces.

        Raises:
            InvalidRequestError: They do; the message names the spaces.
        """
        spaces: dict[str, list[str]] = {}
        for name, space in self._spaces.items():
            if tenant.may_ask(name):
                spaces.setdefault(space, []).append(name)
        if len(spaces) > 1:
            told = "; ".join(f"{space}: {', '.join(names)}" for space, names in spaces.items())
            raise InvalidRequestError(
                "vectors of several spaces can't be compared, so `auto` chooses no expert for "
                f"embeddings; name one ({told})",
                param="model",
            )

    def _by_name(self, request: InferenceRequest, recipe: Recipe, what: str) -> RoutePlan:
        if not all(map(request.tenant.may_ask, recipe.experts)):
            # Not whom else it asks, nor what they can do.
            raise ForbiddenError(f"this key may not ask {what}", param="model")
        for name in recipe.experts:
            able = frozenset(self._experts[name].capabilities)
            lacking = request.needs - able
            if lacking:
                raise InvalidRequestError(
                    f"expert {name!r} can't do {', '.join(sorted(lacking))}; "
                    f"it can do {', '.join(sorted(able))}{_held_by_request(lacking)}",
                    param="model",
                )
        if recipe.kind != "single" and not request.combinable:
            raise InvalidRequestError(
                f"{what} asks several experts: it answers chat with n = 1, without tools and "
                "logprobs",
                param="model",
            )
        at = self._catalog.recipe_index[recipe]
        rows = self._catalog.everything[at : at + 1]
        reach = self._quality_model.escalation_prob(at)[None] if recipe.later else _NO_LATER
        return RoutePlan(rows, _CERTAIN, reach, recipe.experts[0], "", 1.0, "named")

    def _auto(self, model: str, tenant: Tenant) -> tuple[str, str | None]:
        """`auto[:preset][/category]` taken apart. Raises UnknownModelError."""
        name, slash, category = model.partition("/")
        head, colon, preset = name.partition(":")
        if head != AUTO:
            raise self._unknown(model, tenant)
        if preset not in PRESETS or (colon and not preset):
            raise UnknownModelError(
                f"no preset {preset[:128]!r}; presets: auto:fast, auto, auto:best", param="model"
            )
        known = self._categories(tenant)
        if slash and category not in known:
            raise UnknownModelError(
                f"no category {category[:128]!r}; categories: {', '.join(sorted(known))}",
                param="model",
            )
        return preset, category if slash else None

    def _categories(self, tenant: Tenant) -> Collection[str]:
        """The categories that a tenant may name: none that only others' experts have."""
        if tenant.experts is None:
            return self._known
        allowed = [expert for name, expert in self._experts.items() if tenant.may_ask(name)]
        return {GENERAL, *(one for expert in allowed for one in expert.categories)}

    def _plan(
        self,
        request: InferenceRequest,
        posterior: Mapping[str, float],
        category: str,
        confidence: float,
        reason: str,
        assessment: Assessment | None,
        price: float,
    ) -> RoutePlan:
        """The recipes that can do what is needed and are worth anything here."""
        catalog = self._catalog
        given = self._quality_model.posterior(posterior)
        quality, reach = self._quality_model.quality(given, assessment, request.tenant.name)
        able = self._possible(request)
        keep = able & (quality >= _LEAST)
        if not keep.any():
            # Worth nothing, but better than no answer.
            keep[int(np.flatnonzero(able)[0])] = True
        rows = np.flatnonzero(keep)
        first = catalog.recipes[int(rows[quality[rows].argmax()])].experts[0]
        scores = assessment.scores if assessment is not None else None
        return RoutePlan(
            rows,
            quality[rows],
            reach[rows],
            first,
            category,
            confidence,
            reason,
            scores,
            given,
            price,
        )

    def _possible(self, request: InferenceRequest) -> NDArray[np.bool_]:
        catalog = self._catalog
        able = np.ones(len(catalog.recipes), dtype=bool)
        for need in request.needs:
            if need not in self._lacking:
                able[:] = False
                break
            able &= ~self._lacking[need]
        if not request.combinable:
            able &= catalog.single
        if not able.any():
            raise InvalidRequestError(
                f"no expert can do {', '.join(sorted(request.needs))}"
                f"{_held_by_request(request.needs)}",
                param="model",
            )
        if request.tenant.experts is not None:
            able &= self._allowed(request.tenant.experts)
            if not able.any():
                raise ForbiddenError("this key may ask no expert that can do this", param="model")
        return able

    def _allowed(self, experts: frozenset[str]) -> NDArray[np.bool_]:
        """The recipes that ask nobody else."""
        if (found := self._allowances.get(experts)) is None:
            barred = np.array([name not in experts for name in self._catalog.experts])
            found = ~(self._catalog.uses & barred).any(axis=1)
            if len(self._allowances) >= _MOST_ALLOWANCES:
                self._allowances.clear()
            self._allowances[experts] = found
        return found

    def _unknown(self, model: str, tenant: Tenant) -> UnknownModelError:
        # Names are that long at most, and likeness of megabytes takes seconds.
        named: dict[str, tuple[str, ...]] = {name: (name,) for name in self._experts}
        named |= {name: recipe.experts for name, recipe in self._named.items()}
        names = [name for name, experts in named.items() if all(map(tenant.may_ask, experts))]
        close = difflib.get_close_matches(model[:128], names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return UnknownModelError(
            f"the model {model[:128]!r} does not exist.{hint} Models: auto, {', '.join(names)}",
            param="model",
        )


def _best(scores: CategoryScores) -> int:
    return max(range(len(scores.labels)), key=scores.probabilities.__getitem__)


def selection_request(
    cost_model: CostModel,
    request: InferenceRequest,
    plan: RoutePlan,
    *,
    left_s: float | None = None,
    excluded: Collection[tuple[str, str]] = (),
    cost_price: float = 0.0,
    prefix_cache: PrefixCacheHint | None = None,
) -> SelectionRequest:
    """Build the request for the broker's selection.

    Args:
        cost_model: Expects tokens and cost of each expert.
        request: The client's request.
        plan: Its candidates.
        left_s: Seconds left of the deadline; None takes the whole deadline.
        excluded: Places, as (expert, pool's boot id), that must not be selected.
        cost_price: Shadow price of the tenant's budgets, in quality per unit of cost.
        prefix_cache: Where the conversation's prefix is cached, if known.
    """
    expected = cost_model.expect(
        plan.category, request.prompt_tokens, request.most_tokens, request.answers
    )
    return SelectionRequest(
        rows=plan.rows,
        quality=plan.quality,
        reach=plan.reach,
        tokens=expected.tokens,
        cost=expected.cost,
        prompt_tokens=request.prompt_tokens,
        time_price=plan.time_price,
        cost_price=cost_price,
        max_cost=request.max_cost if request.max_cost is not None else math.inf,
        deadline_s=left_s if left_s is not None else request.deadline_ms / 1000,
        # A bound above that is a cap: what does not fit is clipped.
        context_tokens=request.prompt_tokens + min(request.most_tokens or 0, LONG_TOKENS),
        streams=request.stream,
        prefix_cache=prefix_cache,
        excluded=excluded,
    )
