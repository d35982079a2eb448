"""A pool: its slots, and the snapshots by which gateways choose experts."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import orjson
from msgspec import structs

from service.engine.engine_interface import EngineRequest, Send
from service.errors import (
    CoeError,
    ConflictError,
    DeadlineExceededError,
    EngineDeadError,
    EngineRestartingError,
    EngineTimeoutError,
    InvalidRequestError,
    PoolReplacedError,
    UnknownEndpointError,
    UnknownModelError,
)
from service.pool.abandoned_call_tokens import AbandonedCalls
from service.pool.autoscaling_load import LoadMeter, PoolLoad, SlotLoad, pool_load
from service.pool.cached_prefixes import CachedPrefixes
from service.pool.call_acknowledgements import Acknowledgements
from service.pool.host_memory_division import claims, divide, least
from service.pool.requested_name_send import RenamedSend
from service.pool.slot_units import Unit
from service.pool.slots.base_slot import BaseSlot, LeaseRevokedError
from service.pool.slots.dedicated_slot import DedicatedSlot
from service.pool.slots.idle_unload import RELEASE, IdlePolicy, Keep
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_planner import SwapPolicy
from service.pool.timed_send import TimedSend
from service.pool.unit_placement import next_move
from service.rpc.call_headers import Call, Times
from service.rpc.expert_latency import ExpertLatency, measured_speeds
from service.rpc.snapshot import COALESCE_S, HEARTBEAT_S, ExpertState, Snapshot, encode
from service.telemetry.json_logging import log_fields
from service.types import Residency

log = logging.getLogger("coe.pool")

_PLACE_S, _SOON_S = 0.25, 0.05
# Seconds between two looks at the placement of units while nobody asks.
_QUIET_S = 2.0
# Gateways are told of times that run on, without another change, as often as this.
_REFRESH_S = 1.0
# Larger bodies are read in a thread.
_LARGE_BYTES = 128 * 1024
OPERATIONS = ("load", "evict", "unload", "pin", "unpin")


class PoolObserver(Protocol):
    """Counts a pool's requests."""

    def ended(self, call: Call, times: Times, fault: str) -> None:
        """Count a request that has ended. `fault` is the error's code; it is empty on success."""


class Pool:
    """Everything on one accelerator group or CPU slice.

    `add` gives it slots, `start` starts their engines, `run` answers calls, and `stop` drains it.

    Gateways use served names; slots use the names of the weights (`held`). Several served names may
    share one held name (`same_weight_experts`).

    Args:
        kind: The pool's name in the config.
        observer: Counts the pool's requests.
    """

    def __init__(self, kind: str, observer: PoolObserver | None = None) -> None:
        self.kind = kind
        # The policy of the shared slots. Its host_bytes bounds all of them together, and
        # `_host_bytes` has the part of each slot.
        self._policy: SwapPolicy | None = None
        self._host_bytes: dict[SharedSlot, int] = {}
        # Removed slots whose engines have not ended yet.
        self._ending: set[SharedSlot] = set()
        self._idle_policy = IdlePolicy()
        # Removed experts whose successors of the same name have not been added yet, with the
        # reasons that clients get.
        self._returning: dict[str, str] = {}
        self._closing: set[BaseSlot[Any]] = set()
        # The held name of each served expert. None: each expert is held under its own name.
        self._held: Mapping[str, str] | None = None
        self._observer = observer
        self.boot = secrets.token_hex(8)
        self.slots: list[BaseSlot[Any]] = []
        self._slot_of: dict[str, BaseSlot[Any]] = {}
        self._tasks: dict[BaseSlot[Any], asyncio.Task[None]] = {}
        # Engines start one at a time, because they would compete for the same cores and disk.
        self._turn = asyncio.Lock()
        self._placement: asyncio.Task[None] | None = None
        self._called = asyncio.Event()
        self._latencies: dict[str, ExpertLatency] = {}
        self._tokens: Counter[str] = Counter()
        self._load = LoadMeter(time.monotonic)
        self._acks = Acknowledgements()
        self._prefixes = CachedPrefixes()
        self._abandoned = AbandonedCalls()
        self._draining = self._is_replaced = False
        # Experts of the config that only other kinds of pools have.
        self._elsewhere: frozenset[str] = frozenset()
        self.added_revision = 0
        self._seq = 0
        # Counts what a snapshot may tell, also what alone is no reason to send one.
        self._revision = 0
        self._told: _Told | None = None
        # By expert, its slot's last state, and the same with the number of the slot.
        self._told_states: dict[str, tuple[ExpertState, ExpertState]] = {}
        self._listeners: set[asyncio.Event] = set()

    def add(self, slot: BaseSlot[Any]) -> None:
        """Add a slot to a pool that has not been started."""
        self.slots.append(slot)
        slot.idle_policy = self._idle_policy
        self._assign(slot.experts, slot)
        if isinstance(slot, SharedSlot):
            self._policy = self._policy or slot.policy

    def _assign(self, experts: Iterable[str], slot: BaseSlot[Any]) -> None:
        for name in experts:
            self._slot_of[name] = slot
            self._returning.pop(name, None)

    def serve(self, held: Mapping[str, str], elsewhere: Iterable[str] = ()) -> None:
        """Set the experts that are served.

        Args:
            held: The name under which each expert's weights are held.
            elsewhere: Experts that only other pools have. Requests for them are sent there.
        """
        self._held = held
        self._elsewhere = frozenset(elsewhere) - held.keys()
        self.changed()

    def held_name(self, expert: str) -> str:
        """Return the name under which an expert's weights are held.

        Raises:
            UnknownModelError: No such expert is served.
        """
        held = expert if self._held is None else self._held.get(expert)
        if held is None:
            raise UnknownModelError(f"pool {self.kind!r} has no expert {expert!r}")
        return held

    def changed(self) -> None:
        """Publish a new snapshot after a change of the pool's state."""
        self._seq += 1
        self._revision += 1
        for listener in self._listeners:
            listener.set()

    def start(self) -> None:
        """Start each slot's engine, one after the other, in the background."""
        self._divide_host_memory()
        for slot in self.slots:
            self._supervise(slot)
        self._placement = asyncio.create_task(self._place_units())

    def _supervise(self, slot: BaseSlot[Any]) -> None:
        self._tasks[slot] = asyncio.create_task(slot.supervise(self._turn))

    async def _place_units(self) -> None:
        """Divide host memory over shared slots and move units between them, until cancelled."""
        while True:
            try:
                # A slot that lacks room gets it soon after other slots have evicted units.
                if self._divide_host_memory():
                    await asyncio.sleep(_SOON_S)
                else:
                    await self._wait_for_calls()
                    await asyncio.sleep(_PLACE_S)
                shared = [one for one in self.shared if one not in self._closing]
                if len(shared) > 1:
                    self._move_unit(shared)
            except Exception:
                # The loop has to go on, because requests may wait in the wrong slot.
                log.exception("unit placement failed")
                await asyncio.sleep(_PLACE_S)

    async def _wait_for_calls(self) -> None:
        """Wait until there is a call, or for so long that demand may have changed."""
        if self.queued():
            return
        self._called.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(_QUIET_S):
                await self._called.wait()

    def _divide_host_memory(self) -> bool:
        """Give each shared slot its part of the pool's bound on host memory.

        Returns:
            Whether a slot has less room than it needs until other slots have evicted units.
        """
        policy, shared = self._policy, self.shared
        if policy is None or policy.host_bytes is None or len(shared) + len(self._ending) < 2:
            self._host_bytes.clear()
            for slot in shared:
                slot.policy = policy or slot.policy
            return False
        bound = policy.host_bytes - sum(slot.held_bytes() for slot in self._ending)
        claimed = claims(bound, [slot.view(()) for slot in shared], policy)
        given = [self._host_bytes.get(slot, 0) for slot in shared]
        held = [slot.held_bytes() for slot in shared]
        rooms = divide(bound, claimed, given, held)
        self._host_bytes = dict(zip(shared, rooms, strict=True))
        for slot, claim in zip(shared, claimed, strict=True):
            slot.policy = replace(policy, host_bytes=self._host_bytes[slot], most_bytes=claim.most)
        return any(room < claim.needs for room, claim in zip(rooms, claimed, strict=True))

    def _move_unit(self, shared: list[SharedSlot]) -> None:
        names = [unit.name for slot in shared for unit in slot.units]
        move = next_move([slot.view(names) for slot in shared], shared[0].policy)
        if move is None:
            return
        source, target = shared[move.source], shared[move.target]
        unit = next(unit for unit in source.units if unit.name == move.unit)
        # There is no await in between, so that a unit is always in exactly one slot.
        if (state := source.hand_over(unit.name)) is not None:
            target.take_in(unit, state)
            self._slot_of.update(dict.fromkeys(unit.experts, target))
            log.info("unit %s moves to slot %d", unit.name, self.slots.index(target))

    # --- additions and removals

    def add_running(self, slot: BaseSlot[Any]) -> None:
        """Add a slot to a running pool."""
        self.add(slot)
        self._divide_host_memory()
        self._supervise(slot)
        self.changed()

    def take_in(self, unit: Unit) -> None:
        """Add a unit to a shared slot.

        A unit that shares another unit's weights joins that unit's slot. Any other unit joins the
        slot with the fewest units.

        Raises:
            KeyError: The unit whose weights it shares is in no shared slot.
        """
        if unit.needs:
            slots = {held.name: slot for slot in self.shared for held in slot.units}
            slot = slots[unit.needs]
        else:
            open_slots = [slot for slot in self.shared if slot not in self._closing]
            slot = min(open_slots, key=lambda slot: len(slot.units))
        slot.take_in(unit)
        self._assign(unit.experts, slot)
        self._divide_host_memory()

    async def remove(self, expert: str, reason: str, successors: Collection[str] = ()) -> None:
        """Remove a unit for good, once its running requests have ended.

        Args:
            expert: An expert of the unit.
            reason: Why the expert is gone. Clients that wait for it get this reason.
            successors: Names of experts that will be added after the removal. Until then, clients
                that ask for these names are asked to try again, instead of being refused for good.
        """
        slot = self._slot_of.get(expert)
        if slot is None:
            return
        unit = slot.unit_of(expert)
        error = self._removal_error(unit.name, successors)
        for name in unit.experts:
            del self._slot_of[name]
            self._latencies.pop(name, None)
            self._load.forget(name)
            if name in successors:
                self._returning[name] = reason
        if isinstance(slot, SharedSlot):
            if len(slot.active_units) == 1:
                self._move_unit_to(slot)
            if len(slot.active_units) > 1:
                await slot.retire(unit.name, reason, error)
                self.changed()
                return
        self._closing.add(slot)
        try:
            await slot.close(reason, error)
        finally:
            self._closing.discard(slot)
        task = self._tasks.pop(slot)
        self.slots.remove(slot)
        if isinstance(slot, SharedSlot):
            self._ending.add(slot)
        self._divide_host_memory()
        self.changed()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._ending.discard(slot)
        self._divide_host_memory()

    @property
    def closing(self) -> bool:
        """Whether a slot under removal still has requests or an engine."""
        return bool(self._closing or self._ending)

    async def add_adapter(self, base: str, expert: str, folder: str) -> None:
        """Load another adapter of a base whose engine was started with adapters."""
        slot = self._slot_of[base]
        assert isinstance(slot, DedicatedSlot)
        self._assign((expert,), slot)
        await slot.add_adapter(expert, folder)

    async def remove_adapter(
        self, expert: str, reason: str, successors: Collection[str] = ()
    ) -> None:
        """Remove an adapter from the engine of its base. The arguments are those of `remove`."""
        slot = self._slot_of.pop(expert)
        assert isinstance(slot, DedicatedSlot)
        self._latencies.pop(expert, None)
        self._load.forget(expert)
        if expert in successors:
            self._returning[expert] = reason
        error = self._removal_error(expert, successors)
        await slot.remove_adapter(expert, reason, error)
        self.changed()

    def _removal_error(self, name: str, successors: Collection[str]) -> type[CoeError]:
        """Return what clients get that wait for a removed expert."""
        if name in successors:
            return EngineRestartingError
        return PoolReplacedError if name in self._elsewhere else UnknownModelError

    def expect(self, experts: Mapping[str, str]) -> None:
        """Set the experts that will be available again soon.

        Args:
            experts: The reason for each expert's absence, which clients get until it is back.
        """
        self._returning = {n: why for n, why in experts.items() if n not in self._slot_of}

    def _move_unit_to(self, slot: SharedSlot) -> None:
        """Move a unit from another slot to a slot that loses its last unit.

        A slot gives up a unit only if it keeps at least one active unit. If no slot can, the
        method does nothing.
        """
        for other in sorted(self.shared, key=lambda shared: -len(shared.active_units)):
            if other is slot or len(other.active_units) < 2:
                continue
            for unit in other.active_units:
                if (state := other.hand_over(unit.name)) is not None:
                    slot.take_in(unit, state)
                    self._slot_of.update(dict.fromkeys(unit.experts, slot))
                    return

    def set_policy(self, policy: SwapPolicy) -> None:
        """Set the policy of the shared slots."""
        self._policy = policy
        self._divide_host_memory()

    def set_idle_policy(self, policy: IdlePolicy) -> None:
        """Set when experts are unloaded."""
        self._idle_policy = policy
        for slot in self.slots:
            slot.idle_policy = policy

    async def release(self, keep: Keep | None = None) -> dict[str, Any]:
        """Give the accelerator back, as far as no request runs or waits.

        Args:
            keep: Where weights stay; None: as the config says.

        Returns:
            As JSON: the experts whose memory was given back, and why others keep theirs.
        """
        released: list[str] = []
        busy: dict[str, str] = {}

        async def give_back(slot: BaseSlot[Any]) -> None:
            names = [name for name in slot.experts if name in self._slot_of]
            try:
                await slot.release(keep, RELEASE)
                released.extend(names)
            except ConflictError as error:
                busy.update(dict.fromkeys(names, error.message))

        await asyncio.gather(*(give_back(slot) for slot in self.slots))
        served = self._present_names(self._slot_of)
        return {
            "released": sorted(name for name, held in served.items() if held in released),
            "busy": {name: busy[held] for name, held in served.items() if held in busy},
        }

    def unload_counts(self) -> dict[tuple[str, str], int]:
        """Unloads since the start, by expert and reason."""
        counts: Counter[tuple[str, str]] = Counter()
        for slot in self.slots:
            counts.update(slot.unloads)
        return dict(counts)

    def set_pinned(self, expert: str, pinned: bool) -> None:
        """Pin or unpin an expert's unit in host memory."""
        slot = self._slot_of.get(expert)
        if isinstance(slot, SharedSlot):
            slot.set_pinned(expert, pinned)

    def is_shared(self, expert: str) -> bool:
        """Return whether an expert is in a slot that units share or could share."""
        return isinstance(self._slot_of.get(expert), SharedSlot)

    @property
    def experts(self) -> frozenset[str]:
        """The experts that the pool has now, ready or not."""
        return frozenset(self._slot_of)

    @property
    def shared(self) -> list[SharedSlot]:
        """The slots that units share or could share."""
        return [slot for slot in self.slots if isinstance(slot, SharedSlot)]

    def refuse_new(self, *, replaced: bool = False) -> None:
        """Refuse new requests from now on. Waiting and running ones go on.

        Args:
            replaced: Whether another pool takes the place of this one, so that gateways wait for it
                with the requests that they would send here.
        """
        self._draining, self._is_replaced = True, self._is_replaced or replaced
        for slot in self.slots:
            slot.refuse_new()
        self.changed()

    async def stop(self, drain_s: float) -> None:
        """Refuse new requests, let the present ones end, and stop the engines."""
        self.refuse_new()
        await asyncio.gather(*(slot.drain(drain_s) for slot in self.slots))
        tasks = list(self._tasks.values())
        if self._placement is not None:
            tasks.append(self._placement)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    async def run(self, call: Call, body: bytes, send: Send) -> None:
        """Answer a call.

        Raises:
            UnknownModelError: The pool has no such expert.
            UnknownEndpointError: The expert's engine has no such endpoint.
            OverCapacityError: The expert's queue is full.
            ExpertFailedError: The expert could not be loaded.
            PoolDrainingError: The pool is stopping.
            PoolReplacedError: The pool is being replaced, or only other pools have the expert.
            DeadlineExceededError: The deadline passed.
            EngineTimeoutError: The deadline passed, and the engine had the request for most of the
                time without sending a byte.
            EngineDeadError: The engine died.
            CoeError: The engine refused the request.
        """
        log_fields(request_id=call.request_id, expert=call.expert)
        self._acks.record(call.gateway, call.seq)
        self._revision += 1
        self._called.set()
        if self._is_replaced:
            raise PoolReplacedError("this pool is being replaced")
        if call.expert in self._elsewhere:
            raise PoolReplacedError(f"expert {call.expert!r} is in other pools only")
        held = self.held_name(call.expert)
        # Raises for an expert without a slot, before the call counts as load.
        places = min(call.places, self.slot_of(held).capacity)
        self._load.record_arrival(held, places)
        if held != call.expert:
            body = await _addressed(body, held)
            send = RenamedSend(send, call.expert)
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout_at(loop.time() + call.deadline_ms / 1000)
        # It passes messages on to the gateway. The first commits the lease, gets headers with the
        # times and, for a stream, lifts the deadline; each is timed and its tokens are counted.
        reply = TimedSend(send, limit if call.stream else None)
        fault = "client_gone"
        try:
            with self._abandoned.call(call.request_id):
                async with limit:
                    # A lease is revoked where the request waited and its expert moved to another
                    # slot, or where it ran and was put back before its first byte. It then takes
                    # another lease, and `revoked` keeps its place in the queue.
                    revoked: LeaseRevokedError | None = None
                    while True:
                        try:
                            await self._run_in(held, call, body, reply, revoked)
                        except LeaseRevokedError as error:
                            revoked = error
                        else:
                            break
            fault = ""
        except TimeoutError:
            if not limit.expired():
                raise
            # A non-streaming answer does not show whether the engine made progress.
            kind = EngineTimeoutError if call.stream and reply.silent() else DeadlineExceededError
            fault = kind.code
            raise kind(
                f"no answer within the deadline of {call.deadline_ms} ms", retry_after_s=1
            ) from None
        except CoeError as error:
            fault = error.code
            _name_expert(error, held, call.expert)
            raise
        finally:
            if self._observer is not None:
                self._observer.ended(call, reply.times(), fault)
        self._prefixes.record(call.prefix, call.expert, time.monotonic())
        latency = self._latencies.setdefault(held, ExpertLatency())
        reply.report(latency, call.prompt_tokens, call.places)
        self._revision += 1

    async def used(self, request_id: str) -> tuple[int, int] | None:
        """Return the prompt and answer tokens of a call that its gateway has abandoned.

        The counts are returned only once. The result is None where they are unknown.
        """
        return await self._abandoned.used(request_id)

    def _record_tokens(self, expert: str, record: Callable[[int], None], tokens: int) -> None:
        self._tokens[expert] += tokens
        self._load.record_tokens(tokens)
        record(tokens)

    async def _run_in(
        self,
        held: str,
        call: Call,
        body: bytes,
        reply: TimedSend,
        revoked: LeaseRevokedError | None,
    ) -> None:
        slot = self.slot_of(held)
        name = call.expert if held != call.expert else None
        try:
            async with slot.lease(
                held, call.prompt_tokens, call.tenant, revoked, call.places, name
            ) as lease:
                if call.endpoint not in lease.report.endpoints:
                    raise UnknownEndpointError(
                        f"expert {call.expert!r} has no {call.endpoint}; "
                        f"it has {', '.join(sorted(lease.report.endpoints))}"
                    )
                record_tokens = partial(self._record_tokens, call.expert, lease.record_tokens)
                self._abandoned.mark_running(call.request_id)
                request = EngineRequest(
                    call.endpoint,
                    held,
                    body,
                    call.request_id,
                    cache_salt=call.tenant.cache_salt,
                    on_abandoned=partial(self._record_abandoned, call, record_tokens),
                    asked_as=name,
                    tenant=call.tenant.name,
                )
                with (
                    self._load.run(held, min(call.places, slot.capacity)),
                    slot.occupancy.stay() as stay,
                ):
                    reply.begin(lease, record_tokens, stay)
                    # `EngineFactory` made it: a `LazyEngine` around `VllmEngine` (engine/vllm/
                    # engine.py), its subclass that swaps, or `SleepingEngines`.
                    await lease.engine.run(request, reply)
        except EngineDeadError:
            slot.report_engine_death()
            raise

    def _record_abandoned(
        self,
        call: Call,
        record_tokens: Callable[[int], None],
        prompt_tokens: int,
        answer_tokens: int,
    ) -> None:
        """Keep the token counts of an abandoned call until its gateway fetches them."""
        self._abandoned.record(call.request_id, prompt_tokens, answer_tokens)
        if not call.stream:
            # The tokens count for fairness. The tokens of a stream were counted on their way out.
            record_tokens(answer_tokens)

    def slot_of(self, expert: str) -> BaseSlot[Any]:
        """Return the slot of an expert.

        Raises:
            EngineRestartingError: The expert will be available again soon.
            UnknownModelError: The pool has no such expert.
        """
        slot = self._slot_of.get(expert)
        if slot is None and (why := self._returning.get(expert)) is not None:
            raise EngineRestartingError(why, retry_after_s=1)
        if slot is None:
            raise UnknownModelError(f"pool {self.kind!r} has no expert {expert!r}")
        return slot

    def snapshot(self) -> Snapshot:
        """Return the present state of the pool."""
        now_s = time.monotonic()
        self._share_start_times()
        states = {}
        queues = {}
        capacity = {}
        slot_of: dict[str, BaseSlot[Any]] = {}
        for i, slot in enumerate(self.slots):
            states.update(self._numbered(i, slot.states()))
            queues.update(slot.queues())
            capacity.update(dict.fromkeys(slot.experts, slot.capacity))
            slot_of.update(dict.fromkeys(slot.experts, slot))
        if len(self._told_states) > len(states):
            self._told_states = {name: self._told_states[name] for name in states}
        held = self._present_names(states)
        shares = self._shares(held)
        by_name = {name: queues[own] for name, own in held.items()}
        for name, first in shares.items():
            # `first` is the first served name of the shared weights. Requests under the other
            # names are subtracted from the first name's queue.
            by_name[name] = slot_of[held[name]].queue_of(held[name], name)
            by_name[first] = by_name[first].without(by_name[name])
        latencies = {
            name: self._latencies[own] for name, own in held.items() if own in self._latencies
        }
        return Snapshot(
            boot=self.boot,
            kind=self.kind,
            seq=self._seq,
            draining=self._draining,
            added=self.added_revision,
            experts={name: states[own] for name, own in held.items()},
            queues=by_name,
            capacity={name: capacity[own] for name, own in held.items()},
            speeds=measured_speeds({n: one.usual for n, one in latencies.items()}, now_s),
            idle_speeds=measured_speeds({n: one.idle for n, one in latencies.items()}, now_s),
            acks=self._acks.to_wire(),
            shares=shares,
            prefixes=self._prefixes.to_wire(
                {name for name, own in held.items() if states[own].state is Residency.DEVICE}, now_s
            ),
        )

    def _numbered(self, slot: int, states: dict[str, ExpertState]) -> dict[str, ExpertState]:
        """Return states with their slot's number. A state that did not change is the same object.

        So what has changed is found fast (`encode`).
        """
        for name, state in states.items():
            known = self._told_states.get(name)
            if known is None or known[0] is not state or known[1].slot != slot:
                known = self._told_states[name] = (state, structs.replace(state, slot=slot))
            states[name] = known[1]
        return states

    def _present_names(self, present: Collection[str]) -> Mapping[str, str]:
        """Return the held name of each expert to publish.

        Args:
            present: The held names of all slots.
        """
        if self._held is None:
            return dict(zip(present, present, strict=True))
        served = {name: held for name, held in self._held.items() if held in present}
        # Requests for removed experts still run.
        ending = set(present) - set(served.values()) - served.keys()
        return served | {name: name for name in present if name in ending}

    @staticmethod
    def _shares(held: Mapping[str, str]) -> dict[str, str]:
        """Return each served name that shares its weights, with the first name of these weights.

        The first names themselves are left out.

        Args:
            held: The held name of each served name.
        """
        first: dict[str, str] = {}
        return {
            name: first[own] for name, own in held.items() if first.setdefault(own, name) != name
        }

    def _share_start_times(self) -> None:
        """Set for each slot how long the engines take that start before its own engine."""
        requested = [(slot.turn_asked_s, i) for i, slot in enumerate(self.slots)]
        ahead_s = 0.0
        for slot in self.slots:
            slot.ahead_s = 0.0
        for _, i in sorted((at_s, i) for at_s, i in requested if at_s is not None):
            self.slots[i].ahead_s = ahead_s
            ahead_s += self.slots[i].start_left_s()

    def _recent_snapshot(self) -> Snapshot:
        """Return the state of now. All gateways get the same object until something changes.

        Times that only run on, such as a countdown, may be up to a second old.
        """
        told, now_s = self._told, time.monotonic()
        if told is None or told.revision != self._revision or now_s - told.at_s >= _REFRESH_S:
            told = self._told = _Told(self.snapshot(), self._revision, now_s)
        return told.snapshot

    def _line(self, now: Snapshot, before: Snapshot | None) -> bytes:
        """Encode a snapshot as a line. Gateways that were told the same before share it."""
        told = self._told
        if told is None or told.snapshot is not now or before is None:
            return encode(now, before)
        if told.line is None or told.before is not before:
            told.before, told.line = before, encode(now, before)
        return told.line

    async def snapshots(self) -> AsyncIterator[bytes]:
        """Yield lines for one gateway: the whole state, then merged changes and heartbeats."""
        before: Snapshot | None = None
        change = asyncio.Event()
        self._listeners.add(change)
        try:
            while True:
                change.clear()
                now = self._recent_snapshot()
                yield self._line(now, before)
                before = now
                await asyncio.sleep(COALESCE_S)
                with suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_S - COALESCE_S):
                        await change.wait()
        finally:
            self._listeners.discard(change)

    def details(self) -> dict[str, dict[str, Any]]:
        """Return each expert's residency in full, for operators."""
        self._share_start_times()
        by_held = {held: entry for slot in self.slots for held, entry in slot.details().items()}
        now = self.snapshot()
        found = {}
        for name, held in self._present_names(by_held).items():
            queue = now.queues[name]
            entry = {**by_held[held], "waiting": queue.waiting, "running": queue.running}
            entry["tokens"] = self._tokens[name]
            if (service_s := self._load.service_s(held)) is not None:
                # Seconds of the engine for one request: it works on several at once.
                entry["busy_s"] = round(service_s / now.capacity[name], 4)
            if held != name:
                entry["held_as"] = held
            if (first := now.shares.get(name)) is not None:
                entry |= {"shares": first, "host_bytes": 0}
            found[name] = entry
        return found

    async def operate(self, operation: str, expert: str) -> None:
        """Load, evict, unload, pin or unpin an expert.

        Raises:
            UnknownModelError: The pool has no such expert.
            UnknownEndpointError: There is no such operation.
            ConflictError: The present state does not allow the operation.
        """
        held = self.held_name(expert)
        slot = self.slot_of(held)
        self._called.set()
        if operation not in OPERATIONS:
            raise UnknownEndpointError(
                f"no operation {operation!r}; operations: {', '.join(OPERATIONS)}"
            )
        try:
            if operation == "pin" and isinstance(slot, SharedSlot):
                self._check_pin(slot.unit_of(held).name)
            await slot.operate(operation, held)
        except CoeError as error:
            _name_expert(error, held, expert)
            raise

    def _check_pin(self, unit: str) -> None:
        """Check that a pin would leave room for the other units to take turns.

        Raises:
            ConflictError: It would not.
        """
        bound = self._policy.host_bytes if self._policy is not None else None
        places = [slot.view(()) for slot in self.shared]
        if bound is not None and (needed := least(places, unit)) > bound:
            raise ConflictError(
                f"expert {unit!r} can't be pinned: with it {needed / 1024**3:.2f} GiB have to stay "
                f"in host memory, and swap.host_bytes is {bound / 1024**3:.2f} GiB"
            )

    def demand(self, wanted: dict[str, float]) -> None:
        """Record unmet demand: by expert, the utility of requests that went to other experts."""
        now_s = time.monotonic()
        self._called.set()
        for expert, amount in wanted.items():
            held = expert if self._held is None else self._held.get(expert, "")
            if (slot := self._slot_of.get(held)) is not None:
                slot.record_demand(held, amount, now_s)

    def swap_counts(self) -> dict[tuple[str, str, str], int]:
        """Swaps since the start, by unit, method and reason."""
        counts: Counter[tuple[str, str, str]] = Counter()
        for slot in self.slots:
            counts.update(slot.swap_counts())
        return dict(counts)

    def canary_failures(self) -> int:
        """The number of swaps after which the weights differed from those that were loaded."""
        return sum(slot.canary_failures for slot in self.slots)

    def unhealthy(self) -> str | None:
        """Why this process should be replaced, or None."""
        if not self._draining and any(task.done() for task in self._tasks.values()):
            return "the supervisor of a slot has ended"
        return next((why for slot in self.slots if (why := slot.unhealthy())), None)

    def load(self) -> PoolLoad:
        """Return the load, by which Ray Serve adds and removes replicas."""
        slots = [
            SlotLoad(slot.capacity, slot.backlogs(), slot.serving, slot.full_start_s)
            for slot in self.slots
        ]
        return pool_load(slots, self._load, time.monotonic())

    def queued(self) -> int:
        """The number of running and waiting requests."""
        return sum(slot.requests for slot in self.slots)


@dataclass(slots=True)
class _Told:
    """What gateways are told of a pool.

    Attributes:
        snapshot: The state.
        revision: What the pool's revision was then.
        at_s: When that was.
        before: The state that `line` tells the differences from.
        line: The encoded differences; None before the first.
    """

    snapshot: Snapshot
    revision: int
    at_s: float
    before: Snapshot | None = None
    line: bytes | None = None


async def _addressed(body: bytes, held: str) -> bytes:
    """Return a request's body with the held name as its model.

    Raises:
        InvalidRequestError: The body is nested too deep to be written again.
    """

    def address() -> bytes:
        data = orjson.loads(body)
        return orjson.dumps({**data, "model": held}) if isinstance(data, dict) else body

    try:
        # A large body would delay the streams of other requests.
        return await asyncio.to_thread(address) if len(body) > _LARGE_BYTES else address()
    except orjson.JSONDecodeError:
        return body  # the engine says what is wrong
    except orjson.JSONEncodeError:
        raise InvalidRequestError("the body is nested too deep") from None


def _name_expert(error: CoeError, held: str, expert: str) -> None:
    """Let an error name the expert that was asked for. Its client may not know the other name."""
    if held != expert:
        error.message = error.message.replace(repr(held), repr(expert))
