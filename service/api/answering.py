"""One request from its plan to its answer: which recipe, and who runs it."""

from __future__ import annotations

import time
from typing import Any

from service.api.body import Asked
from service.api.ensemble import Ensemble
from service.api.explain import explain
from service.api.meter import Meter
from service.api.passage import Passage
from service.api.plan import Plan
from service.api.relay import Relay
from service.api.reply import Reply
from service.api.worth import Worth
from service.engine.protocol import Send
from service.errors import CoeError, InvalidRequest, PromptTooLong
from service.types import Recipe


class Answering:
    """Takes the best recipe for each request and learns from how it went."""

    def __init__(self, relay: Relay, worth: Worth) -> None:
        self._relay = relay
        self._worth = worth

    async def answer(
        self,
        asked: Asked,
        plan: Plan,
        headers: list[tuple[bytes, bytes]],
        send: Send,
        passage: Passage,
        meter: Meter | None = None,
    ) -> None:
        """Answer a request. `meter` counts, where somebody is charged.

        Raises CoeError while nothing has been sent.
        """
        began_s = time.monotonic()
        deadline_s = began_s + asked.deadline_ms / 1000
        reply = Reply(send, headers, passage, began_s, meter)
        relay = self._relay
        weighed = relay.begin(asked, plan)
        at = weighed.best()
        recipe: Recipe | None = None
        if at is not None:
            recipe = relay.book.recipes[int(plan.rows[at])]
            passage.predicted_s = float(weighed.time[at])
            passage.predicted_cost = float(weighed.cost[at])
        try:
            if recipe is None or recipe.kind == "single":
                first = weighed if recipe is not None else None
                await relay.carry(asked, plan, reply, deadline_s, first=first)
                return
            ensemble = Ensemble(relay, recipe, asked, plan, weighed, reply, deadline_s)
            try:
                await ensemble.run()
            except (InvalidRequest, PromptTooLong):
                raise
            except CoeError:
                singles = plan.only(relay.book.single[plan.rows])
                if reply.started or not len(singles.rows):
                    raise
                # No member answered: anybody may.
                await relay.carry(asked, singles, reply, deadline_s)
            if recipe.later:
                row = relay.book.recipe_index[recipe]
                self._worth.escalated(row, ensemble.escalations, len(recipe.later))
        finally:
            self._learn(plan, reply)

    def ways(self, plan: Plan) -> list[tuple[str, ...]]:
        """Whom each recipe of a plan may ask."""
        return [self._relay.book.recipes[row].experts for row in plan.rows.tolist()]

    def _learn(self, plan: Plan, reply: Reply) -> None:
        passage, spent = reply.passage, reply.spent
        if passage.status != 200:
            return
        if spent is not None and spent.completion_tokens is None and reply.events > 2:
            # It told no usage: chunks are tokens, but for the first and the last.
            spent.completion_tokens = reply.events - 2
            spent.estimated = True
        for call in passage.calls:
            if call.completion_tokens:
                self._relay.market.saw(call.expert, plan.category, call.completion_tokens)

    def explain(self, asked: Asked, plan: Plan) -> dict[str, Any]:
        """A decision for people: the posterior, and every candidate with what decided."""
        return explain(plan, self._relay.weigh(asked, plan))
