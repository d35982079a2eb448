"""Calls one expert of a request, forwards the answer, and chooses another expert after a fault.

`RecipeExecutor` chooses first, by `Dispatcher.select_first`; `broker.selection` has the formula.
Until the first byte has gone to the client, a fault makes `dispatch` choose again, among the single
experts and pools that are left. After that, a fault ends the stream with an SSE error event.
`retry_decisions` defines error, fault, loss and failed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from service.broker.cost_model import CostModel
from service.broker.pool_state import Floats, Place, PoolStateTable, PoolView
from service.broker.quality_cost_bounds import FIRST_BROKEN_BOUND, Exclusion, worst_costs
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.selection import ExpertInPool, Selection, SelectionRequest, idle_times, select
from service.broker.sole_candidate import select_sole
from service.broker.thinking_lengths import ThinkingWorth
from service.broker.unmet_demand import can_serve, failure_reason
from service.engine.engine_interface import EngineRequest
from service.errors import (
    CoeError,
    DeadlineExceededError,
    EngineDiedTwiceError,
    EngineTimeoutError,
    ExpertFailedError,
    InvalidRequestError,
    PoolStoppedError,
    PoolUnavailableError,
    PoolUnreachableError,
    UnavailableError,
    UpstreamError,
)
from service.gateway.budget_prices import BudgetPrices
from service.gateway.dispatch.circuit_breakers import CircuitBreakers
from service.gateway.dispatch.pool_errors import (
    RETRIED,
    deadline_error,
    error_from_fault,
    read_whole_answer,
)
from service.gateway.dispatch.remote_pool import RemotePool, remote_pool_view
from service.gateway.dispatch.retry_decisions import (
    MOST_LOSSES,
    AfterFault,
    WithoutOption,
    after_fault,
    is_loss,
    tries_per_pool,
    without_option,
)
from service.gateway.folder_redaction import without_folders
from service.gateway.request.expert_defaults import RequestDefaults
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request.token_limits import within_context, within_cost
from service.gateway.request_record import ExpertCall, RequestRecord, Unfinished
from service.gateway.response_send import ResponseSend
from service.gateway.routing.candidate_planner import selection_request
from service.gateway.routing.demand_reporter import DemandReporter
from service.gateway.routing.prefix_affinity import PrefixAffinity, prefix_of
from service.gateway.routing.request_bounds import infeasible_error
from service.gateway.routing.route_plan import RoutePlan
from service.http.asgi_helpers import body_message, send_response, start_response
from service.http.error_formats import FAULT_HEADER
from service.http.prompt_endpoints import TABLE
from service.rpc.call_headers import ENGINE_MS, QUEUE_MS, SWAP_MS, Call
from service.rpc.http_connections import HttpReply
from service.rpc.pool_directory import PoolDirectory

if TYPE_CHECKING:
    from service.telemetry.tracing import Trace


log = logging.getLogger("coe.dispatch")


# The pool enforces the deadline. The gateway waits a little longer, and then gives up, so that a
# hanging pool can't keep a client waiting for ever.
_GRACE_S = 1.0
# Most bytes of an answer that are passed on at once.
_CHUNK_BYTES = 2**18


class Dispatcher:
    """Selects candidates and calls their experts.

    Args:
        catalog: The recipes.
        cost_model: Estimates tokens and costs of calls.
        directory: Links to pools.
        remote_pools: Remote experts, by name.
        wake: Requests the start of a pool for an expert that no running pool holds.
        budget_prices: Prices the tenants' budgets.
        breakers: The circuit breakers.
        prefix_affinity: Knows which engine has a conversation in its prefix cache.
        defaults: The defaults of the experts.
        remote_variants: The variants of remote experts, each with its base.
    """

    def __init__(
        self,
        catalog: RecipeCatalog,
        cost_model: CostModel,
        directory: PoolDirectory,
        remote_pools: Mapping[str, RemotePool],
        wake: Callable[[str], None],
        budget_prices: BudgetPrices,
        breakers: CircuitBreakers,
        prefix_affinity: PrefixAffinity,
        defaults: RequestDefaults,
        remote_variants: Mapping[str, str],
    ) -> None:
        self.defaults = defaults
        self._remote_variants = remote_variants
        self.budget_prices = budget_prices
        self.prefix_affinity = prefix_affinity
        self.catalog = catalog
        self.breakers = breakers
        self.cost_model = cost_model
        self._pool_table = PoolStateTable(catalog.index)
        self._directory = directory
        # A request finds the table up to date, however many snapshots came since the last one.
        self._stop_listening = directory.listen(self._pool_table.update)
        self._remote_pools = remote_pools
        self._wake = wake
        self._demand_reporter = DemandReporter(directory, self.views)

    def is_remote(self, expert: str) -> bool:
        """Whether an expert is at an endpoint of others, and in no pool."""
        return expert in self._remote_pools or expert in self._remote_variants

    async def close(self) -> None:
        """Stop following the pools' states, and stop reporting unmet demand."""
        self._stop_listening()
        await self._demand_reporter.close()

    def views(self) -> list[PoolView]:
        """The state of every pool, with this gateway's own unacknowledged requests."""
        now_s = time.monotonic()
        views = [
            PoolView(link.address.boot, link.snapshot, link.age_s(now_s), link.unseen())
            for link in self._directory.links()
            if link.snapshot is not None
        ]
        if self._remote_pools:
            views.append(remote_pool_view(self._remote_pools, self._remote_variants))
        return views

    def context(self, expert: str) -> int:
        """An expert's context in tokens, the greatest in any pool; 0 if it is unknown."""
        return self._directory.context(expert)

    def weigh_candidates(
        self,
        request: InferenceRequest,
        plan: RoutePlan,
        *,
        left_s: float | None = None,
        excluded: frozenset[Place] = frozenset(),
        views: list[PoolView] | None = None,
        chosen_only: bool = False,
    ) -> Selection:
        """Compute the utility of every candidate now, without side effects.

        U = quality − price·cost − price·(wait + displaced); see `broker/selection.py`.

        Args:
            request: The request.
            plan: Its candidates.
            left_s: Seconds left until the deadline; None means the whole deadline.
            excluded: Places, as (expert, pool's boot id), that must not be selected.
            views: The state of every pool; None means the current state.
            chosen_only: Whether nothing is asked of the selection but the choice: nothing of
                experts and pools that are no candidates.
        """
        excluded |= self.breakers.blocked()
        views = self.views() if views is None else views
        wanted = selection_request(
            self.cost_model,
            request,
            plan,
            left_s=left_s,
            excluded=excluded,
            budget_price=self.budget_prices.cost_price(request.tenant),
            prefix_cache=self.prefix_affinity.hint(request, views),
            added=self.defaults.added(request, self.catalog.experts),
            saved_tokens=self.defaults.saved_thinking(request, self.catalog.experts, plan.category),
        )
        if chosen_only:
            sole = select_sole(self.catalog, self._pool_table, views, wanted)
            if sole is not None:
                return sole
        return select(self.catalog, self._pool_table.to_matrix(views), wanted)

    def idle_times(self, request: SelectionRequest) -> Floats:
        """(rows,), the expected time of each candidate if its experts were resident and idle."""
        return idle_times(self.catalog, self._pool_table.to_matrix(self.views()), request)

    async def dispatch(
        self,
        request: InferenceRequest,
        plan: RoutePlan,
        reply: ResponseSend,
        deadline_s: float,
        *,
        first_selection: Selection | None = None,
        recipe: str = "",
    ) -> None:
        """Let one expert answer, with retries.

        Args:
            request: The request.
            plan: Its candidates; only single experts among them are called.
            reply: Receives the answer.
            deadline_s: The deadline, by `time.monotonic`.
            first_selection: The selection that the first attempt uses; None: the dispatcher's own.
            recipe: The recipe that this call is part of; empty for none.

        Raises:
            CoeError: The request failed, and nothing has been sent.
        """
        record = reply.record
        fault: CoeError | None = None
        single = plan.only(self.catalog.single[plan.rows], "failed")
        self.breakers.record_request()
        while True:
            if len(record.losses) >= MOST_LOSSES:
                # `losses` is shared by all calls of a recipe; another call may have added the
                # second.
                raise _died_twice_error()
            found = self._next_option(request, single, record, fault, deadline_s, first_selection)
            first_selection = None
            if found is None:
                await self._wait_for_pool(plan, deadline_s)
                continue
            option, worth = found
            record.expert = option.expert
            record.recipe = recipe or option.expert
            record.local = option.boot is not None
            record.predicted_wait_s = option.wait_s
            record.attempts += 1
            if (tried := record.tried[option.expert, option.boot]) > 0:
                await self.breakers.wait_before_retry(tried)
            record.tried[option.expert, option.boot] += 1
            left_s = deadline_s - time.monotonic()
            try:
                # This expert may cost more per token than the first one.
                context = self.context(option.expert)
                own = self.defaults.apply(request, option.expert, plan.category, worth)
                bounded = within_cost(own, (option.expert,), self.cost_model, (context,))
            except InvalidRequestError as error:
                raise fault or error from None
            bounded = within_context(bounded, option.expert, context)
            record.clipped = bounded.clipped
            try:
                with (
                    _traced(record.trace, option, request) as trace,
                    self.breakers.attempt(option.expert, option.boot, left_s) as attempt,
                ):
                    await self._attempt(option, bounded, deadline_s, reply, trace)
                    if reply.stream_error is not None:
                        attempt.record_stream_error(reply.stream_error)
                return
            except (UnavailableError, UpstreamError) as error:
                if reply.started:
                    await reply.break_off(error)
                    return
                fault = error
                if is_loss(error):
                    record.losses.append(option.boot)
                if not isinstance(error, DeadlineExceededError):
                    record.failed.append((option.expert, error.code))
                    self.breakers.forget_all_but([view.boot for view in self.views()])
                match after_fault(error, len(record.losses)):
                    case AfterFault.DIED_TWICE:
                        raise _died_twice_error() from None
                    case AfterFault.RAISE:
                        raise
                    case AfterFault.RETRY_WITHIN_BUDGET if not self.breakers.pay_for_retry():
                        raise

    def select_first(self, request: InferenceRequest, plan: RoutePlan, left_s: float) -> Selection:
        """Make the first selection for a request, and report the demand that it leaves unmet.

        Args:
            request: The request.
            plan: Its candidates.
            left_s: Seconds left of the deadline.

        Raises:
            InfeasibleBoundsError: Every candidate breaks the request's bounds.
        """
        views = self.views()
        selection = self.weigh_candidates(
            request, plan, left_s=left_s, views=views, chosen_only=True
        )
        self.budget_prices.observe(request.tenant, selection)
        position = selection.best_position()
        if position is None:
            self._refuse_broken_bounds(selection)
            return selection
        self._wake_better(plan, selection, position, views)
        if wanted := selection.unmet_experts(position):
            self._demand_reporter.add(wanted, selection.unmet_utility(position))
        return selection

    def _refuse_broken_bounds(self, selection: Selection) -> None:
        """Refuse the request if every candidate breaks its bounds.

        `RecipeExecutor.within_bounds` has dropped such candidates before. If all that were left
        break a bound now, their expected cost or time has changed since.

        Raises:
            InfeasibleBoundsError: Every candidate breaks a bound.
        """
        if len(selection.exclusion) and (selection.exclusion >= FIRST_BROKEN_BOUND).all():
            request = selection.request
            worst = worst_costs(
                self.catalog, request.rows, request.cost, request.steps, request.recruitable
            )
            raise infeasible_error(
                self.catalog,
                request.bounds,
                request.rows,
                request.quality,
                worst,
                self.idle_times(request),
            )

    def _next_option(
        self,
        request: InferenceRequest,
        plan: RoutePlan,
        record: RequestRecord,
        fault: CoeError | None,
        deadline_s: float,
        first_selection: Selection | None,
    ) -> tuple[ExpertInPool, ThinkingWorth] | None:
        """Find the best expert and pool that are left; None if the request has to wait for a pool.

        Raises:
            CoeError: No candidate is left, and waiting would not help.
        """
        # A pool is tried again only if its engine died, because the pool starts another engine,
        # or if the connection to the pool was lost or could not be made.
        tries = tries_per_pool(fault)
        # After a fault: first places tried less than once, then less than twice.
        bounds = range(min(1, len(record.tried)), tries + 1)
        if (
            first_selection is not None
            and (found := self._best_option(first_selection, record)) is not None
        ):
            return found
        views = self.views()
        # While a tool call is open, its expert is tried again before another one is.
        locked = plan.session is not None and plan.session.locked
        for only_locked, most in product((True, False) if locked else (False,), bounds):
            excluded = frozenset(key for key, count in record.tried.items() if count >= most)
            left_s = max(0.0, deadline_s - time.monotonic())
            selection = self.weigh_candidates(
                request, plan, left_s=left_s, excluded=excluded, views=views
            )
            if only_locked and not selection.locked:
                continue
            if (found := self._best_option(selection, record)) is not None:
                return found
        experts = self._experts(plan)
        shut = self.breakers.blocked()
        there = [(name, v.boot) for v in views for name in experts if can_serve(v, name)]
        reason = failure_reason(plan.first, views)
        match without_option(
            fault,
            attempts=record.attempts,
            resting=any(place in shut for place in there),
            usable=bool(there),
            failed=reason is not None,
        ):
            case WithoutOption.RAISE_FAULT:
                assert fault is not None
                raise fault
            case WithoutOption.REFUSE_AS_RESTING:
                raise self.breakers.refusal(experts)
            case WithoutOption.REFUSE_AS_FAILED:
                raise ExpertFailedError(
                    f"expert {plan.first!r} could not be loaded: {without_folders(reason or '')}",
                    retry_after_s=30,
                )
        return None

    def _best_option(
        self, selection: Selection, record: RequestRecord
    ) -> tuple[ExpertInPool, ThinkingWorth] | None:
        """The best expert and pool, and what the expert's thinking is worth."""
        position = selection.best_position()
        if position is None:
            return None
        record.predicted_cost = float(selection.cost[position])
        self.note_session(selection, position, record)
        request = selection.request
        expert = self.catalog.recipes[int(request.rows[position])].members[0]
        option = selection.expert_in_pool(expert)
        if option is None:
            return None
        # Nobody reads along while it thinks, so that its time counts in full.
        price = request.cost_price * self.cost_model.price(expert).completion / 1e6
        price += request.time_price * option.token_s
        return option, ThinkingWorth(float(request.quality[position]), price)

    def note_session(self, selection: Selection, position: int, record: RequestRecord) -> None:
        """Record how the conversation's session took part in a choice.

        Args:
            selection: The selection.
            position: That of the chosen recipe in the selection.
            record: The request's record.
        """
        terms, outcome = selection.request.session, selection.session_outcome(position)
        if terms is None or outcome is None:
            return
        if outcome.reason == Exclusion.CIRCUIT_OPEN.name.lower() and record.tried:
            # Places that were tried already are excluded in the same way.
            outcome = replace(outcome, reason="failed")
        if outcome.reason is not None and terms.row is not None and outcome != record.session:
            log.info(
                "the session's %s can't answer the next turn (%s)",
                self.catalog.recipes[terms.row].name,
                outcome.reason,
            )
        record.session = outcome

    def _experts(self, plan: RoutePlan) -> list[str]:
        return [self.catalog.recipes[row].members[0] for row in plan.rows.tolist()]

    def _wake_better(
        self, plan: RoutePlan, selection: Selection, position: int, views: list[PoolView]
    ) -> None:
        """Wake a pool for the best expert that no pool holds, if it beats the selection."""
        if len(selection.exclusion) == 1:
            return  # The only candidate is the selection.
        if selection.locked or not (selection.exclusion == Exclusion.NO_POOL).any():
            return
        there = {name for view in views for name in view.snapshot.experts}
        best: tuple[float, str] | None = None
        for quality, row in zip(plan.quality.tolist(), plan.rows.tolist(), strict=True):
            if self.catalog.recruits[row]:
                continue  # It takes those that are there.
            absent = [name for name in self.catalog.recipes[row].members if name not in there]
            if absent and (best is None or quality > best[0]):
                best = quality, absent[0]
        if best is not None and best[0] > selection.utility[position]:
            self._wake(best[1])

    async def _wait_for_pool(self, plan: RoutePlan, deadline_s: float) -> None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise UnavailableError(f"no running pool holds expert {plan.first!r}", retry_after_s=5)
        self._wake(plan.first)
        await self._directory.change(min(left_s, 1.0))

    async def _attempt(
        self,
        option: ExpertInPool,
        request: InferenceRequest,
        deadline_s: float,
        reply: ResponseSend,
        trace: Mapping[str, str],
    ) -> None:
        left_ms = max(1, int((deadline_s - time.monotonic()) * 1000))
        body = request.body_for(option.expert)
        remote = option.boot is None
        limit = asyncio.timeout(left_ms / 1000 + (0 if remote else _GRACE_S))
        # An earlier attempt's limit has ended, so each attempt sets its own.
        reply.first_byte_limit = limit if remote and request.stream else None
        reply.sent_s = time.monotonic()
        reply.record.pool = option.boot
        # The engine may still run the earlier attempt, so each attempt has an id of its own.
        again = reply.record.attempts - 1
        attempt_id = f"{request.request_id}-again{again}" if again else request.request_id
        handed_over = asyncio.Event()
        give_up = partial(self._record_abandoned, option, request, attempt_id, reply)
        expert_call = ExpertCall(
            option.expert,
            self.cost_model.price(option.expert),
            answers=request.answers,
            most_tokens=request.most_tokens,
            thinking_budget=request.thinking_budget,
            role=reply.role,
            round=reply.round,
        )
        reply.expert_call = expert_call
        try:
            async with limit:
                if option.boot is None:
                    owner = self._remote_variants.get(option.expert, option.expert)
                    pool = self._remote_pools[owner]
                    reply.record.calls.append(expert_call)
                    await pool.run(
                        EngineRequest(
                            request.endpoint,
                            option.expert,
                            body,
                            attempt_id,
                            trace,
                            request.tenant.cache_salt,
                        ),
                        reply,
                        handed_over,
                        request.tenant,
                        tokens=request.prompt_tokens,
                        places=request.sequences,
                    )
                    return
                link = self._directory.link(option.boot)
                call = Call(
                    endpoint=request.endpoint,
                    expert=option.expert,
                    request_id=attempt_id,
                    deadline_ms=left_ms,
                    stream=request.stream,
                    gateway=self._directory.gateway,
                    seq=link.next_seq(option.expert),
                    tenant=request.tenant,
                    trace=trace,
                    prompt_tokens=request.prompt_tokens,
                    places=request.sequences,
                    prefix=prefix_of(request),
                )
                try:
                    # POST to the pool's port. `rpc/pool_asgi_app.py` there calls `Pool.run`.
                    # Leaving the context cancels the call.
                    async with link.call(call, body) as answer:
                        reply.record.calls.append(expert_call)
                        await self._forward(answer, request, limit, reply)
                except PoolUnavailableError as error:
                    if link.draining and not isinstance(error, PoolUnreachableError):
                        raise PoolStoppedError(error.message) from None
                    raise
        except asyncio.CancelledError:
            give_up(begun=handed_over.is_set() or not remote)
            raise
        except DeadlineExceededError:
            give_up(begun=request.own_deadline)
            raise
        except TimeoutError:
            if not limit.expired():
                raise
            give_up(begun=request.own_deadline and (handed_over.is_set() or not remote))
            raise deadline_error(
                request, silent=request.stream and (handed_over.is_set() or not remote)
            ) from None

    def _record_abandoned(
        self,
        option: ExpertInPool,
        request: InferenceRequest,
        attempt_id: str,
        reply: ResponseSend,
        *,
        begun: bool,
    ) -> None:
        """Record an abandoned call, so that its tokens can be fetched or estimated later.

        Args:
            option: The expert that was called, and its pool.
            request: The request.
            attempt_id: The call's id in the engine.
            reply: The reply to the client.
            begun: Whether an engine may have worked on the call.
        """
        if not begun:
            return
        asks = None
        if option.boot is not None:
            with suppress(CoeError):
                asks = self._directory.link(option.boot).used
        tokens = 0
        if TABLE[request.endpoint].generates:
            expected = self.cost_model.expect("", request.prompt_tokens, request.most_tokens)
            likely = request.answers * float(expected.tokens[self.catalog.index[option.expert]])
            running_s = max(0.0, time.monotonic() - reply.sent_s - option.wait_s)
            most = request.answers * (request.most_tokens or self.context(option.expert) or 2**31)
            tokens = min(most, int(likely * running_s / max(option.answer_s, 1e-3)))
        reply.record.unfinished.append(
            Unfinished(
                partial(asks, attempt_id) if asks is not None else None,
                (request.prompt_tokens, tokens),
            )
        )

    async def _forward(
        self,
        answer: HttpReply,
        request: InferenceRequest,
        limit: asyncio.Timeout,
        reply: ResponseSend,
    ) -> None:
        fault = answer.headers.get(FAULT_HEADER.decode())
        if fault in (DeadlineExceededError.code, EngineTimeoutError.code):
            # The error states the client's whole deadline. The pool knows only the remaining time.
            raise deadline_error(request, silent=fault == EngineTimeoutError.code)
        if fault in RETRIED:
            raise error_from_fault(
                fault, await read_whole_answer(answer), answer.headers.get("retry-after")
            )
        content_type = answer.headers.get("content-type", "application/json").encode("latin-1")
        head = [(b"content-type", content_type)]
        for name in ("retry-after", "x-coe-fault"):
            if name in answer.headers:
                head.append((name.encode(), answer.headers[name].encode("latin-1")))
        reply.record.queue_ms = float(answer.headers.get(QUEUE_MS, "0"))
        reply.record.swap_ms = float(answer.headers.get(SWAP_MS, "0"))
        reply.record.engine_ms = float(answer.headers.get(ENGINE_MS, "0"))
        if not content_type.startswith(b"text/event-stream"):
            body = await read_whole_answer(answer)
            await send_response(reply, answer.status, head, body)
            return
        try:
            chunk = await answer.body.read(_CHUNK_BYTES)
            if not chunk:
                raise PoolUnavailableError("the pool ended its answer before it began")
            limit.reschedule(None)
            await reply(start_response(answer.status, head))
            while not answer.body.at_eof():
                await reply(body_message(chunk, more=True))
                chunk = await answer.body.read(_CHUNK_BYTES)
        except ConnectionError:
            raise PoolUnavailableError("the pool went away while it answered") from None
        # The last piece usually came together with the end.
        await reply(body_message(chunk))


def _traced(
    trace: Trace | None, option: ExpertInPool, request: InferenceRequest
) -> AbstractContextManager[Mapping[str, str]]:
    """The W3C headers for the call: those of its span, or without tracing those of the client."""
    if trace is None:
        return nullcontext(request.trace)
    return trace.attempt(option.expert, option.boot)


def _died_twice_error() -> EngineDiedTwiceError:
    return EngineDiedTwiceError(
        f"{MOST_LOSSES} engines died while they had this request; it is not tried again"
    )
