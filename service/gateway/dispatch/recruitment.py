"""Runs recruits: the best experts for a prompt answer, and an aggregator joins their answers.

The selection has chosen the experts (`service/broker/recipe_steps.py`). Where time or `max_cost`
leaves no room for the aggregator, or it fails, the answer of the best of them is sent.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace

from service.broker.deliberation import all_agree
from service.broker.prompt_fences import filled, shown, shown_bytes
from service.errors import InvalidRequestError
from service.gateway.dispatch.member_calls import MemberAnswer, MemberCall, MemberCalls
from service.gateway.dispatch.pool_errors import deadline_error
from service.gateway.dispatch.step_requests import revised_request
from service.gateway.request.token_limits import within_cost
from service.types import Recruitment


@dataclass(slots=True)
class RecruitExecutor(MemberCalls):
    """Runs one recruit for one request."""

    _aggregated: int | None = None

    @property
    def escalations(self) -> int | None:
        """Whether the aggregator was asked, as 0 or 1; None where time or cost left no room."""
        return self._aggregated

    async def answer(self) -> None:
        """Ask the experts and then the aggregator, and send its answer.

        Raises:
            DeadlineExceededError: No expert answered before the deadline.
            CoeError: No expert answered.
        """
        recruitment = self.recipe.recruitment
        assert recruitment is not None
        calls = [
            MemberCall(name, self.member_request(), "answer")
            for name in self.selection.members(self.position)
        ]
        began_s = time.monotonic()
        given = await self.together(calls, until_s=self.until_s)
        good = [answer for answer in given if answer.ok]
        if not good:
            if time.monotonic() >= self.until_s:
                self.account()
                raise deadline_error(self.request, silent=False)
            await self.refuse()
            return
        # The members stand in the order of what they are worth.
        best = good[0]
        if all_agree([answer.final for answer in good]):
            self._aggregated = 0
            await self.send(best)
            return
        now_s = time.monotonic()
        if len(good) == 1 or now_s + (now_s - began_s) > self.until_s:
            await self.send(best)
            return
        if not await self._aggregate(recruitment, good):
            await self.send(best)

    async def _aggregate(self, recruitment: Recruitment, good: list[MemberAnswer]) -> bool:
        """Let the aggregator answer; False if it can't, and nothing has been sent."""
        aggregator = self.selection.later(self.position)[0]
        most_bytes = shown_bytes(self.request.most_tokens)
        answers = [
            (f"Answer {number}", shown(answer.text, most_bytes))
            for number, answer in enumerate(good, 1)
        ]
        prompt = filled(recruitment.prompt, {"answers": answers}, lambda: secrets.token_hex(12))
        streams = self.request.stream
        whole = replace(self.request, request_id=self.next_id())
        request = revised_request(whole if streams else self.member_request(), prompt)
        if self.request.max_cost is not None:
            spent = sum(call.cost for answer in self.answers for call in answer.record.calls)
            left = replace(request, max_cost=max(0.0, self.request.max_cost - spent))
            try:
                added = (self.system_bytes(aggregator, left),)
                request = within_cost(left, (aggregator,), self.cost_model, added_bytes=added)
            except InvalidRequestError:
                return False
        self._aggregated = 1
        self.reply.record.escalations += 1
        call = MemberCall(aggregator, request, "aggregate")
        if streams:
            return await self.streamed(call, deadline_s=self.until_s)
        [answer] = await self.together([call], until_s=self.until_s)
        if answer.ok:
            await self.send(answer)
        return answer.ok
