"""One request from its plan to its answer: which recipe, and who runs it."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from service.errors import CoeError, EngineDiedTwiceError, InvalidRequestError, PromptTooLongError
from service.gateway.dispatch.dispatcher import Dispatcher
from service.gateway.dispatch.ensemble import EnsembleExecutor
from service.gateway.dispatch.errors import deadline_error
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request.token_limits import within_cost
from service.gateway.routes.explain import explain
from service.gateway.routes.feedback import FeedbackService
from service.gateway.routing.candidates import RoutePlan
from service.gateway.routing.quality import QualityModel
from service.gateway.sends.response import ResponseSend
from service.types import Recipe


class RecipeExecutor:
    """Takes the best recipe for each request and learns from how it went."""

    def __init__(
        self, dispatcher: Dispatcher, quality_model: QualityModel, feedback: FeedbackService
    ) -> None:
        self._dispatcher = dispatcher
        self._quality_model = quality_model
        self.feedback = feedback

    async def execute(
        self, request: InferenceRequest, plan: RoutePlan, reply: ResponseSend
    ) -> None:
        """Choose a candidate for a request, run it, and learn from how it went.

        Args:
            request: The request.
            plan: Its candidates.
            reply: Where the answer goes. Its record says when the request arrived, from where
                the deadline counts.

        Raises:
            CoeError: While nothing has been sent.
        """
        record = reply.record
        chosen_from_s = reply.began_s = time.monotonic()
        deadline_s = record.arrived_s + request.deadline_ms / 1000
        if chosen_from_s >= deadline_s:
            raise deadline_error(request, silent=False)
        dispatcher = self._dispatcher
        selection = dispatcher.select(request, plan, deadline_s - chosen_from_s)
        took_s = time.monotonic() - chosen_from_s
        record.route_ms += took_s * 1000
        if record.trace is not None:
            record.trace.chose(chosen_from_s, took_s)
        at = selection.best()
        recipe: Recipe | None = None
        if at is not None:
            recipe = dispatcher.catalog.recipes[int(plan.rows[at])]
            record.predicted_s = float(selection.time[at])
            record.predicted_cost = float(selection.cost[at])
            contexts = [dispatcher.context(name) for name in recipe.experts]
            request = within_cost(request, recipe.experts, dispatcher.cost_model, contexts)
        record.clipped = request.clipped
        row = -1
        ended = False
        try:
            if recipe is None or recipe.kind == "single":
                first = selection if recipe is not None else None
                await dispatcher.dispatch(request, plan, reply, deadline_s, first=first)
                row = dispatcher.catalog.index[record.expert]
                ended = record.outcome == "ok"
                return
            ensemble = EnsembleExecutor(
                dispatcher, recipe, request, plan, selection, reply, deadline_s
            )
            try:
                await ensemble.run()
            except (InvalidRequestError, PromptTooLongError, EngineDiedTwiceError):
                raise
            except CoeError:
                singles = plan.only(dispatcher.catalog.single[plan.rows])
                if reply.started or not len(singles.rows):
                    raise
                # No member answered: anybody may.
                await dispatcher.dispatch(request, singles, reply, deadline_s)
                row = dispatcher.catalog.index[record.expert]
                ended = record.outcome == "ok"
                return
            ended = record.outcome == "ok"
            row = dispatcher.catalog.recipe_index[recipe]
            if recipe.later:
                expected = plan.reach[at]
                self._quality_model.escalated(row, expected, ensemble.escalations)
        finally:
            self._learn(plan, reply, ended=ended)
            if row >= 0 and record.status == 200:
                dispatcher.prefix_affinity.record_answer(request, record.expert, record.pool)
                ids = (request.request_id, request.client_id)
                self.feedback.record_answer(request.tenant, ids, plan.category, row)

    def affordable(self, request: InferenceRequest, plan: RoutePlan) -> RoutePlan:
        """Without the recipes that cost more than the tenant's budgets have left; the cheapest
        stays in any case, for the ledger to judge."""
        left = self._dispatcher.budget_prices.left(request.tenant)
        if math.isinf(left) or len(plan.rows) < 2:
            return plan
        cost_model, catalog = self._dispatcher.cost_model, self._dispatcher.catalog
        each = cost_model.expect(
            plan.category, request.prompt_tokens, request.most_tokens, request.answers
        ).cost
        worst = catalog.asks[plan.rows] @ each
        keep = worst <= left
        if not keep.any():
            keep[int(worst.argmin())] = True
        return plan.only(keep)

    def cheapest(self, plan: RoutePlan) -> RoutePlan:
        """Only the recipe that costs least in the worst case."""
        per_token = self._dispatcher.cost_model.per_token
        worst = self._dispatcher.catalog.asks[plan.rows] @ per_token
        keep = np.zeros(len(plan.rows), dtype=bool)
        keep[int(worst.argmin())] = True
        return plan.only(keep)

    def likely_tokens(self, request: InferenceRequest, plan: RoutePlan) -> float:
        """Tokens that the calls of one way to answer are expected to make: of the longest."""
        each = self._dispatcher.cost_model.expect(
            plan.category, request.prompt_tokens, request.most_tokens
        ).tokens
        return float((self._dispatcher.catalog.asks[plan.rows] @ each).max())

    def ways(self, plan: RoutePlan) -> list[tuple[str, ...]]:
        """Whom each recipe of a plan may ask."""
        return [self._dispatcher.catalog.recipes[row].experts for row in plan.rows.tolist()]

    def _learn(self, plan: RoutePlan, reply: ResponseSend, *, ended: bool) -> None:
        """Learn the lengths of the answers. `ended`: the last one came to its own end."""
        record, spent = reply.record, reply.spent
        if record.status != 200:
            return
        if spent is not None and spent.completion_tokens is None and reply.events > 2:
            # It told no usage: chunks are tokens, but for the first and the last.
            spent.completion_tokens = reply.events - 2
            spent.estimated = True
        if spent is not None and not ended:
            spent.ended = False
        for call in record.calls:
            if call.length:
                self._dispatcher.cost_model.observe(
                    call.expert, plan.category, call.length, cut=call.cut
                )

    def explain(self, request: InferenceRequest, plan: RoutePlan) -> dict[str, Any]:
        """A decision for people: the posterior, and every candidate with what decided."""
        return explain(plan, self._dispatcher.weigh_candidates(request, plan))
