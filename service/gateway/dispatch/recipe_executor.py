"""Chooses the recipe of a request, and runs it: one expert, or several.

The first choice is made here, among all candidates, by `Dispatcher.select_first`. One expert goes
to `Dispatcher.dispatch` with it (`first_selection`). After a fault the dispatcher chooses again,
among single experts only. Cascades and votes go to `EnsembleExecutor`, deliberations to
`DeliberationExecutor`, and recruits to `RecruitExecutor`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from service.broker.cost_model import CostModel
from service.broker.quality_cost_bounds import worst_costs
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.recipe_steps import StepBound
from service.broker.round_gains import RoundGains
from service.broker.savings import Comparison, SavingsModel
from service.broker.selection import Selection
from service.errors import (
    CoeError,
    EngineDiedTwiceError,
    InvalidRequestError,
    PromptTooLongError,
)
from service.gateway.budget_prices import BudgetPrices
from service.gateway.dispatch.deliberation import DeliberationExecutor
from service.gateway.dispatch.dispatcher import Dispatcher
from service.gateway.dispatch.ensemble import EnsembleExecutor
from service.gateway.dispatch.member_calls import MemberCalls
from service.gateway.dispatch.pool_errors import deadline_error
from service.gateway.dispatch.recruitment import RecruitExecutor
from service.gateway.dispatch.step_requests import shown_bytes_of
from service.gateway.request.learned_budgets import LearnedBudgets
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request.token_limits import within_cost
from service.gateway.response_send import ResponseSend
from service.gateway.routing.candidate_planner import selection_request
from service.gateway.routing.decision_explanation import explain
from service.gateway.routing.feedback_learning import FeedbackService
from service.gateway.routing.prefix_affinity import PrefixAffinity
from service.gateway.routing.quality_model import QualityModel
from service.gateway.routing.request_bounds import within_bounds
from service.gateway.routing.route_plan import LeftOut, RoutePlan
from service.types import Kind, Recipe

_EXECUTORS: dict[Kind, type[MemberCalls]] = {
    "cascade": EnsembleExecutor,
    "vote": EnsembleExecutor,
    "deliberate": DeliberationExecutor,
    "recruit": RecruitExecutor,
}


class RecipeExecutor:
    """Runs the best recipe of each request.

    Args:
        dispatcher: Selects among candidates and calls experts.
        catalog: The recipes.
        cost_model: Estimates tokens and costs. It learns the length of answers.
        quality_model: Learns how often cascades escalate.
        budget_prices: Knows how much of each budget is left.
        prefix_affinity: Remembers which engine has a conversation in its prefix cache.
        feedback: Remembers replies, so that clients can vote on them.
        savings: Compares the choices with always asking the same recipe.
        learned_budgets: Learns how long experts think.
        round_gains: Learns what further rounds of deliberations gain.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        catalog: RecipeCatalog,
        cost_model: CostModel,
        quality_model: QualityModel,
        budget_prices: BudgetPrices,
        prefix_affinity: PrefixAffinity,
        feedback: FeedbackService,
        savings: SavingsModel,
        learned_budgets: LearnedBudgets,
        round_gains: RoundGains,
    ) -> None:
        self._dispatcher = dispatcher
        self._catalog = catalog
        self._cost_model = cost_model
        self._quality_model = quality_model
        self._budget_prices = budget_prices
        self._prefix_affinity = prefix_affinity
        self._feedback = feedback
        self._savings = savings
        self._learned_budgets = learned_budgets
        self._round_gains = round_gains

    async def execute(
        self, request: InferenceRequest, plan: RoutePlan, reply: ResponseSend
    ) -> None:
        """Select a candidate for a request, run it, and learn from the outcome.

        Args:
            request: The request.
            plan: Its candidates.
            reply: Receives the answer. Its record holds the time of arrival, from which the
                deadline counts.

        Raises:
            CoeError: The request failed, and nothing has been sent.
        """
        record = reply.record
        # For the savings: the request before the cost bound clips it.
        unclipped = request
        select_began_s = reply.began_s = time.monotonic()
        deadline_s = record.arrived_s + request.deadline_ms / 1000
        if select_began_s >= deadline_s:
            raise deadline_error(request, silent=False)
        dispatcher, catalog = self._dispatcher, self._catalog
        selection = dispatcher.select_first(request, plan, deadline_s - select_began_s)
        select_s = time.monotonic() - select_began_s
        record.route_ms += select_s * 1000
        if record.trace is not None:
            record.trace.chose(select_began_s, select_s)
        # A position counts the candidates of the plan, and a row the recipes of the catalog.
        position = selection.best_position()
        recipe: Recipe | None = None
        if position is not None:
            recipe = catalog.recipes[int(plan.rows[position])]
            dispatcher.note_session(selection, position, record)
            record.predicted_cost = float(selection.cost[position])
            called = self._most_calls(selection, position)
            contexts = [dispatcher.context(name) for name in called]
            added = [dispatcher.defaults.system_bytes(request, name) for name in called]
            request = within_cost(request, called, self._cost_model, contexts, added)
        record.clipped = request.clipped
        answered_row = -1
        complete = False
        try:
            if recipe is None or recipe.kind == "single":
                first = selection if recipe is not None else None
                await dispatcher.dispatch(request, plan, reply, deadline_s, first_selection=first)
                answered_row = catalog.index[record.expert]
                complete = record.outcome == "ok"
                return
            assert position is not None
            if reply.meter is not None:
                # Later calls show answers beyond the prompt, which are no chat template.
                reply.meter.most_prompt_tokens += shown_bytes_of(recipe, request.most_tokens)
            calls = _EXECUTORS[recipe.kind](
                dispatcher,
                catalog,
                self._cost_model,
                recipe,
                request,
                plan,
                selection,
                position,
                reply,
                deadline_s,
                self._round_gains,
            )
            try:
                await calls.run()
            except (InvalidRequestError, PromptTooLongError, EngineDiedTwiceError):
                raise
            except CoeError:
                singles = plan.only(catalog.single[plan.rows], "failed")
                if reply.started or not len(singles.rows):
                    raise
                # No member answered, so any single expert may answer instead.
                await dispatcher.dispatch(request, singles, reply, deadline_s)
                answered_row = catalog.index[record.expert]
                complete = record.outcome == "ok"
                return
            complete = record.outcome == "ok"
            answered_row = catalog.recipe_index[recipe]
            if recipe.steps and (taken := calls.escalations) is not None:
                expected = plan.escalation_prob[position]
                self._quality_model.observe_escalations(answered_row, expected, taken)
        finally:
            if complete and answered_row >= 0 and record.status == 200:
                record.comparison = self._compare(unclipped, plan, answered_row, record.expert)
            self._learn_lengths(request, plan, reply, complete=complete)
            if answered_row >= 0 and record.status == 200:
                hint = selection.request.prefix_cache
                if request.turn.history is not None:
                    answered = (record.expert, record.pool)
                    record.prefix_place = "unknown" if hint is None else hint.compare(*answered)
                self._prefix_affinity.record_answer(request, record.expert, record.pool)
                ids = (request.request_id, request.client_id)
                self._feedback.record_answer(request.tenant, ids, plan.category, answered_row)

    def _compare(
        self, request: InferenceRequest, plan: RoutePlan, row: int, expert: str
    ) -> Comparison | None:
        """Compare an answered request with the savings ledger's baselines."""
        if plan.estimates is None:
            return None
        return self._savings.compare(
            row,
            expert,
            plan.estimates,
            category=plan.category,
            prompt_tokens=request.prompt_tokens,
            most_tokens=request.most_tokens,
            answers=request.answers,
            added_tokens=self._dispatcher.defaults.added(request, self._catalog.experts).tokens,
            max_cost=request.max_cost,
        )

    def within_bounds(self, request: InferenceRequest, plan: RoutePlan) -> RoutePlan:
        """Drop the candidates that break the request's own bounds.

        Raises:
            InfeasibleBoundsError: No candidate keeps them; the error states the nearest bounds.
        """
        if not request.bounds_choice:
            return plan
        defaults, experts = self._dispatcher.defaults, self._catalog.experts
        wanted = selection_request(
            self._cost_model,
            request,
            plan,
            added=defaults.added(request, experts),
            saved_tokens=defaults.saved_thinking(request, experts, plan.category),
        )
        idle_s = None
        if math.isfinite(wanted.bounds.deadline_s):
            idle_s = self._dispatcher.idle_times(wanted)
        return within_bounds(self._catalog, wanted.bounds, plan, wanted.cost, idle_s, wanted.steps)

    def affordable(self, request: InferenceRequest, plan: RoutePlan) -> RoutePlan:
        """Drop the recipes that cost more than the tenant's budgets have left.

        The cheapest recipe always stays. The ledger then decides whether the tenant can pay for it.
        """
        left = self._budget_prices.left(request.tenant)
        if math.isinf(left) or len(plan.rows) < 2:
            return plan
        added = self._dispatcher.defaults.added(request, self._catalog.experts).tokens
        expected = self._cost_model.expect(
            plan.category, request.prompt_tokens + added, request.most_tokens, request.answers
        )
        worst = worst_costs(
            self._catalog, plan.rows, expected.cost, expected.steps, plan.recruitable
        )
        keep = worst <= left
        if not keep.any():
            keep[int(worst.argmin())] = True
        return plan.only(keep, "budget")

    def cheapest(self, plan: RoutePlan) -> RoutePlan:
        """Keep only the recipe that costs least if all its experts are called."""
        worst = worst_costs(
            self._catalog, plan.rows, self._cost_model.per_token, recruitable=plan.recruitable
        )
        keep = np.zeros(len(plan.rows), dtype=bool)
        keep[int(worst.argmin())] = True
        return plan.only(keep, "budget")

    def likely_tokens(self, request: InferenceRequest, plan: RoutePlan) -> float:
        """Expected tokens of all calls, for the recipe with the most tokens."""
        tokens = self._cost_model.expect(
            plan.category, request.prompt_tokens, request.most_tokens
        ).tokens
        worst = worst_costs(self._catalog, plan.rows, tokens, recruitable=plan.recruitable)
        return float(worst.max())

    def expert_sets(self, plan: RoutePlan) -> list[tuple[str, ...]]:
        """Return the experts that each recipe of a plan may call, once for each call."""
        return [self._dearest_calls(plan, row) for row in plan.rows.tolist()]

    def _dearest_calls(self, plan: RoutePlan, row: int) -> tuple[str, ...]:
        catalog, recipe = self._catalog, self._catalog.recipes[row]
        if recipe.recruitment is None:
            return recipe.experts * max(1, int(catalog.most_calls[row].max()))
        able = catalog.among[row]
        if plan.recruitable is not None:
            able = able & plan.recruitable
        price = self._cost_model.per_token
        names = [catalog.experts[e] for e in np.argsort(-price) if able[e]]
        return (*names[: recipe.recruitment.k], *(recipe.required or names[:1]))

    def most_shown(self, request: InferenceRequest, plan: RoutePlan) -> StepBound:
        """What calls of a plan's recipes may have beyond the request's own prompt and answer."""
        recipes = [self._catalog.recipes[row] for row in plan.rows.tolist()]
        return StepBound(
            max((shown_bytes_of(recipe, request.most_tokens) for recipe in recipes), default=0),
            max((r.deliberation.review_tokens for r in recipes if r.deliberation), default=0),
        )

    def _most_calls(self, selection: Selection, position: int) -> tuple[str, ...]:
        """The experts of all calls that a chosen recipe may make, once for each call."""
        row = int(selection.request.rows[position])
        recipe = self._catalog.recipes[row]
        if recipe.recruitment is not None:
            return (*selection.members(position), *selection.later(position))
        return recipe.experts * max(1, int(self._catalog.most_calls[row].max()))

    def explain(
        self, request: InferenceRequest, plan: RoutePlan, left_out: Sequence[LeftOut] = ()
    ) -> dict[str, Any]:
        """Explain the decision as JSON: the posterior, and every recipe with its reason."""
        selection = self._dispatcher.weigh_candidates(request, plan)
        return explain(plan, selection, request.alias, left_out)

    def _learn_lengths(
        self, request: InferenceRequest, plan: RoutePlan, reply: ResponseSend, *, complete: bool
    ) -> None:
        """Learn the lengths of the answers, and of their thinking.

        Args:
            request: The request.
            plan: The candidates of the request.
            reply: The reply with its calls.
            complete: Whether the last answer reached its own end.
        """
        record, last_call = reply.record, reply.expert_call
        if record.status != 200:
            return
        if last_call is not None and last_call.completion_tokens is None and reply.events > 2:
            # The reply had no usage. Each chunk is a token, except for the first and the last.
            last_call.completion_tokens = reply.events - 2
            last_call.estimated = True
        if last_call is not None and last_call.reasoning_tokens is None and reply.meter is not None:
            last_call.reasoning_tokens = reply.meter.reasoning_tokens
        if last_call is not None and not complete:
            last_call.ended = False
        for call in record.calls:
            if not call.length:
                continue
            if call.role == "review":
                self._cost_model.observe_review(
                    call.expert, plan.category, call.length, cut=call.cut
                )
            elif call.round in (None, 1):
                # Later answers have read the best one, and are another kind of text.
                self._cost_model.observe(call.expert, plan.category, call.length, cut=call.cut)
                if request.thinking.enabled is not False:
                    self._learned_budgets.observe(call, plan.category)
