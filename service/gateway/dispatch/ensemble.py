"""Runs recipes of several experts: votes and cascades.

The executor compares the members' answers and sends one of them. One failed member does not fail
the request. For a stream, it sends a member's answer as a whole after the decision. Only the last
expert of a cascade streams directly, because its answer is final.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from service.broker.answer_agreement import FinalAnswer, agreed, confidence, final_answer, majority
from service.broker.cost_model import CostModel
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.selection import Selection
from service.errors import CoeError, UnavailableError
from service.gateway.dispatch.internal_expert_calls import BufferedSend
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request_record import ExpertCall, RequestRecord
from service.gateway.response_send import NoAnswerError, ResponseSend
from service.gateway.routing.route_plan import RoutePlan
from service.http.asgi_helpers import send_response
from service.types import MAX_LATER, Recipe

if TYPE_CHECKING:
    from service.gateway.dispatch.dispatcher import Dispatcher

log = logging.getLogger("coe.ensemble")

# Finish reasons of incomplete answers. Incomplete answers can't be compared.
_CUT = frozenset({"length", "content_filter"})
# Experts that ignored a request for log probabilities. The log has one warning for each.
_without_logprobs: set[str] = set()


class NoMemberError(UnavailableError):
    """None of a recipe's members answered."""

    code = "no_member_answered"


@dataclass(slots=True)
class MemberAnswer:
    """The answer of one member.

    Attributes:
        expert: The member.
        record: The record of its call.
        status: The HTTP status; 0 if the call failed.
        body: The whole reply; empty if the call failed.
        text: The text of the answer.
        final: The final answer in the text; None if it has none that can be compared.
        logprobs: (tokens,), log probabilities of the answer's tokens.
        error: The error; None if the call succeeded.
    """

    expert: str
    record: RequestRecord
    status: int = 0
    body: bytes = b""
    text: str = ""
    final: FinalAnswer | None = None
    logprobs: tuple[float, ...] = ()
    error: CoeError | None = None

    @property
    def ok(self) -> bool:
        """Whether there is an answer."""
        return self.error is None and self.status == 200


@dataclass(slots=True)
class EnsembleExecutor:
    """Runs one recipe for one request.

    Attributes:
        dispatcher: Calls experts.
        catalog: The recipes.
        cost_model: Prices calls.
        recipe: The recipe.
        request: The request.
        plan: Its candidates.
        selection: The selection that chose the recipe.
        reply: Receives the answer.
        deadline_s: The deadline, by `time.monotonic`.
        answers: The members' answers so far.
    """

    dispatcher: Dispatcher
    catalog: RecipeCatalog
    cost_model: CostModel
    recipe: Recipe
    request: InferenceRequest
    plan: RoutePlan
    selection: Selection
    reply: ResponseSend
    deadline_s: float
    answers: list[MemberAnswer] = field(default_factory=list)
    _sent: MemberAnswer | None = None

    @property
    def escalations(self) -> int:
        """Number of the recipe's later experts that were called."""
        return sum(1 for answer in self.answers if answer.expert in self.recipe.later)

    async def run(self) -> None:
        """Answer the request.

        Raises:
            CoeError: No member answered. The error is that of the last member.
        """
        try:
            if self.recipe.kind == "vote":
                await self._vote()
            else:
                await self._cascade()
        finally:
            self._charge()

    async def _vote(self) -> None:
        answers = await self._together(self.recipe.members, most=len(self.recipe.members) // 2 + 1)
        at = majority([answer.final if answer.ok else None for answer in answers])
        if at is None:
            good = [answer for answer in answers if answer.ok]
            await (self._send(good[-1]) if good else self._refuse())
            return
        await self._send(answers[at])

    async def _cascade(self) -> None:
        recipe = self.recipe
        members = await self._together(recipe.members, most=None)
        finals = [answer.final if answer.ok else None for answer in members]
        if len(members) == 1 and recipe.sure > 0:
            settled = self._sure(members[0])
        else:
            settled = agreed(finals)
        if settled:
            await self._send(members[0])
            return
        for i, expert in enumerate(recipe.later):
            last = i == len(recipe.later) - 1
            if self._too_late_for(expert) and (newest := self._newest()) is not None:
                await self._send(newest)
                return
            self.reply.record.escalations += 1
            if last and self.request.stream:
                if await self._streamed(expert):
                    return
                break
            began_s = time.monotonic()
            try:
                answer = await self._ask(expert, len(self.answers))
            except asyncio.CancelledError:
                # The client has left, but it still pays for the call in progress.
                self.answers.append(self._cut_short(expert, began_s))
                raise
            self.answers.append(answer)
            agrees = answer.ok and answer.final is not None and answer.final in finals
            if agrees or (last and answer.ok):
                await self._send(answer)
                return
            finals.append(answer.final if answer.ok else None)
        newest = self._newest() or next((a for a in self.answers[::-1] if a.ok), None)
        await (self._send(newest) if newest is not None else self._refuse())

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

    async def _streamed(self, expert: str) -> bool:
        """Stream the last expert's answer to the client; False if the call failed before that."""
        self._account()
        self.reply.answers_only = True
        try:
            await self.dispatcher.dispatch(
                replace(self.request, request_id=f"{self.request.request_id}-{len(self.answers)}"),
                self._only(expert),
                self.reply,
                self.deadline_s,
                recipe=self.name,
            )
        except CoeError as error:
            if self.reply.started:
                raise
            # The time limit belongs to the failed attempt, and has no effect any more.
            self.reply.first_byte_limit = None
            refused = isinstance(error, NoAnswerError)
            self.answers.append(
                MemberAnswer(expert, RequestRecord(), error=None if refused else error)
            )
            return False
        finally:
            self.reply.answers_only = False
        return True

    @property
    def name(self) -> str:
        """The recipe's name in ASCII, for response headers."""
        return self.recipe.ascii_name

    async def _together(self, experts: Sequence[str], most: int | None) -> list[MemberAnswer]:
        """Call several experts at once.

        Args:
            experts: The experts.
            most: Stop waiting as soon as this many answers agree; None waits for all.

        Returns:
            Their answers, in the order of `experts`.
        """
        tasks = {asyncio.create_task(self._ask(expert, i)): i for i, expert in enumerate(experts)}
        found: dict[int, MemberAnswer] = {}
        began_s = time.monotonic()
        try:
            left = set(tasks)
            while left:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    found[tasks[task]] = task.result()
                finals = [a.final for a in found.values() if a.ok and a.final]
                if most is not None and any(finals.count(f) >= most for f in finals):
                    break
        finally:
            # A client that leaves cancels this task, but it still pays for calls in progress.
            for task, i in tasks.items():
                task.cancel()
                found.setdefault(i, self._cut_short(experts[i], began_s))
            await asyncio.gather(*tasks, return_exceptions=True)
            self.answers += [found[i] for i in range(len(experts))]
        return self.answers[-len(experts) :]

    def _cut_short(self, expert: str, began_s: float) -> MemberAnswer:
        """Return the answer of a cancelled call, with an estimate of its tokens by its run time."""
        option = self.selection.expert_in_pool(expert)
        tokens = 0
        if option is not None:
            column = self.catalog.index[expert]
            expected = float(self.selection.request.tokens[column])
            running_s = time.monotonic() - began_s - option.wait_s
            tokens = int(expected * min(1.0, max(0.0, running_s / max(option.answer_s, 1e-3))))
        record = RequestRecord(expert=expert)
        record.calls.append(
            ExpertCall(
                expert,
                self.cost_model.price(expert),
                self.request.prompt_tokens,
                tokens,
                estimated=True,
                ended=False,
            )
        )
        return MemberAnswer(
            expert, record, error=UnavailableError("the answer was no longer needed")
        )

    def _only(self, expert: str) -> RoutePlan:
        row = self.catalog.index[expert]
        return replace(
            self.plan,
            rows=np.array([row]),
            quality=np.ones(1),
            escalation_prob=np.zeros((1, MAX_LATER)),
            first=expert,
            session=None,
        )

    async def _ask(self, expert: str, number: int) -> MemberAnswer:
        """Call one member and wait for its whole answer. Errors are part of the answer.

        Args:
            expert: The member.
            number: Its position among the calls of this request.
        """
        sure = self.recipe.sure > 0 and len(self.recipe.members) == 1 and number == 0
        request = self.request.for_member(number, logprobs=sure)
        buffer = BufferedSend()
        record = self.reply.record
        answer = MemberAnswer(
            expert, RequestRecord(expert=expert, trace=record.trace, losses=record.losses)
        )
        reply = ResponseSend(buffer, [], answer.record)
        try:
            await self.dispatcher.dispatch(request, self._only(expert), reply, self.deadline_s)
        except CoeError as error:
            answer.error = error
            return answer
        answer.status, answer.body = buffer.status, buffer.body
        self._read(answer)
        return answer

    def _read(self, answer: MemberAnswer) -> None:
        try:
            choice = orjson.loads(answer.body)["choices"][0]
            message = choice["message"]
            answer.text = message.get("content") or ""
            tokens = (choice.get("logprobs") or {}).get("content") or []
            answer.logprobs = tuple(float(token["logprob"]) for token in tokens)
        except (orjson.JSONDecodeError, KeyError, TypeError, IndexError, ValueError):
            if answer.status == 200:
                answer.error = UnavailableError(
                    f"expert {answer.expert!r} sent an answer of unknown format"
                )
            return
        if choice.get("finish_reason") not in _CUT and not message.get("refusal"):
            answer.final = final_answer(answer.text, as_json="json" in self.request.needs)

    def _newest(self) -> MemberAnswer | None:
        """The newest answer with a final answer; None if there is none."""
        return next((a for a in self.answers[::-1] if a.ok and a.final), None)

    def _too_late_for(self, expert: str) -> bool:
        """Whether a call of one more expert would miss the deadline."""
        option = self.selection.expert_in_pool(expert)
        needed_s = option.wait_s + option.answer_s if option is not None else 0.0
        return time.monotonic() + needed_s > self.deadline_s

    async def _refuse(self) -> None:
        """Send a member's 4xx reply, if there is one.

        Raises:
            CoeError: The last member's error, or a NoMemberError if there is none.
        """
        refused = [a for a in self.answers if a.error is None and 400 <= a.status < 500]
        if not refused:
            raise self._no_member_error()
        self._account()
        self._sent = refused[-1]
        self.reply.record.expert = refused[-1].expert
        await self._answer(refused[-1].status, b"application/json", refused[-1].body)

    def _no_member_error(self) -> CoeError:
        errors = [a.error for a in self.answers if a.error is not None]
        return errors[-1] if errors else NoMemberError("no member of the recipe answered")

    def _charge(self) -> None:
        """Meter the calls whose answers did not go to the client."""
        if self.reply.meter is None:
            return
        for answer in self.answers:
            for call in answer.record.calls if answer is not self._sent else ():
                self.reply.meter.add(
                    call.expert, call.prompt_tokens or 0, call.completion_tokens or 0
                )

    def _account(self) -> None:
        """Copy the calls so far into the reply's own record."""
        record = self.reply.record
        record.recipe = self.name
        record.calls = [call for answer in self.answers for call in answer.record.calls]
        record.queue_ms = max((a.record.queue_ms for a in self.answers), default=0.0)
        record.swap_ms = max((a.record.swap_ms for a in self.answers), default=0.0)

    async def _send(self, answer: MemberAnswer) -> None:
        """Send a member's answer to the client, as a stream if the client wants one."""
        self._account()
        self._sent = answer
        record = self.reply.record
        record.expert, record.pool = answer.expert, answer.record.pool
        record.clipped = answer.record.clipped
        data = _without_additions(orjson.loads(answer.body), self.request)
        if self.request.stream:
            content_type, body = b"text/event-stream; charset=utf-8", _as_stream(data, self.request)
        else:
            content_type, body = b"application/json", orjson.dumps(data)
        await self._answer(200, content_type, body)

    async def _answer(self, status: int, content_type: bytes, body: bytes) -> None:
        await send_response(self.reply, status, [(b"content-type", content_type)], body)


def _without_additions(data: dict[str, Any], request: InferenceRequest) -> dict[str, Any]:
    """Remove `usage.coe` from a member's reply, and logprobs that only the cascade requested."""
    if isinstance(usage := data.get("usage"), dict):
        usage.pop("coe", None)
    if not request.data.get("logprobs"):
        for choice in data["choices"]:
            choice["logprobs"] = None
    return data


def _as_stream(data: dict[str, Any], request: InferenceRequest) -> bytes:
    """Convert a whole chat completion to the events of a stream."""
    head = {k: v for k, v in data.items() if k not in ("choices", "usage")}
    head["object"] = "chat.completion.chunk"
    message = data["choices"][0]["message"]
    delta = {"role": "assistant", "content": message.get("content") or ""}
    if message.get("reasoning"):
        delta["reasoning"] = message["reasoning"]
    reason = data["choices"][0].get("finish_reason") or "stop"

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: " + orjson.dumps({**head, "choices": choices, **more}) + b"\n\n"

    events = event([{"index": 0, "delta": delta, "finish_reason": None}])
    events += event([{"index": 0, "delta": {}, "finish_reason": reason}])
    if (request.data.get("stream_options") or {}).get("include_usage") and data.get("usage"):
        events += event([], usage=data["usage"])
    return events + b"data: [DONE]\n\n"
