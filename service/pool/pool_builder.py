"""Makes a pool from its config, and changes it as the config changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from service.config import Config, PoolConfig
from service.engine.engine_interface import EngineObserver, SwappingEngine
from service.engine.swap_proof import ChoiceSource, SwapMethodChoice
from service.models.expert_folders import file_versions
from service.moe.virtual_expert_profiles import profile_digests
from service.pool.engine_factory import EngineFactory
from service.pool.pool import Pool
from service.pool.pool_diff import PoolDiff, UnitSource, units_of
from service.pool.same_weight_experts import share_weights
from service.pool.slot_units import UnitState
from service.pool.slots.base_slot import BaseSlot
from service.pool.slots.dedicated_slot import DedicatedSlot
from service.pool.slots.idle_unload import IdlePolicy, longest_limit
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_method import resolve_swap_method, with_swap_method
from service.pool.swap_planner import SwapPolicy

log = logging.getLogger("coe.app")

# These guesses hold until times and sizes were measured.
_VLLM_START_S = 40.0
_FILL_GUESS_S = 5.0
_SWAP_GUESS_S = 0.05
_WEIGHTS_GUESS_BYTES = 1024**3


class PoolBuilder:
    """Builds the pool of one kind, and changes it when its config changes.

    A unit is an expert with weights and its adapters. Each unit has a slot, where it takes turns
    with the virtual experts that run on its weights. A pool with fewer slots than units shares
    the slots among all units, which take turns and move between slots. Experts with the same
    weights are one (`same_weight_experts`).

    Args:
        config: The config in force.
        kind: The pool's name in the config.
        pool: The pool, still without slots.
        observer: Receives the events of the engines, for metrics.
        logs: The folder for the logs of servers that commands start; None for a temporary one.
    """

    def __init__(
        self,
        config: Config,
        kind: str,
        pool: Pool,
        observer: EngineObserver,
        logs: Path | None = None,
    ) -> None:
        # A running pool keeps its method, even if a record changes meanwhile.
        self.swap_method = resolve_swap_method(config, kind)
        if self.swap_method is not None:
            _log_choice(kind, self.swap_method.choice)
        self._kind = kind
        given = config
        sharing = share_weights(self._with_method(config), kind)
        # Each expert of this config is one set of weights that the pool holds.
        self._config = config = sharing.config
        self._held = sharing.held
        self._observer = observer
        self.engines = EngineFactory(config, kind, observer, logs)
        versions = file_versions(config, config.local_experts(kind))
        self._wanted = units_of(config, kind, profile_digests(config), versions)
        # The units of the pool, and the tasks that are removing units and adapters.
        self._present = {name: unit.copy() for name, unit in self._wanted.items()}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        # The bases of adapters that are being removed. The engines of these bases keep running.
        self._base_of: dict[str, str] = {}
        # Units whose engine has LoRA support, so that adapters can be added while it runs.
        self._with_adapters = {
            name
            for name, unit in self._wanted.items()
            if len(unit.experts) > 1 or self._spare_adapters
        }
        self._turn = asyncio.Lock()
        self.pool = pool
        pool.serve(self._held, _elsewhere(given, kind))
        pool.set_idle_policy(_idle_policy(given, kind, self._held))
        groups = config.groups(kind)
        self.engines.name_experts(self._present_experts())
        slots = self._settings.slots
        self._shared = slots is not None and slots < len(groups)
        if slots is None or not self._shared:
            for group in groups:
                pool.add(self._make_slot(group))
        else:
            for i in range(slots):
                units = tuple(unit for group in groups[i::slots] for unit in group)
                pool.add(self._make_shared_slot(units, i))

    @property
    def _settings(self) -> PoolConfig:
        return self._config.pools[self._kind]

    @property
    def _spare_adapters(self) -> int:
        return self._settings.vllm.spare_adapters

    def difference(self, config: Config) -> PoolDiff:
        """Return what a reload to another config would change. It reads files' versions.

        Raises:
            ConfigError: A steering profile can't be read.
        """
        sharing = share_weights(self._with_method(config), self._kind, self._config)
        config = sharing.config
        versions = file_versions(config, config.local_experts(self._kind))
        wanted = units_of(config, self._kind, profile_digests(config), versions)
        return self._difference(wanted)

    def _difference(self, wanted: dict[str, UnitSource]) -> PoolDiff:
        return PoolDiff.between(
            self._present,
            wanted,
            leaving=self._leaving,
            shared=[name for name in self._present if self.pool.is_shared(name)],
            with_adapters=self._with_adapters,
        )

    # --- reloading

    async def reload(self, config: Config) -> None:
        """Change the pool to match another config.

        An engine that was started with adapters can add and remove adapters while it runs, so
        that its base and its other adapters keep serving. An engine that was started without
        adapters, or that several units share, is restarted for such a change.

        The method does not wait for the running requests of removed experts. `settled` waits for
        them.
        """
        async with self._turn:
            given = config
            config = self._with_method(config)
            sharing = await asyncio.to_thread(share_weights, config, self._kind, self._config)
            self._config = config = sharing.config
            self._held = sharing.held
            self.engines.set_config(config)
            profiles = await asyncio.to_thread(profile_digests, config)
            names = config.local_experts(self._kind)
            versions = await asyncio.to_thread(file_versions, config, names)
            self._wanted = units_of(config, self._kind, profiles, versions)
            self.pool.set_policy(_policy(self._settings))
            self.pool.set_idle_policy(_idle_policy(given, self._kind, self._held))
            diff = self._difference(self._wanted)
            for name, reason in diff.restarts.items():
                log.warning("the engine of %s starts again: %s", name, reason)
            # New units are added first, because they may take over the slot of a removed unit.
            await self._apply(excluded=diff.leaving)
            self._begin_removal(diff.leaving)
            self.pool.serve(self._held, _elsewhere(given, self._kind))
            self._update_pool()
        # From here on the pool refuses requests for the removed experts.
        await asyncio.sleep(0)

    async def settled(self) -> None:
        """Wait until the pool has all units of the config and no others."""
        while True:
            await asyncio.gather(*self._leaving.values())
            async with self._turn:
                if not self._leaving:
                    return

    async def stop(self, drain_s: float) -> None:
        """Stop the pool, and free the shared memory of its weights."""
        leaving = list(self._leaving.values())
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await self.pool.stop(drain_s)
        await asyncio.to_thread(self.engines.close)

    # --- the swap method

    def _with_method(self, config: Config) -> Config:
        """Return the config with the method that `auto` stands for since the pool's start."""
        if self.swap_method is None or config.pools[self._kind].swap.method != "auto":
            return config
        return with_swap_method(config, self._kind, self.swap_method.choice.method)

    def _withdraw_proof(self, unit: str, method: str | None, why: str) -> None:
        if self.swap_method is not None:
            method = method or self.engines.swap_method
            withdraw = partial(self.swap_method.withdraw, unit, method, why)
            asyncio.get_running_loop().run_in_executor(None, withdraw)

    # --- removals

    def _begin_removal(self, units: Iterable[str]) -> None:
        """Start to remove units. Virtual experts go before the units that they run on."""
        for name in sorted(units, key=lambda name: not self._present[name].needs):
            before = [
                task
                for other, task in self._leaving.items()
                if self._base_of.get(other) == name
                or (other in self._present and self._present[other].needs == name)
            ]
            self._leaving[name] = asyncio.create_task(self._remove_unit(name, before))

    async def _remove_unit(self, unit: str, before: Sequence[asyncio.Task[None]]) -> None:
        """Remove a unit after the tasks `before` have ended. Then add the units that waited."""
        await asyncio.gather(*before, return_exceptions=True)
        removing = self.pool.remove(unit, self._removal_reason(unit), self._successors())
        await self._finish_removal(removing)
        async with self._turn:
            for name in self._present.pop(unit).experts:
                self.engines.forget(name)
                self._observer.on_removed(name)
            del self._leaving[unit]
            await self._add_successors()

    async def _remove_adapter(self, unit: str, name: str) -> None:
        """Remove an adapter from a running engine. Then add the units that waited for this."""
        reason = self._removal_reason(name)
        removing = self.pool.remove_adapter(name, reason, self._successors())
        await self._finish_removal(removing)
        async with self._turn:
            del self._leaving[name], self._base_of[name]
            self._observer.on_removed(name)
            log.info("adapter %s was removed from the engine of %s", name, unit)
            await self._add_successors()

    @staticmethod
    async def _finish_removal(removing: Awaitable[None]) -> None:
        try:
            await removing
        except Exception:
            # A failed removal must not keep the successor out.
            log.exception("removal of an expert failed")

    async def _add_successors(self) -> None:
        """Add the units and adapters that waited for a removal."""
        try:
            await asyncio.to_thread(self._refresh_engines)
            await self._apply()
        except Exception:
            # The pool goes on without these units. The next config may correct the fault.
            log.exception("adding the successor of an expert failed")
        self._update_pool()

    # --- additions

    async def _apply(self, excluded: Collection[str] = ()) -> None:
        """Add and change units and adapters, except where a removal has to finish first.

        Args:
            excluded: Units that are about to be removed.
        """
        # Adapters come first. An adapter that became a unit must leave its base's engine first.
        for name, unit in self._present.items():
            if name not in self._wanted or name in self._leaving or name in excluded:
                continue
            if self.pool.is_shared(name):
                for expert, source in self._wanted[name].experts.items():
                    unit.experts[expert] = unit.experts[expert].updated(source)
            else:
                await self._change_adapters(name)
        await self._add_units({*excluded, *self._leaving})

    async def _change_adapters(self, unit: str) -> None:
        """Add and remove adapters of a unit whose engine keeps running."""
        present, wanted = self._present[unit].experts, self._wanted[unit].experts
        for name, source in list(present.items()):
            if name == unit or name in self._leaving:
                continue
            if name in wanted and source.matches(wanted[name]):
                present[name] = source.updated(wanted[name])
                continue
            del present[name]
            self._leaving[name] = asyncio.create_task(self._remove_adapter(unit, name))
            self._base_of[name] = unit
        present[unit] = present[unit].updated(wanted[unit])
        for name in wanted:
            # An adapter that is still a unit must be removed as a unit first.
            if name not in present and name not in self._leaving and name not in self._present:
                present[name] = wanted[name]
                folder = self._config.experts[name].adapter
                assert folder is not None
                await self.pool.add_adapter(unit, name, folder)
                log.info("adapter %s was added to the engine of %s", name, unit)

    async def _add_units(self, going: Collection[str]) -> None:
        """Add wanted units. Units wait while they, or the units they need, are being removed."""
        for name, unit in self._wanted.items():
            if name in self._present or name in going:
                continue
            if unit.needs and (unit.needs in going or unit.needs not in self._present):
                continue
            if self._shared and self.pool.closing and not unit.needs:
                # The unit gets a slot when the removal frees one.
                continue
            self._present[name] = unit.copy()
            try:
                await self._add_unit(tuple(unit.experts))
            except BaseException:
                del self._present[name]
                raise

    async def _add_unit(self, experts: tuple[str, ...]) -> None:
        await asyncio.to_thread(self._refresh_engines)
        needs = self._config.needs(experts[0])
        is_short = self._shared and len(self.pool.shared) < (self._settings.slots or 0)
        if is_short and not needs:
            # A slot that lost all its units is built anew.
            self.pool.add_running(await asyncio.to_thread(self._make_shared_slot, (experts,)))
        elif self._shared or needs:
            self.pool.take_in(await asyncio.to_thread(self.engines.unit, experts))
        else:
            names = self._config.local_experts(self._kind)
            has_virtual = any(self._config.needs(name) == experts[0] for name in names)
            make = self._make_shared_slot if has_virtual else self._make_slot
            self.pool.add_running(make((experts,)))

    def _removal_reason(self, name: str) -> str:
        if name in self._successors():
            return f"expert {name!r} was changed in the config, or its files were; ask again"
        return f"expert {name!r} is not in the config any more"

    def _wanted_experts(self) -> set[str]:
        return {name for unit in self._wanted.values() for name in unit.experts}

    def _successors(self) -> set[str]:
        """Return the names that can be asked for again after a removal."""
        return self._wanted_experts() | self._held.keys()

    def _present_experts(self) -> Iterator[str]:
        return (name for unit in self._present.values() for name in unit.experts)

    def _refresh_engines(self) -> None:
        self.engines.refresh(list(self._present_experts()))

    def _update_pool(self) -> None:
        """Update the pool's lists of experts that come back and of pinned experts."""
        leaving = {
            name
            for leaver in self._leaving
            for name in (self._present[leaver].experts if leaver in self._present else (leaver,))
        }
        again = self._wanted_experts() & leaving
        self.pool.expect({name: self._removal_reason(name) for name in again})
        for name in self._wanted:
            self.pool.set_pinned(name, self._config.experts[name].pinned)

    # --- slots

    def _make_slot(self, group: tuple[tuple[str, ...], ...]) -> BaseSlot[SwappingEngine]:
        """Make the slot of a unit and of the virtual experts that run on its weights."""
        if len(group) > 1:
            return self._make_shared_slot(group)
        settings = self._settings
        (experts,) = group
        command = self._config.experts[experts[0]].command
        if command is not None and command.sleep is not None and settings.engine != "simulated":
            # Only such a slot lets an engine sleep while nobody asks for it.
            return self._make_shared_slot(group)
        return DedicatedSlot(
            experts,
            partial(self._dedicated_engine, experts[0]),
            capacity=settings.max_running,
            max_waiting=settings.max_queued_requests,
            start_guess_s=self._start_guess_s,
            changed=self.pool.changed,
        )

    def _make_shared_slot(
        self, units: tuple[tuple[str, ...], ...], index: int | None = None
    ) -> SharedSlot:
        settings = self._settings
        simulated = settings.engine == "simulated"
        return SharedSlot(
            [self.engines.unit(experts) for experts in units],
            partial(self.engines.shared_engine, slot=index),
            _policy(settings),
            capacity=settings.max_running,
            max_waiting=settings.max_queued_requests,
            start_guess_s=self._start_guess_s,
            guess=UnitState(
                host_bytes=_WEIGHTS_GUESS_BYTES,
                fill_s=settings.simulated.fill_s if simulated else _FILL_GUESS_S,
                swap_s=settings.simulated.swap_s if simulated else _SWAP_GUESS_S,
            ),
            changed=self.pool.changed,
            apart=not simulated and (self._has_commands or self.engines.swap_method == "respawn"),
            refuted=self._withdraw_proof,
        )

    @property
    def _has_commands(self) -> bool:
        names = self._config.local_experts(self._kind)
        return any(self._config.experts[name].command is not None for name in names)

    @property
    def _start_guess_s(self) -> float:
        settings = self._settings
        return settings.simulated.load_s if settings.engine == "simulated" else _VLLM_START_S

    def _dedicated_engine(self, base: str) -> SwappingEngine:
        """Make an engine that runs one unit with its present adapters."""
        adapters = tuple(name for name in self._present[base].experts if name != base)
        if adapters or self._spare_adapters:
            self._with_adapters.add(base)
        else:
            self._with_adapters.discard(base)
        return self.engines.dedicated_engine(base, adapters)


def _log_choice(kind: str, choice: SwapMethodChoice) -> None:
    level = logging.WARNING if choice.source is ChoiceSource.FALLBACK else logging.INFO
    log.log(level, "pools.%s: swap.method %s (%s)", kind, choice.method, choice.reason)


def _policy(settings: PoolConfig) -> SwapPolicy:
    swap = settings.swap
    return SwapPolicy(
        min_stay_s=swap.min_stay_s,
        max_wait_s=swap.max_wait_s,
        host_bytes=swap.host_bytes,
        prefetch=swap.prefetch,
        preempt=swap.running == "preempt",
    )


def _idle_policy(config: Config, kind: str, held: Mapping[str, str]) -> IdlePolicy:
    """Return when the pool's weights are unloaded, by held name.

    Args:
        config: The config, with every served expert.
        kind: The pool's name in the config.
        held: The held name of each served expert.
    """
    swap = config.pools[kind].swap
    limits: dict[str, list[float]] = {}
    for name, own in held.items():
        given = config.experts[name].idle_unload_s
        limit_s = swap.idle_unload_s if given is None else given
        limits.setdefault(own, []).append(0.0 if config.experts[name].pinned else limit_s)
    found = {own: longest_limit(given) for own, given in limits.items()}
    return IdlePolicy(found if any(found.values()) else {}, swap.idle_keep)


def _elsewhere(config: Config, kind: str) -> set[str]:
    """Return the experts that other kinds of pools have, and this one has not."""
    others = {
        name for other in config.pools if other != kind for name in config.local_experts(other)
    }
    return others - set(config.local_experts(kind))
