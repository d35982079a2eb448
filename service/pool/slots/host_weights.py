"""The weights of a shared slot's units: their residency, loads and evictions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from service.engine.engine_interface import LoadResult, SwappingEngine
from service.errors import CoeError, ConflictError, EngineDeadError
from service.pool.slot_units import Unit, UnitState
from service.types import Residency

log = logging.getLogger("coe.pool")

TICK_S = 0.05
RETRY_S = 30.0
# A unit counts as faulty after this many engine deaths in a row while it was loaded or swapped in.
_DEATHS = 2
# A unit without weights of its own takes a few kilobytes to load.
_WEIGHTLESS_FILL_S = 0.05


class ResidencyListener(Protocol):
    """Receives the changes of a slot's weights. The slot implements it."""

    def on_residency(self, unit: str, residency: Residency, reason: str = "") -> None:
        """React to a change of a unit's residency. `reason` says why a load failed."""

    def on_retry(self, unit: str) -> None:
        """React to a failed unit that may be tried again."""

    def on_engine_death(self) -> None:
        """React to an engine that died while it moved weights."""

    def on_transfer_end(self) -> None:
        """React to the end of a transfer, whether or not it succeeded."""


class HostWeights:
    """The units of one slot, the state of each, and the transfers to and from host memory.

    One transfer is under way at a time. It evicts some units and then loads at most one unit.

    Args:
        guess: The estimated sizes and times of units that were not measured yet.
        listener: Receives every change.

    Attributes:
        running_unit: The unit that runs, or the unit that the next engine starts with.
    """

    def __init__(self, guess: UnitState, running_unit: str, listener: ResidencyListener) -> None:
        self.running_unit = running_unit
        self._guess = guess
        self._listener = listener
        self._units: dict[str, Unit] = {}
        self._states: dict[str, UnitState] = {}
        self._unit_of: dict[str, str] = {}
        self._transfer: asyncio.Task[None] | None = None
        self._loading_unit: str | None = None
        # The bytes of units that are being evicted: without a load after it, and to make room for
        # `_loading_unit`.
        self._evicting: dict[str, int] = {}
        self._making_room: dict[str, int] = {}
        # Whether an engine's process exists, or room was reserved for its process.
        self._is_occupied = False
        # The bytes that a dead or abandoned engine held. They are not free before its process has
        # ended.
        self._dead_engine_bytes: int | None = None

    # --- units

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units of the slot."""
        return tuple(self._units.values())

    def __contains__(self, unit: object) -> bool:
        return unit in self._units

    def __iter__(self) -> Iterator[tuple[Unit, UnitState]]:
        """Yield the units with their states."""
        for name, unit in self._units.items():
            yield unit, self._states[name]

    def unit(self, name: str) -> Unit:
        """Return the unit with this name."""
        return self._units[name]

    def state(self, unit: str) -> UnitState:
        """Return the state of a unit."""
        return self._states[unit]

    def find_state(self, unit: str | None) -> UnitState | None:
        """Return the state of a unit, or None where the unit is not in this slot."""
        return None if unit is None else self._states.get(unit)

    def unit_of(self, expert: str) -> Unit:
        """Return the unit that an expert belongs to."""
        return self._units[self._unit_of[expert]]

    def owner_of(self, unit: str) -> str:
        """Return the name of the unit whose weights a unit runs on."""
        return self._units[unit].needs or unit

    def dependents_of(self, unit: str) -> list[str]:
        """Return the other units that run on a unit's weights."""
        return [other.name for other in self._units.values() if other.needs == unit]

    def add(self, unit: Unit, state: UnitState | None = None) -> None:
        """Add a unit that is not held yet. `state` has the measurements of another slot."""
        if state is None:
            size = unit.size_bytes or (0 if unit.needs else self._guess.host_bytes)
            fill_s = self._guess.fill_s
            if unit.needs:
                fill_s = min(fill_s, _WEIGHTLESS_FILL_S)
            state = replace(self._guess, host_bytes=size, fill_s=fill_s, pinned=unit.pinned)
        state.reset_residency()
        self._units[unit.name] = unit
        self._states[unit.name] = state
        self._unit_of.update(dict.fromkeys(unit.experts, unit.name))

    def remove(self, unit: str, engine: SwappingEngine | None) -> UnitState:
        """Remove a unit, and start to evict it if the engine holds it.

        No transfer may be under way.

        Returns:
            The unit's state, with its measurements.
        """
        removed = self._units.pop(unit)
        state = self._states.pop(unit)
        for name in removed.experts:
            del self._unit_of[name]
        if state.tier is Residency.HOST and engine is not None:
            self._evicting[unit] = state.host_bytes
            self._begin(engine, None, [unit])
        return state

    # --- figures

    def is_held(self, unit: str) -> bool:
        """Return whether a unit's weights are in host memory, running or not."""
        return self._states[unit].tier in (Residency.HOST, Residency.DEVICE)

    def fetch_time_s(self, unit: str) -> float:
        """Return the seconds to bring a unit to host memory, including its owner's weights.

        A unit that is being swapped in is there already.
        """
        state = self._states[unit]
        own_s = state.fill_s if state.tier is Residency.DISK else 0.0
        owner = self._units[unit].needs
        return own_s + (self.fetch_time_s(owner) if owner in self._units else 0.0)

    def held_bytes(self) -> int:
        """Return the bytes of weights that are in host memory, being loaded or being evicted.

        The weights of an engine that has not started yet count as soon as room is reserved.
        """
        if self._dead_engine_bytes is not None:
            return self._dead_engine_bytes
        if not self._is_occupied:
            return 0
        present = {self.owner_of(self.running_unit)} | {
            name for name, state in self._states.items() if state.tier is not Residency.DISK
        }
        loading = self._loading_unit
        held = sum(
            self._states[name].host_bytes
            for name in present
            if not self._units[name].needs and name != loading
        )
        arriving = 0
        if loading is not None and not self._units[loading].needs:
            arriving = self._states[loading].host_bytes
        # The load starts only after the evictions that make room for it.
        return held + sum(self._evicting.values()) + max(arriving, sum(self._making_room.values()))

    # --- the engine's life

    def reserve(self) -> None:
        """Reserve room for the weights of the engine that is about to start."""
        self._is_occupied = True

    def freeze(self) -> None:
        """Keep counting all bytes of a lost engine until its process has ended."""
        if self._dead_engine_bytes is None:
            self._dead_engine_bytes = self.held_bytes()

    @property
    def is_frozen(self) -> bool:
        """Whether the process of a lost engine has not ended yet."""
        return self._dead_engine_bytes is not None

    def release(self) -> None:
        """Stop counting the bytes of an engine whose process has ended."""
        self._is_occupied = False
        self._dead_engine_bytes = None
        self._evicting.clear()
        self._making_room.clear()

    # --- transfers

    @property
    def loading_unit(self) -> str | None:
        """The unit that is being loaded to host memory."""
        return self._loading_unit

    @property
    def is_transferring(self) -> bool:
        """Whether a transfer is under way."""
        return self._transfer is not None

    @property
    def is_idle(self) -> bool:
        """Whether no unit is being loaded or evicted."""
        return self._transfer is None and not self._evicting

    def begin_transfer(
        self, engine: SwappingEngine, unit: str | None, evicted: Sequence[str]
    ) -> None:
        """Start to evict units and then to load another unit in their place."""
        for name in evicted:
            # From here on no swap chooses this unit.
            self._states[name].tier = Residency.DISK
            self._listener.on_residency(name, Residency.DISK)
            leaving = self._evicting if unit is None else self._making_room
            leaving[name] = self._states[name].host_bytes
        if unit is not None:
            self._loading_unit = unit
            self._listener.on_residency(unit, Residency.LOADING)
        if unit is not None or evicted:
            self._begin(engine, unit, evicted)

    def _begin(self, engine: SwappingEngine, unit: str | None, evicted: Sequence[str]) -> None:
        self._transfer = asyncio.create_task(self._run_transfer(engine, unit, evicted))

    async def _run_transfer(
        self, engine: SwappingEngine, unit: str | None, evicted: Sequence[str]
    ) -> None:
        try:
            for name in evicted:
                await engine.evict(name, for_next=unit is not None)
                self._forget_bytes(name)
            if unit is not None:
                self.record_load(unit, await engine.load_to_host(unit))
                state = self._states[unit]
                state.tier = Residency.HOST
                state.wanted = False
                state.deaths = 0
                self._listener.on_residency(unit, Residency.HOST)
        except Exception as error:
            reason = error.message if isinstance(error, CoeError) else repr(error)
            if isinstance(error, EngineDeadError) or engine.failure() is not None:
                self.freeze()
                if unit is not None:
                    self.record_engine_death(unit, error)
            elif unit is not None:
                self.mark_failed(unit, reason)
            else:
                log.error("eviction of %s failed: %s", "/".join(evicted), reason)
        finally:
            self._transfer = self._loading_unit = None
            for name in evicted:
                self._forget_bytes(name)
            self._listener.on_transfer_end()

    def _forget_bytes(self, unit: str) -> None:
        self._evicting.pop(unit, None)
        self._making_room.pop(unit, None)

    async def cancel_transfer(self) -> None:
        """Cancel the transfer that is under way, if any."""
        if self._transfer is not None:
            self._transfer.cancel()
            await asyncio.gather(self._transfer, return_exceptions=True)
            self._transfer = self._loading_unit = None

    async def evict(self, engine: SwappingEngine, unit: str) -> None:
        """Evict an unused unit after the units that run on its weights."""
        names = [*filter(self.is_held, self.dependents_of(unit)), unit]
        for name in names:
            state = self._states[name]
            state.tier = Residency.DISK
            if state.failed_until <= time.monotonic():
                self._listener.on_residency(name, Residency.DISK)
            self._evicting[name] = state.host_bytes
        try:
            for name in names:
                await engine.evict(name)
        except CoeError as error:
            if isinstance(error, EngineDeadError) or engine.failure() is not None:
                self.freeze()
            raise
        finally:
            for name in names:
                self._evicting.pop(name, None)

    def find_user(self, unit: str) -> str | None:
        """Return a unit that keeps another unit's weights in place, or None.

        Such a unit runs on these weights, and it is in use or pinned.
        """
        for name in self.dependents_of(unit):
            state = self._states[name]
            if (
                name in (self.running_unit, self._loading_unit)
                or state.tier is Residency.LOADING
                or (state.pinned and self.is_held(name))
            ):
                return name
        return None

    def check_evictable(self, expert: str) -> None:
        """Check that an expert's unit may be evicted.

        Raises:
            ConflictError: The unit has to stay.
        """
        unit = self._unit_of[expert]
        state = self._states[unit]
        if unit == self.running_unit or state.pinned or state.tier is not Residency.HOST:
            is_running = unit == self.running_unit
            why = "running" if is_running else "pinned" if state.pinned else "not held"
            raise ConflictError(f"expert {expert!r} is {why} and can't be evicted")

    # --- measurements and failures

    def record_load(self, unit: str, result: LoadResult) -> None:
        """Record the size of a unit and the duration of its load."""
        state = self._states[unit]
        state.host_bytes, state.fill_s = result.host_bytes, result.fill_s
        state.stall_s = result.stall_s
        state.starts = result.starts

    def record_engine_death(self, unit: str, error: Exception) -> None:
        """Record that the engine died while it loaded a unit. The unit may not be the cause."""
        self.freeze()
        state = self._states[unit]
        state.deaths += 1
        if state.deaths >= _DEATHS:
            state.deaths = 0
            self.mark_failed(unit, f"the engine died while it loaded it ({error})")
        else:
            self._listener.on_residency(unit, Residency.DISK)
        self._listener.on_engine_death()

    def mark_failed(self, unit: str, reason: str) -> None:
        """Record that a unit can't be loaded or run. It is tried again after a while."""
        log.error("expert %s failed: %s", unit, reason)
        state = self._states[unit]
        state.tier = Residency.DISK
        state.wanted = False
        state.failed_until = time.monotonic() + RETRY_S
        self._listener.on_residency(unit, Residency.FAILED, reason)
        self.retry_later(unit)

    def retry_later(self, unit: str) -> None:
        """Try a unit again after a while."""
        self._states[unit].failed_until = time.monotonic() + RETRY_S
        asyncio.get_running_loop().call_later(RETRY_S, self._end_failure, unit)

    def _end_failure(self, unit: str) -> None:
        # The unit may have left the slot, or may have failed again.
        state = self._states.get(unit)
        if state is not None and state.failed_until <= time.monotonic() + TICK_S:
            self._listener.on_retry(unit)
