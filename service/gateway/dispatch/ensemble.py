"""Runs votes and cascades: compares the members' answers, and sends one of them.

Only the last expert of a cascade streams directly, because its answer is final.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace

from service.broker.answer_agreement import agreed, confidence, majority
from service.gateway.dispatch.member_calls import MemberAnswer, MemberCall, MemberCalls

log = logging.getLogger("coe.ensemble")

# Experts that ignored a request for log probabilities. The log has one warning for each.
_without_logprobs: set[str] = set()


@dataclass(slots=True)
class EnsembleExecutor(MemberCalls):
    """Runs one vote or cascade for one request."""

    @property
    def escalations(self) -> int:
        """Number of the recipe's later experts that were called."""
        return sum(1 for answer in self.answers if answer.expert in self.recipe.later)

    async def answer(self) -> None:
        """Call the members, and send the answer that wins."""
        if self.recipe.kind == "vote":
            await self._vote()
        else:
            await self._cascade()

    async def _vote(self) -> None:
        members = self.recipe.members
        calls = [MemberCall(expert, self.member_request()) for expert in members]
        answers = await self.together(calls, most=len(members) // 2 + 1)
        at = majority([answer.final if answer.ok else None for answer in answers])
        if at is None:
            good = [answer for answer in answers if answer.ok]
            await (self.send(good[-1]) if good else self.refuse())
            return
        await self.send(answers[at])

    async def _cascade(self) -> None:
        recipe = self.recipe
        sure = recipe.sure > 0 and len(recipe.members) == 1
        members = await self.together(
            [MemberCall(name, self.member_request(logprobs=sure)) for name in recipe.members]
        )
        finals = [answer.final if answer.ok else None for answer in members]
        settled = self._sure(members[0]) if sure else agreed(finals)
        if settled:
            await self.send(members[0])
            return
        for i, expert in enumerate(recipe.later):
            last = i == len(recipe.later) - 1
            if self._too_late_for(expert) and (newest := self._newest()) is not None:
                await self.send(newest)
                return
            self.reply.record.escalations += 1
            if last and self.request.stream:
                whole = replace(self.request, request_id=self.next_id())
                if await self.streamed(MemberCall(expert, whole)):
                    return
                break
            began_s = time.monotonic()
            call = MemberCall(expert, self.member_request())
            try:
                answer = await self.ask(call)
            except asyncio.CancelledError:
                # The client has left, but it still pays for the call in progress.
                self.answers.append(self.cut_short(call, began_s))
                raise
            self.answers.append(answer)
            agrees = answer.ok and answer.final is not None and answer.final in finals
            if agrees or (last and answer.ok):
                await self.send(answer)
                return
            finals.append(answer.final if answer.ok else None)
        newest = self._newest() or next((a for a in self.answers[::-1] if a.ok), None)
        await (self.send(newest) if newest is not None else self.refuse())

    def _sure(self, answer: MemberAnswer) -> bool:
        """Whether a member's token probabilities reach the recipe's threshold."""
        if not answer.ok:
            return False
        if not answer.logprobs and answer.text and answer.expert not in _without_logprobs:
            _without_logprobs.add(answer.expert)
            log.warning(
                "expert %s sends no log probabilities, so the cascade %s always escalates",
                answer.expert,
                self.name,
            )
        return confidence(answer.logprobs) >= self.recipe.sure

    def _newest(self) -> MemberAnswer | None:
        """The newest answer with a final answer; None if there is none."""
        return next((a for a in self.answers[::-1] if a.ok and a.final), None)

    def _too_late_for(self, expert: str) -> bool:
        """Whether a call of one more expert would miss the deadline."""
        option = self.selection.expert_in_pool(expert)
        needed_s = option.wait_s + option.answer_s if option is not None else 0.0
        return time.monotonic() + needed_s > self.deadline_s
