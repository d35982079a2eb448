"""Runs deliberations: members answer, review each other's answers, and vote, in rounds.

`service/broker/deliberation.py` has the votes and the rule that ends it,
`service/broker/peer_review.py` the prompts. The best answer so far is sent when the deadline or
`max_cost` leaves no room for another step.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from service.broker.deliberation import (
    Reviews,
    RoundPrice,
    StopReason,
    all_agree,
    leader,
    leader_belief,
    stop_reason,
    unanimous,
)
from service.broker.peer_review import (
    Ballot,
    ballots,
    corrections_of,
    read_reviews,
    review_prompt,
    revise_prompt,
)
from service.broker.prompt_fences import shown, shown_bytes
from service.broker.round_gains import HeldRound
from service.gateway.dispatch.member_calls import MemberAnswer, MemberCall, MemberCalls
from service.gateway.dispatch.pool_errors import deadline_error
from service.gateway.dispatch.step_requests import LEAST_TOKENS, review_request, revised_request
from service.gateway.request.conversation_text import conversation_text
from service.gateway.request.parsing import InferenceRequest
from service.types import Deliberation

log = logging.getLogger("coe.deliberation")


@dataclass(slots=True)
class DeliberationExecutor(MemberCalls):
    """Runs one deliberation for one request.

    Attributes:
        rng: Shuffles the answers for each reviewer.
    """

    rng: random.Random = field(default_factory=random.SystemRandom)
    _stopped: StopReason | None = None
    _steps: int = 0

    @property
    def escalations(self) -> int | None:
        """How many steps followed the first answers; None where they were cut off."""
        cut = self._stopped in (StopReason.DEADLINE, StopReason.MAX_COST, None)
        return None if cut else self._steps

    async def answer(self) -> None:
        """Hold the rounds, and send the answer that leads at the end.

        Raises:
            DeadlineExceededError: No member answered before the deadline.
            CoeError: No member answered.
        """
        settings = self.recipe.deliberation
        assert settings is not None
        best = await self._best(settings)
        record = self.reply.record
        record.stopped = None if self._stopped is None else self._stopped.value
        if best is not None:
            await self.send(best)
        elif self._stopped is StopReason.DEADLINE:
            self.account()
            raise deadline_error(self.request, silent=False)
        else:
            await self.refuse()

    async def _best(self, settings: Deliberation) -> MemberAnswer | None:
        """Hold the rounds.

        Returns:
            The best answer; None without any.
        """
        record = self.reply.record
        members = list(enumerate(self.recipe.members))
        best: MemberAnswer | None = None
        best_at: int | None = None
        belief = 0.5
        corrections: Sequence[str] = ()
        for number in range(1, settings.rounds + 1):
            began_s, calls_before = time.monotonic(), len(self.answers)
            if (asked := self._answer_calls(members, number, best, corrections)) is None:
                return self._stop(StopReason.MAX_COST, best)
            if number > 1:
                self._steps = number
                record.escalations += 1
            given = await self.together(asked, until_s=self.until_s)
            if number == 1 or any(answer.ok for answer in given):
                record.rounds = number
            late = time.monotonic() >= self.until_s
            answers = {at: a for (at, _), a in zip(members, given, strict=True) if a.ok}
            if not answers or (late and number > 1 and len(answers) < len(members)):
                # Half a round says less than the round before.
                return self._stop(StopReason.DEADLINE if late else StopReason.NO_ANSWER, best)
            members = [(at, name) for at, name in members if at in answers]
            finals = {at: answer.final for at, answer in answers.items()}
            first_at = leader({}, finals, settings.votes, best_at)
            assert first_at is not None
            if all_agree(list(finals.values())):
                self._learn(best, answers[first_at], belief, 1.0)
                return self._stop(StopReason.AGREED, answers[first_at])
            if len(answers) == 1:
                return self._stop(StopReason.NO_REVIEWS, answers[first_at])
            if number == 1:
                best, best_at = answers[first_at], first_at
            if late or time.monotonic() + (time.monotonic() - began_s) > self.until_s:
                return self._stop(StopReason.DEADLINE, best)
            reviews = await self._reviews(settings, answers, number)
            if reviews is None:
                return self._stop(StopReason.MAX_COST, best)
            self._steps = max(self._steps, 1)
            leader_at = leader(reviews, finals, settings.votes, best_at)
            assert leader_at is not None
            before, doubted = (best if number > 1 else None), belief
            belief = leader_belief(reviews, finals, leader_at)
            same = before is not None and self._same(before, answers[leader_at])
            best, best_at = answers[leader_at], leader_at
            if time.monotonic() >= self.until_s:
                return self._stop(StopReason.DEADLINE, best)
            if not reviews:
                log.warning("no review of %s could be read", self.name)
                return self._stop(StopReason.NO_REVIEWS, best)
            self._learn(before, best, doubted, belief)
            took_s = time.monotonic() - began_s
            spent = sum(
                call.cost for answer in self.answers[calls_before:] for call in answer.record.calls
            )
            request = self.selection.request
            why = stop_reason(
                rounds_held=number,
                most_rounds=settings.rounds,
                settled=same or unanimous(reviews, leader_at),
                belief=belief,
                gain=self.round_gains.draw(self.recipe, self.rng),
                # Another round is taken to be like this one.
                price=RoundPrice(spent, took_s, request.cost_price, request.time_price),
            )
            if why is None and time.monotonic() + took_s > self.until_s:
                why = StopReason.DEADLINE
            if why is not None:
                return self._stop(why, best)
            corrections = corrections_of(reviews, leader_at)
        return self._stop(StopReason.ROUNDS, best)

    def _learn(
        self, before: MemberAnswer | None, best: MemberAnswer, belief: float, now: float
    ) -> None:
        """Learn what a further round gained, from the beliefs in the leading answers."""
        if before is not None:
            held = HeldRound(belief, now, changed=not self._same(before, best))
            self.round_gains.observe(self.recipe, held)

    def _stop(self, why: StopReason, best: MemberAnswer | None) -> MemberAnswer | None:
        self._stopped = why
        return best

    @staticmethod
    def _same(one: MemberAnswer, other: MemberAnswer) -> bool:
        """Whether two answers are the same one, or of the same member where none can compare."""
        if one.final is None or other.final is None:
            return one.expert == other.expert
        return one.final == other.final

    def _answer_calls(
        self,
        members: Sequence[tuple[int, str]],
        number: int,
        best: MemberAnswer | None,
        corrections: Sequence[str],
    ) -> list[MemberCall] | None:
        """The calls for the answers of a round; None where `max_cost` leaves no room for them."""
        settings = self.recipe.deliberation
        assert settings is not None
        requests = [self.member_request() for _ in members]
        if number > 1 and best is not None:
            answer = shown(best.text, shown_bytes(self.request.most_tokens))
            prompt = revise_prompt(settings.revise, answer, corrections, _new_mark)
            requests = [revised_request(request, prompt) for request in requests]
            bounded = self._within_cost(requests, [name for _, name in members])
            if bounded is None:
                return None
            requests = bounded
        return [
            MemberCall(name, request, "answer", number)
            for (_, name), request in zip(members, requests, strict=True)
        ]

    async def _reviews(
        self, settings: Deliberation, answers: Mapping[int, MemberAnswer], number: int
    ) -> Reviews | None:
        """Let every member that answered review the others' answers.

        Returns:
            The reviews that came and could be read; None where `max_cost` leaves no room for them.
        """
        most_bytes = shown_bytes(self.request.most_tokens)
        texts = {at: shown(answer.text, most_bytes) for at, answer in answers.items()}
        question = conversation_text(self.request.data)
        cast: list[Ballot] = ballots(list(answers), list(answers), self.rng)
        most_tokens = min(settings.review_tokens, self.request.clipped or settings.review_tokens)
        names = [answers[ballot.reviewer].expert for ballot in cast]
        requests = [
            review_request(
                self.member_request(),
                review_prompt(settings.review, question, texts, ballot, _new_mark),
                most_tokens,
                greedy=not self.dispatcher.is_remote(name),
            )
            for ballot, name in zip(cast, names, strict=True)
        ]
        bounded = self._within_cost(requests, names)
        if bounded is None:
            return None
        calls = [
            MemberCall(name, request, "review", number)
            for name, request in zip(names, bounded, strict=True)
        ]
        given = await self.together(calls, until_s=self.until_s)
        found = {
            ballot.reviewer: read_reviews(answer.text, ballot)
            for ballot, answer in zip(cast, given, strict=True)
            if answer.ok
        }
        return {reviewer: seen for reviewer, seen in found.items() if seen}

    def _within_cost(
        self, requests: Sequence[InferenceRequest], experts: Sequence[str]
    ) -> list[InferenceRequest] | None:
        """Bound a step's calls by what the calls so far have left of `max_cost`.

        Returns:
            The requests; None where the step can't be paid for.
        """
        most = self.request.max_cost
        if most is None:
            return list(requests)
        spent = sum(call.cost for answer in self.answers for call in answer.record.calls)
        prices = [self.cost_model.price(name) for name in experts]
        # A text never has more tokens than bytes.
        prompts = math.fsum(
            price.prompt * (request.most_prompt_tokens + self.system_bytes(name, request)) / 1e6
            for price, name, request in zip(prices, experts, requests, strict=True)
        )
        per_token = math.fsum(price.completion for price in prices) / 1e6
        left = most - spent - prompts
        if left < LEAST_TOKENS * per_token or left < 0:
            return None
        if per_token <= 0:
            return list(requests)
        affordable = int(left / per_token)
        return [
            request
            if request.most_tokens is not None and request.most_tokens <= affordable
            else replace(request.at_most(affordable), clipped=request.clipped)
            for request in requests
        ]


def _new_mark() -> str:
    """A mark that no answer can know: 96 random bits."""
    return secrets.token_hex(12)
