"""Plans a request: finds its candidates, and the expected quality of each. The broker chooses."""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.broker.cost_model import LONG_TOKENS, CostModel
from service.broker.information_value import value_of_category
from service.broker.pool_state import Floats, Place
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.recipe_steps import LEAST_RECRUITS
from service.broker.reference_cost import best_shares
from service.broker.savings import RecipeEstimates
from service.broker.selection import PrefixCacheHint, SelectionRequest
from service.broker.session_terms import SessionTerms
from service.classifier.classifier import Assessment
from service.classifier.topic_filter import carried_over, with_topics
from service.config import Config
from service.config.aliases import resolve_aliases
from service.config.router_presets import PresetConfig, PresetsConfig
from service.errors import ForbiddenError, InvalidRequestError, UnknownModelError
from service.gateway.request.expert_defaults import NOTHING_ADDED, AddedPrompt
from service.gateway.request.parsing import AUTO, GENERAL, InferenceRequest
from service.gateway.request.thinking_ways import ThinkingWays, refused
from service.gateway.routing.quality_model import QualityModel
from service.gateway.routing.request_bounds import allowed_experts, bounds_of
from service.gateway.routing.route_plan import LeftOut, RoutePlan
from service.gateway.routing.session_affinity import NO_SESSION, SessionLookup
from service.types import MAX_LATER, CategoryScores, Recipe, Tenant

# The presets' suffixes of `auto`.
PRESETS = ("fast", "", "best")
# Recipes of a lower quality are no candidates, however idle their pools are.
_MIN_QUALITY = 0.05
# The allowed recipes are cached for this many sets of allowed experts, and the reference cost's
# weights for as many sets of recipes that can answer.
_MAX_ALLOWANCES = 1000
# Most experts that an error names as those that can do what another one can't.
_NAMED_ABLE = 8

# A recipe that the client names has full quality, because nothing competes with it.
_CERTAIN = np.ones(1)
_NO_LATER = np.zeros((1, MAX_LATER))

# `PromptStages.assess` and `PromptStages.refine` of `classifier_stages`.
Assess = Callable[[Mapping[str, Any]], Assessment]
Refine = Callable[[Mapping[str, Any], Assessment, str, Callable[[], float]], Awaitable[Assessment]]


def _held_by_request(needs: frozenset[str]) -> str:
    """A clause for errors that names the images or sound in a request; empty without any."""
    words = {"vision": "images", "audio": "sound"}
    found = [word for need, word in words.items() if need in needs]
    return f"; the request holds {' and '.join(found)}" if found else ""


class CandidatePlanner:
    """Finds the candidates for requests by one config. `broker.selection` chooses among them.

    Args:
        config: The config.
        catalog: The recipes.
        quality_model: Expects the quality of each recipe.
        assess: Classifies a prompt by the first stage; None where there is nothing to classify by,
            and `auto` takes the fallback.
        per_token: (experts,), the price of each expert's tokens.
        refine: Classifies a prompt by the encoder as well, where the first stage is unsure.
        presets: What a point of quality is worth; None takes the config's.
    """

    def __init__(
        self,
        config: Config,
        catalog: RecipeCatalog,
        quality_model: QualityModel,
        assess: Assess | None,
        per_token: Floats,
        refine: Refine | None = None,
        presets: PresetsConfig | None = None,
    ) -> None:
        self._refine = refine
        self._presets = presets or config.router.presets
        self._handover_cost = config.router.sessions.handover_cost
        self._persistence = config.router.sessions.topic_persistence
        self._rows = {recipe.ascii_name: row for row, recipe in enumerate(catalog.recipes)}
        self._per_token = per_token
        self._references: dict[bytes, Floats] = {}
        self._experts = config.experts
        self._ways = ThinkingWays(config)
        self._catalog = catalog
        self._quality_model = quality_model
        self._known = config.category_map()
        self._assess = assess
        self._named = {name: recipe.recipe() for name, recipe in config.recipes.items()}
        self._aliases = {
            name: alias.targets
            for name, alias in resolve_aliases(config.aliases).items()
            if "*" not in name
        }
        kinds = sorted({c for expert in config.experts.values() for c in expert.capabilities})
        self._able: dict[str, NDArray[np.bool_]] = {
            kind: np.array([kind in config.experts[name].capabilities for name in catalog.experts])
            for kind in kinds
        }
        # Vectors of two spaces can't be compared: `auto` must not choose between them.
        self._spaces = {
            name: expert.space or config.owner_of(name)
            for name, expert in config.experts.items()
            if "embeddings" in expert.capabilities
        }
        self._allowances: dict[frozenset[str], NDArray[np.bool_]] = {}
        self._chosen_by_auto = chosen_by_auto(config, catalog)
        self._lacking: dict[str, NDArray[np.bool_]] = {
            kind: np.asarray((catalog.uses & ~able).any(axis=1))
            for kind, able in self._able.items()
        }

    async def plan_by_all_stages(
        self, request: InferenceRequest, session: SessionLookup = NO_SESSION
    ) -> RoutePlan:
        """Find the candidates for a request; the encoder is asked where that can change them.

        Args:
            request: The request.
            session: The session of its conversation.

        Raises what `plan` raises.
        """
        if self._assess is None or self._refine is None or not self._prompt_decides(request.model):
            return self.plan(request, session=session)
        first = self._assess(request.data)
        refined = await self._refine(
            request.data,
            first,
            request.tenant.name,
            lambda: self._value_of_category(request, first, session),
        )
        return self.plan(request, refined, session)

    def _value_of_category(
        self, request: InferenceRequest, first: Assessment, session: SessionLookup
    ) -> float:
        """How much quality the category can add at most, were it known, in [0, 1].

        It is 1 where that can't be told. Lengths of answers, which also depend on the category,
        are not counted.

        Raises what `plan` raises.
        """
        if request.model in self._named:
            return 1.0  # it recruits the best few, and the bound is one for the best alone
        if session.state.open and session.last is not None and session.certain:
            return 0.0  # the expert is locked, and the prompt has nothing of the user's
        quality = self._quality_model.quality_by_category(first, request.tenant.name)
        if quality is None or request.min_quality > 0:
            return 1.0
        possible = self._possible(request)
        if (allowed := allowed_experts(request, self._catalog.experts)) is not None:
            possible &= ~(self._catalog.uses & ~allowed).any(axis=1)
        if first.scores.stage == GENERAL:
            # The first stage has given up, so that it may be any category.
            posterior = np.ones(len(quality))
        else:
            posterior = self._quality_model.posterior(self._classify(request, first, session)[1])
        return value_of_category(posterior, quality[:, possible])

    def _prompt_decides(self, model: str) -> bool:
        """Whether the prompt decides: the client names neither an expert nor a category."""
        head = model.partition(":")[0]
        named = self._named.get(model)
        if named is not None:
            # The prompt decides who is recruited.
            return named.recruitment is not None
        return head == AUTO and "/" not in model

    def plan(
        self,
        request: InferenceRequest,
        assessment: Assessment | None = None,
        session: SessionLookup = NO_SESSION,
    ) -> RoutePlan:
        """Find the candidates for a request.

        `assessment` is the classifier's; without one, the first stage classifies the prompt.
        `session` is that of its conversation.

        Candidates that the request's own bounds exclude are among them, so that they can be
        explained.

        Raises UnknownModelError; InvalidRequestError if no expert is able to answer, or `allow` or
        `deny` name none; ForbiddenError if the tenant may use none of those that are.
        """
        model = request.model
        if model in self._experts:
            return self._by_name(request, Recipe("single", (model,)), f"expert {model!r}")
        if model in self._named:
            return self._by_name(request, self._named[model], f"recipe {model!r}", assessment)
        preset, category = self._auto(model, request.tenant)
        if "embeddings" in request.needs:
            self._one_space(request.tenant)
        price = self._presets.of(preset)
        if category is not None:
            return self._plan_for_posterior(
                request, {category: 1.0}, category, 1.0, "named category", None, price, session
            )
        assessment, posterior = self._classify(request, assessment, session)
        if assessment is None:
            return self._plan_for_posterior(
                request, posterior, GENERAL, 0.0, "no classifier", None, price, session
            )
        scores = assessment.scores
        known = scores.category in self._known
        reason = "classified" if known else "category without an expert"
        return self._plan_for_posterior(
            request,
            posterior,
            scores.category,
            scores.confidence,
            reason,
            assessment,
            price,
            session,
        )

    def _classify(
        self,
        request: InferenceRequest,
        given: Assessment | None = None,
        session: SessionLookup = NO_SESSION,
    ) -> tuple[Assessment | None, dict[str, float]]:
        """The classifier's assessment, None without a classifier, and the posterior by category."""
        if self._assess is None:
            return None, {GENERAL: 1.0}
        assessment = given or self._assess(request.data)
        scores = self._in_conversation(assessment, session)
        if scores is not assessment.scores:
            assessment = replace(assessment, scores=scores)
        # Where the classifier abstains, the prompt counts as general.
        sure = scores.category == scores.labels[_best(scores)]
        posterior = (
            dict(zip(scores.labels, scores.probabilities, strict=True))
            if sure
            else {scores.category: 1.0}
        )
        return assessment, posterior

    def _in_conversation(self, assessment: Assessment, session: SessionLookup) -> CategoryScores:
        """The scores of a prompt, by its conversation where the session knows this one."""
        scores, last_turn, last = assessment.scores, assessment.last_turn, session.last
        if last is None or not session.certain or last_turn is None or not self._persistence:
            return scores
        if session.state.open:
            # A tool's result adds nothing of the user's.
            return carried_over(scores, last.topics)
        return with_topics(scores, last_turn, last.topics, self._persistence)

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
            listed = "; ".join(f"{space}: {', '.join(names)}" for space, names in spaces.items())
            raise InvalidRequestError(
                "vectors of several spaces can't be compared, so `auto` chooses no expert for "
                f"embeddings; name one ({listed})",
                param="model",
            )

    def _by_name(
        self,
        request: InferenceRequest,
        recipe: Recipe,
        what: str,
        assessment: Assessment | None = None,
    ) -> RoutePlan:
        may = all(map(request.tenant.may_ask, recipe.required))
        allowed = sum(map(request.tenant.may_ask, recipe.members))
        if not may or (recipe.recruitment is not None and allowed < LEAST_RECRUITS):
            # The error must not reveal the recipe's other experts or their abilities.
            raise ForbiddenError(f"this key may not use {what}", param="model")
        for name in recipe.required:
            able = frozenset(self._experts[name].capabilities)
            lacking = request.needs - able
            if lacking:
                raise InvalidRequestError(
                    f"expert {name!r} can't do {', '.join(sorted(lacking))}; "
                    f"it can do {', '.join(sorted(able))}{_held_by_request(lacking)}"
                    f"{self._who_can(request)}",
                    param="model",
                )
            way = self._ways.get(name)
            if way is not None and (why := way.refusal(request.endpoint, request.thinking)):
                raise refused(request.thinking, {name: why})
        if recipe.kind != "single" and not request.combinable:
            raise InvalidRequestError(
                f"{what} asks several experts: it answers chat with n = 1, without tools and "
                "logprobs",
                param="model",
            )
        row = self._catalog.recipe_index[recipe]
        rows = self._catalog.everything[row : row + 1]
        escalation_prob = (
            self._quality_model.escalation_prob(row)[None] if recipe.steps else _NO_LATER
        )
        quality, skill, recruitable, category = _CERTAIN, None, None, ""
        if recipe.recruitment is not None:
            recruitable = self._recruitable(request, named=True)
            if (recruitable & self._catalog.among[row]).sum() < LEAST_RECRUITS:
                raise InvalidRequestError(
                    f"{what} has fewer than {LEAST_RECRUITS} experts that this key may use and "
                    f"that can do {', '.join(sorted(request.needs))}"
                    f"{_held_by_request(request.needs)}",
                    param="model",
                )
        if request.min_quality > 0 or recruitable is not None:
            assessment, posterior = self._classify(request, assessment)
            by_category = self._quality_model.posterior(posterior)
            tenant = request.tenant.name
            expected = self._quality_model.quality(by_category, assessment, tenant)[0]
            if request.min_quality > 0:
                quality = expected[rows]
            if recruitable is not None:
                skill = expected[: len(self._catalog.experts)]
                category = GENERAL if assessment is None else assessment.scores.category
        return RoutePlan(
            rows=rows,
            quality=quality,
            escalation_prob=escalation_prob,
            first=recipe.experts[0] if recruitable is None else self._first(recruitable, row),
            category=category,
            confidence=1.0,
            reason="named",
            allowed=allowed_experts(request, self._catalog.experts),
            time_price=self._presets.auto.time_price,
            skill=skill,
            recruitable=recruitable,
        )

    def _who_can(self, request: InferenceRequest) -> str:
        """A clause for errors that names the experts that a tenant could ask instead."""
        able = [
            name
            for name, expert in self._experts.items()
            if request.needs <= {*expert.capabilities} and request.tenant.may_ask(name)
        ]
        more = f" and {len(able) - _NAMED_ABLE} more" if len(able) > _NAMED_ABLE else ""
        return f"; these can: {', '.join(able[:_NAMED_ABLE])}{more}" if able else ""

    def _auto(self, model: str, tenant: Tenant) -> tuple[str, str | None]:
        """Split `auto[:preset][/category]`. Raises UnknownModelError."""
        name, slash, category = model.partition("/")
        head, colon, preset = name.partition(":")
        if head != AUTO:
            raise self._unknown_model_error(model, tenant)
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
        """The categories of the experts that a tenant may use."""
        if tenant.experts is None:
            return self._known
        allowed = [expert for name, expert in self._experts.items() if tenant.may_ask(name)]
        return {GENERAL, *(category for expert in allowed for category in expert.categories)}

    def _plan_for_posterior(
        self,
        request: InferenceRequest,
        posterior: Mapping[str, float],
        category: str,
        confidence: float,
        reason: str,
        assessment: Assessment | None,
        price: PresetConfig,
        session: SessionLookup,
    ) -> RoutePlan:
        """The recipes that have the needed capabilities and enough quality."""
        catalog = self._catalog
        by_category = self._quality_model.posterior(posterior)
        quality, escalation_prob = self._quality_model.quality(
            by_category, assessment, request.tenant.name
        )
        able = self._possible(request)
        skill, recruitable = None, None
        if catalog.recruits.any():
            skill, recruitable = quality[: len(catalog.experts)], self._recruitable(request)
            able &= self._recruits(recruitable)
        keep = able & (quality >= _MIN_QUALITY)
        allowed = allowed_experts(request, catalog.experts)
        possible = able if allowed is None else able & ~(catalog.uses & ~allowed).any(axis=1)
        if possible.any() and not (keep & possible).any():
            # Any answer is better than none.
            keep[int(np.flatnonzero(possible)[0])] = True
        elif not keep.any():
            keep = able
        named = reason == "named category"
        session_terms = self._session_terms(
            request, session, able, possible, category if named else None
        )
        held_row = None if session_terms is None else session_terms.row
        if held_row is not None and possible[held_row]:
            # It stays a candidate however little it is worth for this category.
            keep[held_row] = True
        rows = np.flatnonzero(keep)
        first = catalog.recipes[int(rows[quality[rows].argmax()])].experts[0]
        scores = assessment.scores if assessment is not None else None
        return RoutePlan(
            rows=rows,
            quality=quality[rows],
            escalation_prob=escalation_prob[rows],
            first=first,
            category=category,
            confidence=confidence,
            reason=reason,
            scores=scores,
            posterior=by_category,
            allowed=allowed,
            time_price=price.time_price,
            cost_weight=price.cost_weight,
            reference=self._reference(able),
            stage=scores.stage if scores is not None else "",
            session=session_terms,
            prefix_cache=None if session_terms is None else _prefix_cache(session),
            estimates=RecipeEstimates(
                quality, escalation_prob, possible & (quality >= request.min_quality)
            ),
            skill=skill,
            recruitable=recruitable,
        )

    def _recruitable(self, request: InferenceRequest, *, named: bool = False) -> NDArray[np.bool_]:
        """The experts that a recipe may recruit for a request, (experts,).

        Args:
            request: The request.
            named: Whether the client named the recipe. Then it may recruit experts that `auto`
                must not choose.
        """
        singles = slice(0, len(self._catalog.experts))
        able = np.ones(len(self._catalog.experts), dtype=bool)
        if not named:
            able &= self._chosen_by_auto[singles]
        for need in request.needs:
            able &= self._able.get(need, np.zeros(1, dtype=bool))
        if request.tenant.experts is not None:
            able &= self._allowed(request.tenant.experts)[singles]
        barred = self._ways.refusals(request.endpoint, request.thinking)
        able[[self._catalog.index[name] for name in barred]] = False
        return able

    def _first(self, recruitable: NDArray[np.bool_], row: int) -> str:
        """The first expert that a recipe may recruit."""
        return self._catalog.experts[int((recruitable & self._catalog.among[row]).argmax())]

    def _recruits(self, recruitable: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether each recipe finds enough experts, (recipes,); others need none."""
        catalog = self._catalog
        enough = (catalog.among & recruitable).sum(axis=1) >= LEAST_RECRUITS
        return np.asarray(enough | ~catalog.recruits)

    def _session_terms(
        self,
        request: InferenceRequest,
        session: SessionLookup,
        able: NDArray[np.bool_],
        possible: NDArray[np.bool_],
        named: str | None,
    ) -> SessionTerms | None:
        """The terms of a session.

        Args:
            request: The request.
            session: The session of its conversation.
            able: (recipes,), those that can answer and that the tenant may use.
            possible: (recipes,), those of them that the request's own bounds allow.
            named: The category that the client named; None if it named none.
        """
        last, is_open, cost = session.last, session.state.open, self._handover_cost
        if last is None:
            return SessionTerms(None, True, cost, "unknown") if is_open else None
        if named is not None and named != last.category:
            return None
        row = self._catalog.index.get(last.expert)
        if not is_open:
            row = self._rows.get(last.recipe, row)
            if row is not None and not able[row]:
                # A recipe may be unable where its expert is able.
                row = self._catalog.index.get(last.expert, row)
        if row is None:
            return SessionTerms(None, is_open, cost, "gone")
        if possible[row]:
            return SessionTerms(row, is_open, cost)
        may = able[row] or all(map(request.tenant.may_ask, self._catalog.recipes[row].experts))
        absent = "not_allowed" if able[row] or not may else "incapable"
        return SessionTerms(row, is_open, cost, absent)

    def _reference(self, able: NDArray[np.bool_]) -> Floats:
        """The weights of the reference cost, (experts,), where these recipes are possible."""
        key = able.tobytes()
        if (found := self._references.get(key)) is None:
            calls = self._quality_model.expected_calls(self._catalog)
            quality = np.where(able, self._quality_model.by_category(), -np.inf)
            found = best_shares(quality, calls @ self._per_token) @ calls
            if len(self._references) >= _MAX_ALLOWANCES:
                self._references.clear()
            self._references[key] = found
        return found

    def _possible(self, request: InferenceRequest) -> NDArray[np.bool_]:
        catalog = self._catalog
        able = self._chosen_by_auto.copy()
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
                raise ForbiddenError("this key may use no expert that can do this", param="model")
        reasons = self._ways.refusals(request.endpoint, request.thinking)
        if reasons:
            barred = np.array([name in reasons for name in catalog.experts])
            able &= ~(catalog.uses & barred).any(axis=1)
            if not able.any():
                told = {n: why for n, why in reasons.items() if request.tenant.may_ask(n)}
                raise refused(request.thinking, told)
        return able

    def left_out(self, request: InferenceRequest, plan: RoutePlan) -> list[LeftOut]:
        """The recipes that are no candidates of a plan, with the reasons, best first.

        Those that the tenant may not ask are not told of. There are none where the client names an
        expert or a recipe.
        """
        if plan.estimates is None:
            return []
        candidates = set(plan.rows.tolist())
        found = []
        for row, recipe in enumerate(self._catalog.recipes):
            if row in candidates or not all(map(request.tenant.may_ask, recipe.experts)):
                continue
            quality = float(plan.estimates.quality[row])
            found.append(LeftOut(row, quality, self._why_left_out(request, row)))
        return sorted(found, key=lambda one: -one.quality)

    def _why_left_out(self, request: InferenceRequest, row: int) -> str:
        if not self._chosen_by_auto[row]:
            return "only clients that name it get it (auto: false)"
        lacking = [
            need
            for need in sorted(request.needs)
            if need not in self._lacking or self._lacking[need][row]
        ]
        if lacking:
            return f"it can't do {', '.join(lacking)}"
        if not request.combinable and not self._catalog.single[row]:
            return "it asks several experts: only chat with n = 1, without tools and logprobs"
        if not self._recruits(self._recruitable(request))[row]:
            return f"fewer than {LEAST_RECRUITS} of its experts can be recruited for this request"
        refusals = self._ways.refusals(request.endpoint, request.thinking)
        for name in self._catalog.recipes[row].required:
            if name in refusals:
                return refusals[name]
        return f"its expected quality is less than {_MIN_QUALITY:g}, too little for a candidate"

    def _allowed(self, experts: frozenset[str]) -> NDArray[np.bool_]:
        """The recipes that use only these experts, as a mask (recipes,)."""
        if (found := self._allowances.get(experts)) is None:
            barred = np.array([name not in experts for name in self._catalog.experts])
            found = ~(self._catalog.uses & barred).any(axis=1)
            if len(self._allowances) >= _MAX_ALLOWANCES:
                self._allowances.clear()
            self._allowances[experts] = found
        return found

    def _unknown_model_error(self, model: str, tenant: Tenant) -> UnknownModelError:
        # No name is longer, and matching megabytes would take seconds.
        named: dict[str, tuple[str, ...]] = {name: (name,) for name in self._experts}
        named |= {name: recipe.required for name, recipe in self._named.items()}
        names = [name for name, experts in named.items() if all(map(tenant.may_ask, experts))]
        names += [
            alias
            for alias, targets in self._aliases.items()
            if any(target in names or target not in named for target in targets)
        ]
        close = difflib.get_close_matches(model[:128], names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return UnknownModelError(
            f"the model {model[:128]!r} does not exist.{hint} Models: auto, {', '.join(names)}",
            param="model",
        )


def _best(scores: CategoryScores) -> int:
    return max(range(len(scores.labels)), key=scores.probabilities.__getitem__)


def _prefix_cache(session: SessionLookup) -> PrefixCacheHint | None:
    """Where the conversation's prefix is cached, by the last turn of its session."""
    last = session.last
    if last is None or not session.certain:
        return None
    return PrefixCacheHint(last.expert, last.boot, last.tokens)


def _preset_price(plan: RoutePlan, cost: Floats) -> float:
    """The preset's price of cost, in quality per unit; 0 where the best experts cost nothing."""
    reference = 0.0 if plan.reference is None else float(plan.reference @ cost)
    return plan.cost_weight / reference if reference > 0 else 0.0


def selection_request(
    cost_model: CostModel,
    request: InferenceRequest,
    plan: RoutePlan,
    *,
    left_s: float | None = None,
    excluded: Collection[Place] = (),
    budget_price: float = 0.0,
    prefix_cache: PrefixCacheHint | None = None,
    added: AddedPrompt = NOTHING_ADDED,
    saved_tokens: Floats | None = None,
) -> SelectionRequest:
    """Build the request for the broker's selection.

    Args:
        cost_model: Expects tokens and cost of each expert.
        request: The client's request.
        plan: Its candidates.
        left_s: Seconds left of the deadline; None takes the whole deadline.
        excluded: Places, as (expert, pool's boot id), that must not be selected.
        budget_price: Shadow price of the tenant's budgets, in quality per unit of cost.
        prefix_cache: Where the conversation's prefix is cached, if known.
        added: What the defaults of each expert add to the prompt.
        saved_tokens: (experts,), tokens of each expert's answer that the request's budget of
            thinking saves; None for 0.
    """
    prompt_tokens = request.prompt_tokens + added.tokens
    expected = cost_model.expect(
        plan.category, prompt_tokens, request.most_tokens, request.answers, saved_tokens
    )
    return SelectionRequest(
        rows=plan.rows,
        quality=plan.quality,
        escalation_prob=plan.escalation_prob,
        tokens=expected.tokens,
        cost=expected.cost,
        prompt_tokens=request.prompt_tokens,
        time_price=plan.time_price,
        cost_price=_preset_price(plan, expected.cost) + budget_price,
        budget_price=budget_price,
        bounds=bounds_of(request, plan, cost_model, added.most_tokens),
        deadline_s=left_s if left_s is not None else request.deadline_ms / 1000,
        # A larger max_tokens is a cap, not an expectation: count at most LONG_TOKENS.
        context_tokens=request.prompt_tokens + min(request.most_tokens or 0, LONG_TOKENS),
        streams=request.stream,
        prefix_cache=prefix_cache or plan.prefix_cache,
        excluded=excluded,
        session=plan.session,
        steps=expected.steps,
        skill=plan.skill,
        recruitable=plan.recruitable,
    )


def chosen_by_auto(config: Config, catalog: RecipeCatalog) -> NDArray[np.bool_]:
    """The recipes that `auto` may choose, as a mask (recipes,): all of their experts allow it."""
    named_only = np.array([not config.experts[name].auto for name in catalog.experts])
    return np.asarray(~(catalog.uses & named_only).any(axis=1))
