"""Calls the experts of one recipe for one request, and sends one of their answers.

`EnsembleExecutor`, `DeliberationExecutor` and `RecruitExecutor` decide whom to call, and which
answer to send. One failed member does not fail the request. For a stream, a member's answer goes
out as a whole after the decision; only an answer that is final in any case streams directly.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from service.broker.answer_agreement import FinalAnswer, final_answer
from service.broker.cost_model import CostModel
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.round_gains import RoundGains
from service.broker.selection import Selection
from service.errors import CoeError, UnavailableError
from service.gateway.dispatch.internal_expert_calls import BufferedSend
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request_record import CallRole, ExpertCall, RequestRecord
from service.gateway.response_send import NoAnswerError, ResponseSend
from service.gateway.routing.route_plan import RoutePlan
from service.http.asgi_helpers import send_response
from service.http.token_usage import estimate_tokens
from service.types import MAX_LATER, Recipe

if TYPE_CHECKING:
    from service.gateway.dispatch.dispatcher import Dispatcher

# Finish reasons of incomplete answers. Incomplete answers can't be compared.
_CUT = frozenset({"length", "content_filter"})
# Where an answer has its thoughts; some endpoints send them under both names.
_THOUGHTS = ("reasoning", "reasoning_content")
# Time for sending an answer before the deadline.
_SEND_S = 0.05


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
        text_bytes: The bytes of that and of its thoughts.
        final: The final answer in the text; None if it has none that can be compared.
        logprobs: (tokens,), log probabilities of the answer's tokens.
        error: The error; None if the call succeeded.
    """

    expert: str
    record: RequestRecord
    status: int = 0
    body: bytes = b""
    text: str = ""
    text_bytes: int = 0
    final: FinalAnswer | None = None
    logprobs: tuple[float, ...] = ()
    error: CoeError | None = None

    @property
    def ok(self) -> bool:
        """Whether there is an answer."""
        return self.error is None and self.status == 200


@dataclass(frozen=True, slots=True)
class MemberCall:
    """A call of one member.

    Attributes:
        expert: The member.
        request: What it is asked.
        role: What the call is for; None where the recipe has no roles.
        round: The round of a deliberation, from 1 on; None for other recipes.
    """

    expert: str
    request: InferenceRequest
    role: CallRole | None = None
    round: int | None = None


@dataclass(slots=True)
class MemberCalls:
    """The calls of one recipe for one request.

    Attributes:
        dispatcher: Calls experts.
        catalog: The recipes.
        cost_model: Prices calls.
        recipe: The recipe.
        request: The request.
        plan: Its candidates.
        selection: The selection that chose the recipe.
        position: That of the recipe in the selection.
        reply: Receives the answer.
        deadline_s: The deadline, by `time.monotonic`.
        round_gains: What further rounds of deliberations gain.
        answers: The members' answers so far.
    """

    dispatcher: Dispatcher
    catalog: RecipeCatalog
    cost_model: CostModel
    recipe: Recipe
    request: InferenceRequest
    plan: RoutePlan
    selection: Selection
    position: int
    reply: ResponseSend
    deadline_s: float
    round_gains: RoundGains
    answers: list[MemberAnswer] = field(default_factory=list)
    _sent: MemberAnswer | None = None
    _numbers: int = 0

    @property
    def escalations(self) -> int | None:
        """How many of the recipe's later steps were taken; None where that tells nothing."""
        raise NotImplementedError

    async def answer(self) -> None:
        """Call members, and send an answer."""
        raise NotImplementedError

    async def run(self) -> None:
        """Answer the request.

        Raises:
            CoeError: No member answered. The error is that of the last member.
        """
        try:
            await self.answer()
        finally:
            self._charge()

    @property
    def name(self) -> str:
        """The recipe's name in ASCII, for response headers."""
        return self.recipe.ascii_name

    @property
    def until_s(self) -> float:
        """When an answer must be sent, so that it arrives before the deadline."""
        return self.deadline_s - _SEND_S

    def next_id(self) -> str:
        """A request id for one more call."""
        self._numbers += 1
        return f"{self.request.request_id}-{self._numbers - 1}"

    def member_request(self, *, logprobs: bool = False) -> InferenceRequest:
        """The client's request, as it is sent to one member."""
        return replace(self.request.for_member(0, logprobs=logprobs), request_id=self.next_id())

    def system_bytes(self, expert: str, request: InferenceRequest) -> int:
        """The bytes of the system prompt that an expert's defaults add to a request."""
        return self.dispatcher.defaults.system_bytes(request, expert)

    async def streamed(self, call: MemberCall, *, deadline_s: float | None = None) -> bool:
        """Stream an expert's answer to the client; False if the call failed before that.

        Args:
            call: The call, whose request streams.
            deadline_s: The deadline of the first token; None for that of the client.
        """
        self.account()
        self.reply.answers_only = True
        self.reply.role, self.reply.round = call.role, call.round
        try:
            await self.dispatcher.dispatch(
                call.request,
                self.only(call.expert),
                self.reply,
                self.deadline_s if deadline_s is None else deadline_s,
                recipe=self.name,
            )
        except CoeError as error:
            if self.reply.started:
                raise
            # The time limit belongs to the failed attempt, and has no effect any more.
            self.reply.first_byte_limit = None
            self.reply.expert_call = None
            refused = isinstance(error, NoAnswerError)
            self.answers.append(
                MemberAnswer(call.expert, RequestRecord(), error=None if refused else error)
            )
            return False
        finally:
            self.reply.answers_only = False
        return True

    async def together(
        self, calls: Sequence[MemberCall], *, most: int | None = None, until_s: float | None = None
    ) -> list[MemberAnswer]:
        """Make several calls at once.

        Args:
            calls: The calls.
            most: Stop waiting as soon as this many answers agree; None waits for all.
            until_s: Stop waiting at this time, by `time.monotonic`; None waits for all.

        Returns:
            Their answers, in the order of `calls`.
        """
        tasks = {asyncio.create_task(self.ask(call)): i for i, call in enumerate(calls)}
        found: dict[int, MemberAnswer] = {}
        began_s = time.monotonic()
        try:
            left = set(tasks)
            while left:
                wait_s = None if until_s is None else max(0.0, until_s - time.monotonic())
                done, left = await asyncio.wait(
                    left, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    found[tasks[task]] = task.result()
                finals = [a.final for a in found.values() if a.ok and a.final]
                if most is not None and any(finals.count(f) >= most for f in finals):
                    break
                if not done:
                    break
        finally:
            # A client that leaves cancels this task, but it still pays for calls in progress.
            for task, i in tasks.items():
                task.cancel()
                if i not in found:
                    found[i] = self.cut_short(calls[i], began_s)
            await asyncio.gather(*tasks, return_exceptions=True)
            self.answers += [found[i] for i in range(len(calls))]
        return self.answers[len(self.answers) - len(calls) :]

    def cut_short(self, call: MemberCall, began_s: float) -> MemberAnswer:
        """Return the answer of a cancelled call, with an estimate of its tokens by its run time."""
        expert = call.expert
        option = self.selection.expert_in_pool(expert)
        tokens = 0
        if option is not None:
            column = self.catalog.index[expert]
            expected = float(self.selection.request.tokens[column])
            running_s = time.monotonic() - began_s - option.wait_s
            tokens = int(expected * min(1.0, max(0.0, running_s / max(option.answer_s, 1e-3))))
            if (most := call.request.most_tokens) is not None:
                tokens = min(tokens, most)  # a review is shorter than an answer
        record = RequestRecord(expert=expert)
        record.calls.append(
            ExpertCall(
                expert,
                self.cost_model.price(expert),
                call.request.prompt_tokens,
                tokens,
                estimated=True,
                ended=False,
                role=call.role,
                round=call.round,
            )
        )
        return MemberAnswer(
            expert, record, error=UnavailableError("the answer was no longer needed")
        )

    def only(self, expert: str) -> RoutePlan:
        """The plan that leaves one expert."""
        row = self.catalog.index[expert]
        return replace(
            self.plan,
            rows=np.array([row]),
            quality=np.ones(1),
            escalation_prob=np.zeros((1, MAX_LATER)),
            first=expert,
            session=None,
        )

    async def ask(self, call: MemberCall) -> MemberAnswer:
        """Make one call and wait for its whole answer. Errors are part of the answer."""
        buffer = BufferedSend()
        record = self.reply.record
        answer = MemberAnswer(
            call.expert,
            RequestRecord(expert=call.expert, trace=record.trace, losses=record.losses),
        )
        reply = ResponseSend(buffer, [], answer.record)
        reply.role, reply.round = call.role, call.round
        try:
            await self.dispatcher.dispatch(
                call.request, self.only(call.expert), reply, self.deadline_s
            )
        except CoeError as error:
            answer.error = error
            return answer
        answer.status, answer.body = buffer.status, buffer.body
        self._read(answer, as_json="json" in call.request.needs)
        if answer.ok:
            _estimate_uncounted(answer, call.request)
        return answer

    def _read(self, answer: MemberAnswer, *, as_json: bool) -> None:
        if answer.status != 200:
            return
        try:
            choices = orjson.loads(answer.body)["choices"]
            message = choices[0]["message"]
            text = message.get("content") or ""
            if not isinstance(text, str) or not all(isinstance(one, dict) for one in choices):
                raise TypeError("the content is no text")
            tokens = (choices[0].get("logprobs") or {}).get("content") or []
            answer.logprobs = tuple(float(token["logprob"]) for token in tokens)
            comparable = choices[0].get("finish_reason") not in _CUT and not message.get("refusal")
        # A remote endpoint may send anything, and its fault must not be that of the other members.
        except (LookupError, TypeError, ValueError, AttributeError):
            answer.error = UnavailableError(
                f"expert {answer.expert!r} sent an answer of unknown format"
            )
            return
        answer.text = text
        given = (message.get(name) for name in _THOUGHTS)
        thoughts = next((one for one in given if isinstance(one, str)), "")
        answer.text_bytes = len((text + thoughts).encode("utf-8", "replace"))
        if comparable:
            answer.final = final_answer(text, as_json=as_json)

    async def refuse(self) -> None:
        """Send a member's 4xx reply, if there is one.

        Raises:
            CoeError: The last member's error, or a NoMemberError if there is none.
        """
        refused = [a for a in self.answers if a.error is None and 400 <= a.status < 500]
        if not refused:
            raise self._no_member_error()
        self.account()
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

    def account(self) -> None:
        """Copy the calls so far into the reply's own record."""
        record = self.reply.record
        record.recipe = self.name
        record.calls = [call for answer in self.answers for call in answer.record.calls]
        record.queue_ms = max((a.record.queue_ms for a in self.answers), default=0.0)
        record.swap_ms = max((a.record.swap_ms for a in self.answers), default=0.0)

    async def send(self, answer: MemberAnswer) -> None:
        """Send a member's answer to the client, as a stream if the client wants one."""
        self.account()
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


def _estimate_uncounted(answer: MemberAnswer, request: InferenceRequest) -> None:
    """Count an answer without usage by its size. An answer must not be free for that."""
    for call in answer.record.calls[-1:]:
        if call.prompt_tokens is None:
            call.prompt_tokens, call.estimated = request.prompt_tokens, True
        if call.completion_tokens is None:
            call.completion_tokens = max(1, estimate_tokens(answer.text_bytes))
            call.estimated = True


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
