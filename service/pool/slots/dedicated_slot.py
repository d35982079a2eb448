"""A slot for one base model and its adapters, which always stay loaded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from msgspec.structs import replace

from service.engine.engine_interface import Engine
from service.errors import CoeError, ConflictError, UnknownModelError
from service.pool.slot_units import Unit, UnitState
from service.pool.slots.base_slot import BaseSlot, E
from service.pool.slots.idle_unload import IDLE, UNLOAD, WAKING_DEMAND
from service.rpc.snapshot import ExpertState
from service.types import Residency

log = logging.getLogger("coe.pool")

_WATCH_S = 0.2
_RELOAD_S = 30.0


class DedicatedSlot(BaseSlot[E]):
    """An engine with a base model and adapters.

    Args:
        experts: The names of the base and its adapters.
        build: A function that makes an engine without starting it.
        capacity: The number of places of the engine. A place runs one request.
        max_waiting: The load that may wait for each expert.
        start_guess_s: The estimated seconds of an engine start, used until a start was measured.
        changed: A callback for every change that the pool's snapshot would show.
    """

    def __init__(
        self,
        experts: tuple[str, ...],
        build: Callable[[], E],
        *,
        capacity: int,
        max_waiting: int,
        start_guess_s: float,
        changed: Callable[[], None],
    ) -> None:
        super().__init__(
            experts,
            capacity=capacity,
            max_waiting=max_waiting,
            start_guess_s=start_guess_s,
            changed=changed,
        )
        self.build = build
        self._states = {name: ExpertState(Residency.LOADING) for name in experts}
        # The folders of adapters that were added after the engine was built.
        self._adapters: dict[str, str] = {}
        self._engine_died = asyncio.Event()
        # What requests would have given that went elsewhere while the slot rested.
        self._unmet = UnitState()
        # Loads of experts into the engine that are under way.
        self._loads = 0

    # --- the engine's life

    def _build_engine(self) -> E:
        return self.build()

    async def _start(self, engine: E) -> None:
        self._start_began_s = time.monotonic()
        self._set_all(Residency.LOADING)
        report = await engine.start()
        # This comes before the first expert is ready, because its requests run from then on.
        self._engine, self._report = engine, report
        for name in self.experts:
            await self._load(engine, name)
        self._on_started(time.monotonic() - self._start_began_s)
        self._changed()

    async def _load(self, engine: Engine, name: str) -> None:
        """Load one expert, and set its state to ready or failed.

        The state of an adapter that was removed meanwhile does not change.
        """
        self._loads += 1
        try:
            if (adapter := self._adapters.get(name)) is not None:
                await engine.load(name, adapter)
            else:
                await engine.load(name)
        except CoeError as error:
            if name not in self._states:
                return
            log.error("expert %s failed: %s", name, error.message)
            self._states[name] = ExpertState(Residency.FAILED, reason=error.message)
            self._refuse_failed()
        else:
            if name not in self._states:
                return
            self._states[name] = self._serving_state()
            self._grant()
        finally:
            self._loads -= 1
        self._changed()

    async def _watch(self, engine: E) -> None:
        retry_at_s = time.monotonic() + _RELOAD_S
        while not self._resting and (reason := engine.failure()) is None:
            if self.why_busy() is None and self._is_idle():
                self._begin_rest(IDLE)
                return
            if time.monotonic() >= retry_at_s:
                await self._retry_failed_experts(engine)
                retry_at_s = time.monotonic() + _RELOAD_S
            # The report may be about an earlier engine than this one.
            self._engine_died.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_S):
                    await self._engine_died.wait()
        if self._resting:
            return
        self._engine = None
        self._start_began_s = time.monotonic()
        self._set_all(Residency.LOADING)
        log.error("engine of %s died (%s); starting another", "/".join(self.experts), reason)

    async def _retry_failed_experts(self, engine: Engine) -> None:
        for name, state in list(self._states.items()):
            if state.state is Residency.FAILED:
                await self._load(engine, name)

    def _on_start_failed(self, reason: str) -> None:
        self._set_all(Residency.FAILED, reason)

    def report_engine_death(self) -> None:
        self._engine_died.set()

    def _set_all(self, state: Residency, reason: str = "", *, released: bool = False) -> None:
        for name in self.experts:
            self._states[name] = replace(
                self._states[name], state=state, reason=reason, eta_s=0.0, released=released
            )
        self._changed()

    # --- rest

    def _is_idle(self) -> bool:
        return self.idle_policy.is_due(self.experts, self._used_s, time.monotonic())

    def why_busy(self) -> str | None:
        if self._queue.total:
            return "requests run or wait"
        if self._engine is None or self._loads:
            return "weights are being loaded"
        return None

    def _show_rest(self) -> None:
        self._unmet = UnitState()
        self._set_all(Residency.DISK, released=True)

    def _on_wanted(self, expert: str | None) -> None:
        self._set_all(Residency.LOADING)

    def record_demand(self, expert: str, amount: float, now_s: float) -> None:
        """Record unmet demand, which ends a rest when it is enough."""
        if self._resting:
            self._unmet.record_demand(amount, now_s)
            if self._unmet.decayed_demand(now_s) >= WAKING_DEMAND:
                self.want(expert)

    # --- additions and removals of adapters

    async def add_adapter(self, expert: str, folder: str) -> None:
        """Load another adapter into the running engine."""
        self.experts = (*self.experts, expert)
        self._adapters[expert] = folder
        state = Residency.DISK if self._resting else Residency.LOADING
        self._states[expert] = ExpertState(state, released=self._resting)
        self._queue.add_expert(expert)
        self._changed()
        # An engine that is starting loads this adapter with the others.
        if (engine := self._engine) is not None and self._report is not None:
            await self._load(engine, expert)

    async def remove_adapter(
        self, expert: str, reason: str, kind: type[CoeError] = UnknownModelError
    ) -> None:
        """Remove an adapter from the running engine, once its running requests have ended.

        Args:
            expert: The adapter's name.
            reason: Why the adapter is gone. Clients that wait for it get this reason.
            kind: The class of the error that these clients get.
        """
        self.experts = tuple(name for name in self.experts if name != expert)
        del self._states[expert]
        self._queue.refuse_waiting(expert, lambda _: kind(reason))
        self._changed()
        while self._queue.counts(expert)[1]:
            self._request_ended.clear()
            await self._request_ended.wait()
        self._adapters.pop(expert, None)
        if (engine := self._engine) is not None and engine.failure() is None:
            try:
                await engine.unload(expert)
            except CoeError as error:
                log.error("adapter %s could not be unloaded: %s", expert, error.message)

    # --- figures and operations

    def unit_of(self, expert: str) -> Unit:
        assert expert in self.experts
        return Unit(self.experts[0], self.experts)

    def states(self) -> dict[str, ExpertState]:
        left_s = self.ahead_s + self.start_left_s()
        return {
            # The time is rounded. Otherwise a countdown would change every snapshot.
            name: replace(state, eta_s=float(round(left_s)))
            if state.state is Residency.LOADING or state.released
            else state
            for name, state in self._states.items()
        }

    async def operate(self, operation: str, expert: str) -> None:
        state = self._states[expert]
        if operation == "load" and self._resting:
            self.want(expert)
            return
        if operation == UNLOAD:
            await self.release()
            return
        if operation == "load" and state.state is Residency.FAILED:
            raise ConflictError(
                f"expert {expert!r} could not be loaded and is tried again every "
                f"{_RELOAD_S:.0f} s: {state.reason}"
            )
        if operation != "load":
            raise ConflictError(f"expert {expert!r} has a slot of its own and always stays")
