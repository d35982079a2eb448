"""A pool: its slots, and the snapshot that gateways choose by."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from service.engine.base import EngineRequest, Send
from service.errors import (
    CoeError,
    ConflictError,
    DeadlineExceededError,
    EngineDeadError,
    EngineRestartingError,
    EngineTimeoutError,
    UnknownEndpointError,
    UnknownModelError,
)
from service.pool.abandoned import AbandonedCalls
from service.pool.acknowledgements import Acknowledgements
from service.pool.host_budget import claims, divide, least
from service.pool.lease import LeaseRevokedError
from service.pool.placement import next_move
from service.pool.planner import SwapPolicy
from service.pool.slots.base import BaseSlot
from service.pool.slots.dedicated import DedicatedSlot
from service.pool.slots.shared import SharedSlot
from service.pool.timed_send import TimedSend
from service.pool.units import Unit
from service.rpc.call_headers import Call, Times
from service.rpc.expert_speed import LatencyEstimator
from service.rpc.snapshot import COALESCE_S, HEARTBEAT_S, Snapshot, Speed, encode
from service.types import Residency

log = logging.getLogger("coe.pool")

_PLACE_S, _SOON_S = 0.25, 0.05
OPERATIONS = ("load", "evict", "pin", "unpin")


class PoolObserver(Protocol):
    """Who counts a pool's requests."""

    def ended(self, call: Call, times: Times, fault: str) -> None:
        """A request has ended, one way or another; `fault` is the error's code or empty."""


class Pool:
    """Everything on one accelerator group or CPU slice.

    `add` its slots, then `start`; `run` answers calls; `stop` drains.
    """

    def __init__(self, kind: str, watch: PoolObserver | None = None) -> None:
        self.kind = kind
        # How its shared slots weigh things, and what they may hold together and each.
        self._policy: SwapPolicy | None = None
        self._rooms: dict[SharedSlot, int] = {}
        # Slots that went, whose engines have not ended yet: they hold what they hold.
        self._ending: set[SharedSlot] = set()
        # Experts that went so that others of their names can come, and what is said of each.
        self._coming: dict[str, str] = {}
        self._closing: set[BaseSlot[Any]] = set()
        self._watch = watch
        self.boot = secrets.token_hex(8)
        self._slots: list[BaseSlot[Any]] = []
        self._slot_of: dict[str, BaseSlot[Any]] = {}
        self._tasks: dict[BaseSlot[Any], asyncio.Task[None]] = {}
        # Engines that load together fight for the same cores and disk.
        self._turn = asyncio.Lock()
        self._placing: asyncio.Task[None] | None = None
        self._speeds: dict[str, LatencyEstimator] = {}
        self._tokens: Counter[str] = Counter()
        self._acks = Acknowledgements()
        self._abandoned = AbandonedCalls()
        self._draining = False
        self._seq = 0
        self._listeners: set[asyncio.Event] = set()

    def add(self, slot: BaseSlot[Any]) -> None:
        """Give the pool a slot."""
        self._slots.append(slot)
        self._belong(slot.experts, slot)
        if isinstance(slot, SharedSlot):
            self._policy = self._policy or slot.policy

    def _belong(self, experts: Iterable[str], slot: BaseSlot[Any]) -> None:
        for name in experts:
            self._slot_of[name] = slot
            self._coming.pop(name, None)

    def changed(self) -> None:
        """Something that a snapshot tells is different now."""
        self._seq += 1
        for listener in self._listeners:
            listener.set()

    def start(self) -> None:
        """Start every slot's engine, one after the other, in the background."""
        self._divide()
        for slot in self._slots:
            self._supervise(slot)
        self._placing = asyncio.create_task(self._place())

    def _supervise(self, slot: BaseSlot[Any]) -> None:
        self._tasks[slot] = asyncio.create_task(slot.supervise(self._turn))

    async def _place(self) -> None:
        """Let units that share slots move between them, as placement says."""
        while True:
            try:
                # Room that a slot lacks comes as soon as others have forgotten something.
                await asyncio.sleep(_SOON_S if self._divide() else _PLACE_S)
                shared = [one for one in self.shared if one not in self._closing]
                if len(shared) > 1:
                    self._move_one(shared)
            except Exception:
                # Whatever it was: who waits in the wrong slot must be found a place later.
                log.exception("placing failed")
                await asyncio.sleep(_PLACE_S)

    def _divide(self) -> bool:
        """Give each shared slot its part of the bound on host memory, which is the pool's.

        True: some have less than they should, until others have forgotten as much.
        """
        policy, shared = self._policy, self.shared
        if policy is None or policy.host_bytes is None or len(shared) + len(self._ending) < 2:
            self._rooms.clear()
            for slot in shared:
                slot.policy = policy or slot.policy
            return False
        bound = policy.host_bytes - sum(slot.held_bytes() for slot in self._ending)
        claimed = claims(bound, [slot.view(()) for slot in shared], policy)
        given = [self._rooms.get(slot, 0) for slot in shared]
        held = [slot.held_bytes() for slot in shared]
        rooms = divide(bound, claimed, given, held)
        self._rooms = dict(zip(shared, rooms, strict=True))
        for slot, claim in zip(shared, claimed, strict=True):
            slot.policy = replace(policy, host_bytes=self._rooms[slot], most_bytes=claim.most)
        return any(room < claim.needs for room, claim in zip(rooms, claimed, strict=True))

    def _move_one(self, shared: list[SharedSlot]) -> None:
        names = [unit.name for slot in shared for unit in slot.units]
        move = next_move([slot.view(names) for slot in shared], shared[0].policy)
        if move is None:
            return
        source, target = shared[move.source], shared[move.target]
        unit = next(one for one in source.units if one.name == move.unit)
        # Both in one step: a unit is never in two slots, nor in none.
        if (known := source.hand_over(unit.name)) is not None:
            target.take_in(unit, known)
            self._slot_of.update(dict.fromkeys(unit.experts, target))
            log.info("unit %s goes to slot %d", unit.name, self._slots.index(target))

    # --- units come and go

    def add_running(self, slot: BaseSlot[Any]) -> None:
        """Give the pool a slot while it runs."""
        self.add(slot)
        self._divide()
        self._supervise(slot)
        self.changed()

    def take_in(self, unit: Unit) -> None:
        """One more unit for the slots that units share: where what it needs is, or the fewest are.

        Raises KeyError where what it needs is in no shared slot.
        """
        slot = (
            {one.name: slot for slot in self.shared for one in slot.units}[unit.needs]
            if unit.needs
            else min(
                (one for one in self.shared if one not in self._closing),
                key=lambda one: len(one.units),
            )
        )
        slot.take_in(unit)
        self._belong(unit.experts, slot)
        self._divide()

    async def remove(self, expert: str, why: str, come_again: Collection[str] = ()) -> None:
        """A unit goes for good. Who waits for it is told why; returns when who runs has ended.

        `come_again`: experts of whose names others come then. Until they are there, who asks for
        one is told to ask again, and not that there is none.
        """
        slot = self._slot_of.get(expert)
        if slot is None:
            return
        unit = slot.unit_of(expert)
        kind = EngineRestartingError if unit.name in come_again else UnknownModelError
        for name in unit.experts:
            del self._slot_of[name]
            self._speeds.pop(name, None)
            if name in come_again:
                self._coming[name] = why
        if isinstance(slot, SharedSlot):
            if len(slot.active_units) == 1:
                self._give_one_to(slot)
            if len(slot.active_units) > 1:
                await slot.retire(unit.name, why, kind)
                self.changed()
                return
        self._closing.add(slot)
        try:
            await slot.close(why, kind)
        finally:
            self._closing.discard(slot)
        task = self._tasks.pop(slot)
        self._slots.remove(slot)
        if isinstance(slot, SharedSlot):
            self._ending.add(slot)
        self._divide()
        self.changed()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._ending.discard(slot)
        self._divide()

    @property
    def closing(self) -> bool:
        """Whether a slot lets its last requests end, after which there is one fewer."""
        return bool(self._closing or self._ending)

    async def add_adapter(self, base: str, expert: str, folder: str) -> None:
        """One more adapter of a base that has an engine made for adapters."""
        slot = self._slot_of[base]
        assert isinstance(slot, DedicatedSlot)
        self._belong((expert,), slot)
        await slot.add_adapter(expert, folder)

    async def remove_adapter(self, expert: str, why: str, come_again: Collection[str] = ()) -> None:
        """An adapter goes, its base stays. See `remove`."""
        slot = self._slot_of.pop(expert)
        assert isinstance(slot, DedicatedSlot)
        self._speeds.pop(expert, None)
        if expert in come_again:
            self._coming[expert] = why
        kind = EngineRestartingError if expert in come_again else UnknownModelError
        await slot.remove_adapter(expert, why, kind)
        self.changed()

    def expect(self, experts: Mapping[str, str]) -> None:
        """Announce which of the removed experts will return, with a reason until then."""
        self._coming = {n: why for n, why in experts.items() if n not in self._slot_of}

    def _give_one_to(self, slot: SharedSlot) -> None:
        """Another slot's unit for one whose last unit goes, if one can be spared."""
        for other in sorted(self.shared, key=lambda one: -len(one.active_units)):
            for unit in (
                other.active_units if other is not slot and len(other.active_units) > 1 else ()
            ):
                if (known := other.hand_over(unit.name)) is not None:
                    slot.take_in(unit, known)
                    self._slot_of.update(dict.fromkeys(unit.experts, slot))
                    return

    def set_policy(self, policy: SwapPolicy) -> None:
        """How shared slots weigh things from now on."""
        self._policy = policy
        self._divide()

    def set_pinned(self, expert: str, pinned: bool) -> None:
        """Whether an expert's unit is pinned, as the config says now."""
        slot = self._slot_of.get(expert)
        if isinstance(slot, SharedSlot):
            slot.set_pinned(expert, pinned)

    def is_shared(self, expert: str) -> bool:
        """Whether an expert is in a slot that units share, or that could be shared."""
        return isinstance(self._slot_of.get(expert), SharedSlot)

    @property
    def shared(self) -> list[SharedSlot]:
        """The slots that units share."""
        return [slot for slot in self._slots if isinstance(slot, SharedSlot)]

    async def stop(self, drain_s: float) -> None:
        """Refuse new work, let running requests end, then stop the engines."""
        self._draining = True
        self.changed()
        await asyncio.gather(*(slot.drain(drain_s) for slot in self._slots))
        tasks = list(self._tasks.values())
        if self._placing is not None:
            tasks.append(self._placing)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    async def run(self, call: Call, body: bytes, send: Send) -> None:
        """Answer a call.

        Raises UnknownModelError, UnknownEndpointError, OverCapacityError, ExpertFailedError,
        PoolDrainingError, DeadlineExceededError, EngineDeadError, and what the engine raises.
        """
        self._acks.record(call.gateway, call.seq)
        self._slot(call.expert)
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout_at(loop.time() + call.deadline_ms / 1000)
        reply = TimedSend(send, limit if call.stream else None)
        fault = "client_gone"
        try:
            with self._abandoned.call(call.request_id):
                async with limit:
                    again: LeaseRevokedError | None = None
                    while True:
                        try:
                            await self._run_in(self._slot(call.expert), call, body, reply, again)
                        except LeaseRevokedError as back:
                            again = back
                        else:
                            break
            fault = ""
        except TimeoutError:
            if not limit.expired():
                raise
            # Of an answer in one piece nobody can tell how far it had come.
            kind = EngineTimeoutError if call.stream and reply.silent() else DeadlineExceededError
            fault = kind.code
            raise kind(
                f"no answer within the deadline of {call.deadline_ms} ms", retry_after_s=1
            ) from None
        except CoeError as error:
            fault = error.code
            raise
        finally:
            if self._watch is not None:
                self._watch.ended(call, reply.times(), fault)
        reply.tell(self._speeds.setdefault(call.expert, LatencyEstimator()), call.prompt_tokens)

    async def used(self, request_id: str) -> tuple[int, int] | None:
        """Return prompt and completion tokens of a call that its gateway gave up, once.

        None if they are unknown.
        """
        return await self._abandoned.used(request_id)

    def _served(self, expert: str, tell: Callable[[int], None], tokens: int) -> None:
        self._tokens[expert] += tokens
        tell(tokens)

    async def _run_in(
        self,
        slot: BaseSlot[Any],
        call: Call,
        body: bytes,
        reply: TimedSend,
        again: LeaseRevokedError | None,
    ) -> None:
        try:
            async with slot.lease(
                call.expert, call.prompt_tokens, call.tenant, again, call.places
            ) as lease:
                if call.endpoint not in lease.report.endpoints:
                    raise UnknownEndpointError(
                        f"expert {call.expert!r} has no {call.endpoint}; "
                        f"it has {', '.join(sorted(lease.report.endpoints))}"
                    )
                served = partial(self._served, call.expert, lease.record_tokens)
                reply.lease_began(lease, served)
                self._abandoned.begun(call.request_id)
                request = EngineRequest(
                    call.endpoint,
                    call.expert,
                    body,
                    call.request_id,
                    cache_salt=call.tenant.cache_salt,
                    on_abandoned=partial(self._given_up, call, served),
                )
                await lease.engine.run(request, reply)
        except EngineDeadError:
            slot.report_engine_death()
            raise

    def _given_up(
        self, call: Call, served: Callable[[int], None], prompt_tokens: int, answer_tokens: int
    ) -> None:
        """An engine has stopped working on a call: its gateway will ask what that had taken."""
        self._abandoned.note(call.request_id, prompt_tokens, answer_tokens)
        if not call.stream:
            # They count for whose turn it is; a stream's were told as they passed.
            served(answer_tokens)

    def _slot(self, expert: str) -> BaseSlot[Any]:
        slot = self._slot_of.get(expert)
        if slot is None and (why := self._coming.get(expert)) is not None:
            raise EngineRestartingError(why, retry_after_s=1)
        if slot is None:
            raise UnknownModelError(f"pool {self.kind!r} has no expert {expert!r}")
        return slot

    def snapshot(self) -> Snapshot:
        """The state as of now."""
        now_s = time.monotonic()
        self._tell_turns()
        states = {}
        queues = {}
        capacity = {}
        for i, slot in enumerate(self._slots):
            states.update({name: replace(s, slot=i) for name, s in slot.states().items()})
            queues.update(slot.queues())
            capacity.update(dict.fromkeys(slot.experts, slot.capacity))
        return Snapshot(
            boot=self.boot,
            kind=self.kind,
            seq=self._seq,
            draining=self._draining,
            experts=states,
            queues=queues,
            capacity=capacity,
            speeds={
                name: speed
                for name, meter in self._speeds.items()
                if (speed := meter.speed(now_s)) != Speed()
            },
            acks=self._acks.to_wire(),
        )

    def _tell_turns(self) -> None:
        """Engines start one after the other: who waits for others' starts is told how long."""
        asked = [(slot.turn_asked_s, i) for i, slot in enumerate(self._slots)]
        ahead_s = 0.0
        for slot in self._slots:
            slot.ahead_s = 0.0
        for _, i in sorted((at_s, i) for at_s, i in asked if at_s is not None):
            self._slots[i].ahead_s = ahead_s
            ahead_s += self._slots[i].start_left_s()

    async def snapshots(self) -> AsyncIterator[bytes]:
        """Lines for one gateway: the whole state, then changes, coalesced, and heartbeats."""
        before: Snapshot | None = None
        change = asyncio.Event()
        self._listeners.add(change)
        try:
            while True:
                change.clear()
                now = self.snapshot()
                yield encode(now, before)
                before = now
                await asyncio.sleep(COALESCE_S)
                with suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_S - COALESCE_S):
                        await change.wait()
        finally:
            self._listeners.discard(change)

    def details(self) -> dict[str, dict[str, Any]]:
        """Each expert's residency in full, for people."""
        self._tell_turns()
        return {
            name: {**told, "tokens": self._tokens[name]}
            for slot in self._slots
            for name, told in slot.details().items()
        }

    async def operate(self, act: str, expert: str) -> None:
        """load, evict, pin or unpin an expert.

        Raises UnknownModelError, UnknownEndpointError, ConflictError.
        """
        slot = self._slot(expert)
        if act not in OPERATIONS:
            raise UnknownEndpointError(f"no operation {act!r}; operations: {', '.join(OPERATIONS)}")
        if act == "pin" and isinstance(slot, SharedSlot):
            self._check_pin(slot.unit_of(expert).name)
        await slot.operate(act, expert)

    def _check_pin(self, unit: str) -> None:
        """Raises ConflictError where a pin would leave no room for the others to take turns."""
        bound = self._policy.host_bytes if self._policy is not None else None
        places = [slot.view(()) for slot in self.shared]
        if bound is not None and (needed := least(places, unit)) > bound:
            raise ConflictError(
                f"expert {unit!r} can't be pinned: with it {needed / 1024**3:.2f} GiB have to stay "
                f"in host memory, and swap.host_bytes is {bound / 1024**3:.2f} GiB"
            )

    def demand(self, wanted: dict[str, float]) -> None:
        """What gateways would have sent here, were it resident: utility by expert."""
        now_s = time.monotonic()
        for expert, amount in wanted.items():
            slot = self._slot_of.get(expert)
            if slot is not None:
                slot.record_demand(expert, amount, now_s)

    def swap_counts(self) -> dict[tuple[str, str, str], int]:
        """Swaps since the start, by unit, method and reason."""
        counts: Counter[tuple[str, str, str]] = Counter()
        for slot in self._slots:
            counts.update(slot.swap_counts())
        return dict(counts)

    def canary_failures(self) -> int:
        """Swaps after which the weights were not as they had been loaded."""
        return sum(slot.canary_failures for slot in self._slots)

    def unhealthy(self) -> str | None:
        """Why this process should be replaced, or None."""
        if not self._draining and any(task.done() for task in self._tasks.values()):
            return "a slot is no longer looked after"
        return next((why for slot in self._slots if (why := slot.unhealthy())), None)

    def queued(self) -> int:
        """Requests running or waiting: what autoscaling goes by."""
        return sum(q.waiting + q.running for slot in self._slots for q in slot.queues().values())

    def residency(self) -> Iterable[tuple[str, Residency]]:
        """Each expert's state, for metrics."""
        for slot in self._slots:
            for name, state in slot.states().items():
                yield name, state.state
