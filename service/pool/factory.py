"""From a config to a pool's slots and engines, and from one config to the next.

The only place that knows both what a config says and what engines are made of.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.config import Config, PoolConfig
from service.engine.base import EngineObserver, SwappingEngine
from service.engine.lazy_engine import LazyEngine
from service.engine.simulated import SimulatedEngine
from service.engine.sleep_mode import Sleeper, SleepingEngines
from service.engine.weight_cache import SharedWeightCache, remove_dead_folders
from service.errors import CoeError, ConfigError
from service.models import ModelInfo, inspect_model
from service.models.expert_folders import file_versions, folder_here, folder_of
from service.moe.profiles import profile_bytes, profile_digests, steering_of
from service.pool.memory_plan import weights_bytes
from service.pool.planner import SwapPolicy
from service.pool.pool import Pool
from service.pool.slots.base import BaseSlot
from service.pool.slots.dedicated import DedicatedSlot
from service.pool.slots.shared import SharedSlot
from service.pool.units import Unit, UnitState

if TYPE_CHECKING:
    from service.engine.vllm.swapping import Canary, Weights

log = logging.getLogger("coe.app")

# What a first start takes before one has been measured.
_VLLM_START_S = 40.0
_FILL_GUESS_S = 5.0
_SWAP_GUESS_S = 0.05
_WEIGHTS_GUESS_BYTES = 1024**3


class _WeightCatalog(dict[str, "Weights"]):
    """Where the weights of one running engine's experts are: kept as the config says.

    alone: they are one expert's, and of those that need its weights.
    """

    alone = False
    __hash__ = object.__hash__  # type: ignore[assignment]  # one is itself, whatever is in it


@dataclass(frozen=True, slots=True)
class _Made:
    """What an expert is made of. `version`: of its files; empty where they can't be looked at."""

    parts: tuple[Any, ...]
    version: str

    def same(self, other: _Made) -> bool:
        """Whether it is the same expert. What can't be looked at has not changed."""
        known = self.version and other.version
        return self.parts == other.parts and (not known or self.version == other.version)

    def newer(self, other: _Made) -> _Made:
        """The same one, with whichever version of its files is known."""
        return other if other.version else self


@dataclass(frozen=True, slots=True)
class _MadeUnit:
    """A unit: its experts, the one with the weights first, and the unit that it needs."""

    made: dict[str, _Made]
    needs: str = ""

    def same(self, other: _MadeUnit) -> bool:
        """Whether the same experts are in it."""
        return self.made.keys() == other.made.keys() and all(
            one.same(other.made[name]) for name, one in self.made.items()
        )

    def copied(self) -> _MadeUnit:
        """Another one, whose experts may come and go."""
        return _MadeUnit(dict(self.made), self.needs)


class PoolFactory:
    """The pool of one kind: built once, and changed as its config changes.

    A slot for each unit (an expert with full weights, and its adapters) and the virtual experts
    of it, who take turns; with fewer slots than that, all share them, take turns, and move
    between them.
    """

    def __init__(self, config: Config, kind: str, pool: Pool, observer: EngineObserver) -> None:
        self._config = config
        self._kind = kind
        self._observer = observer
        self._canaries: dict[str, Canary] = {}
        self._sources: weakref.WeakSet[_WeightCatalog] = weakref.WeakSet()
        self._played: dict[str, None] = {}
        self._cache: SharedWeightCache | None = None
        remove_dead_folders()
        self._wanted = _units_of(
            config,
            kind,
            profile_digests(config),
            file_versions(config, config.local_experts(kind)),
        )
        # The units that are here, and those of them, and of their adapters, that are to go.
        self._present = {name: unit.copied() for name, unit in self._wanted.items()}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        # Of adapters that are to go: the unit whose engine goes on.
        self._base_of: dict[str, str] = {}
        # Units whose engine was started with adapters, and takes others.
        self._with_adapters = {name for name, unit in self._wanted.items() if len(unit.made) > 1}
        self._turn = asyncio.Lock()
        self.pool = pool
        groups = config.groups(kind)
        self._name_played()
        slots = self._settings.slots
        self._shared = slots is not None and slots < len(groups)
        if slots is None or not self._shared:
            for group in groups:
                pool.add(self._own_slot(group))
        else:
            for i in range(slots):
                pool.add(self._shared_slot(tuple(u for group in groups[i::slots] for u in group)))

    @property
    def _settings(self) -> PoolConfig:
        return self._config.pools[self._kind]

    async def reload(self, config: Config) -> None:
        """Go on as another config says: experts come and go, and the policy of swaps changes.

        An adapter comes to and goes from a running engine that was started with adapters; its base
        and siblings go on. Where the engine has none yet, or units share it, it starts again.

        Returns without waiting for requests under way of what goes, see `settled`.
        """
        async with self._turn:
            self._config = config
            profiles = await asyncio.to_thread(profile_digests, config)
            names = config.local_experts(self._kind)
            versions = await asyncio.to_thread(file_versions, config, names)
            self._wanted = _units_of(config, self._kind, profiles, versions)
            self.pool.set_policy(_policy(self._settings))
            if self._cache is not None:
                self._cache.bound_bytes = self._settings.swap.host_bytes
            gone = [name for name in self._present if self._must_go(name)]
            # Nobody runs on weights that are not there.
            gone += [name for name, one in self._present.items() if one.needs in gone]
            gone = list(dict.fromkeys(gone))
            # Those that only come first: they may have to take a slot over.
            await self._fill_in(but=gone)
            self._send_away([name for name in gone if name not in self._leaving])
            self._tell_pool()
        # What goes is refused from here on.
        await asyncio.sleep(0)

    async def settled(self) -> None:
        """Wait until what goes by the config in force has gone, and what follows it is there."""
        while True:
            await asyncio.gather(*self._leaving.values())
            async with self._turn:
                if not self._leaving:
                    return

    def _must_go(self, name: str) -> bool:
        """Whether a unit that is here has to make room, for nothing or for another one."""
        here, wanted = self._present[name], self._wanted.get(name)
        if name in self._leaving:
            return False
        if wanted is None or not here.made[name].same(wanted.made[name]):
            return True
        if not self.pool.is_shared(name):
            # An engine that was not made to be shared has to make room for one that is.
            if any(one.needs == name for one in self._wanted.values()):
                return True
            if len(wanted.made) > 1 and name not in self._with_adapters:
                log.warning(
                    "the engine of %s starts again: it was started without adapters, and %s came",
                    name,
                    ", ".join(one for one in wanted.made if one not in here.made),
                )
                return True
            return False
        if here.same(wanted):
            return False
        log.warning("unit %s starts again, as it shares a slot and its adapters changed", name)
        return True

    async def _change_adapters(self, unit: str) -> None:
        """Let adapters come to and go from a unit whose engine goes on."""
        here, wanted = self._present[unit].made, self._wanted[unit].made
        for name, made in list(here.items()):
            if name == unit or name in self._leaving:
                continue
            if name in wanted and made.same(wanted[name]):
                here[name] = made.newer(wanted[name])
                continue
            del here[name]
            self._leaving[name] = asyncio.create_task(self._let_adapter_go(unit, name))
            self._base_of[name] = unit
        here[unit] = here[unit].newer(wanted[unit])
        for name in wanted:
            # One that is a unit of its own so far has to go first.
            if name not in here and name not in self._leaving and name not in self._present:
                here[name] = wanted[name]
                folder = self._config.experts[name].adapter
                assert folder is not None
                await self.pool.add_adapter(unit, name, folder)
                log.info("adapter %s came to the engine of %s", name, unit)

    async def _let_adapter_go(self, unit: str, name: str) -> None:
        await self._removed(self.pool.remove_adapter(name, self._why(name), self._wanted_names()))
        async with self._turn:
            del self._leaving[name], self._base_of[name]
            self._observer.on_removed(name)
            log.info("adapter %s went from the engine of %s", name, unit)
            await self._follow_up()

    @staticmethod
    async def _removed(removing: Awaitable[None]) -> None:
        try:
            await removing
        except Exception:
            # Whatever it was: what comes in its place must come.
            log.exception("an expert could not be removed in order")

    async def _follow_up(self) -> None:
        """Something has gone: take in what had to wait for that."""
        try:
            await asyncio.to_thread(self._look_again)
            await self._fill_in()
        except Exception:
            # The next config may be a better one.
            log.exception("what comes in the place of an expert could not be taken in")
        self._tell_pool()

    def _send_away(self, units: Iterable[str]) -> None:
        """Begin to remove units, virtual experts before what they run on."""
        for name in sorted(units, key=lambda name: not self._present[name].needs):
            before = [
                task
                for other, task in self._leaving.items()
                if self._base_of.get(other) == name
                or (other in self._present and self._present[other].needs == name)
            ]
            self._leaving[name] = asyncio.create_task(self._leave(name, before))

    async def _leave(self, unit: str, before: Sequence[asyncio.Task[None]]) -> None:
        """A unit goes; then come those that had to wait for it."""
        await asyncio.gather(*before, return_exceptions=True)
        await self._removed(self.pool.remove(unit, self._why(unit), self._wanted_names()))
        async with self._turn:
            for name in self._present.pop(unit).made:
                self._canaries.pop(name, None)
                self._observer.on_removed(name)
            del self._leaving[unit]
            await self._follow_up()

    async def _fill_in(self, but: Collection[str] = ()) -> None:
        """Take in what is wanted and not here, as far as nothing that goes is in its way.

        `but`: units that are about to go.
        """
        # An adapter that is a unit of its own now has to go first.
        for name, unit in self._present.items():
            if name not in self._wanted or name in self._leaving or name in but:
                continue
            if self.pool.is_shared(name):
                for one, made in self._wanted[name].made.items():
                    unit.made[one] = unit.made[one].newer(made)
            else:
                await self._change_adapters(name)
        await self._arrive(but)

    async def _arrive(self, but: Collection[str]) -> None:
        """Take in the units that are not here, unless they, or those they need, are still to go.

        `but`: units that are about to go.
        """
        going = {*but, *self._leaving}
        for name, unit in self._wanted.items():
            if name in self._present or name in going:
                continue
            if unit.needs and (unit.needs in going or unit.needs not in self._present):
                continue
            if self._shared and self.pool.closing and not unit.needs:
                # It gets the slot that is free then.
                continue
            self._present[name] = unit.copied()
            try:
                await self._come(tuple(unit.made))
            except BaseException:
                del self._present[name]
                raise

    def _why(self, name: str) -> str:
        if name in self._wanted_names():
            return f"expert {name!r} was changed in the config, or its files were; ask again"
        return f"expert {name!r} is not in the config any more"

    def _wanted_names(self) -> set[str]:
        return {name for unit in self._wanted.values() for name in unit.made}

    def _tell_pool(self) -> None:
        """Which experts come again, and which are pinned."""
        again = self._wanted_names().intersection(
            name
            for one in self._leaving
            for name in (self._present[one].made if one in self._present else (one,))
        )
        self.pool.expect({name: self._why(name) for name in again})
        for name in self._wanted:
            self.pool.set_pinned(name, self._config.experts[name].pinned)

    async def stop(self, drain_s: float) -> None:
        """Stop the pool; nothing of it stays in shared memory."""
        leaving = list(self._leaving.values())
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await self.pool.stop(drain_s)
        if self._cache is not None:
            await asyncio.to_thread(self._cache.close)

    async def _come(self, unit: tuple[str, ...]) -> None:
        await asyncio.to_thread(self._look_again)
        lacking = self._shared and len(self.pool.shared) < (self._settings.slots or 0)
        if lacking and not self._config.needs(unit[0]):
            # All that was in one of the slots went.
            self.pool.add_running(await asyncio.to_thread(self._shared_slot, (unit,)))
        elif self._shared or self._config.needs(unit[0]):
            self.pool.take_in(await asyncio.to_thread(self._unit, unit))
        else:
            held = self._config.local_experts(self._kind)
            virtual = any(self._config.needs(name) == unit[0] for name in held)
            self.pool.add_running(
                self._shared_slot((unit,)) if virtual else self._own_slot((unit,))
            )

    def _look_again(self) -> None:
        self._name_played()
        known = set(self._config.local_experts(self._kind))
        for sources in list(self._sources):
            # One that went is not known to the config any more.
            first = next((name for name in sources if name in known), None)
            if first is not None:
                found = self._sources_like(first, sources[first], alone=sources.alone)
                for name in [name for name in sources if name not in found]:
                    del sources[name]
                sources.update(found)

    def _name_played(self) -> None:
        names = list(self._config.local_experts(self._kind))
        # Until those that go have gone, an engine may be starting with one of them.
        names += [name for unit in self._present.values() for name in unit.made]
        for name in [name for name in self._played if name not in names]:
            del self._played[name]
        self._played.update(dict.fromkeys(names))

    # --- slots

    def _own_slot(self, group: tuple[tuple[str, ...], ...]) -> BaseSlot[SwappingEngine]:
        if len(group) > 1:
            return self._shared_slot(group)
        settings = self._settings
        (unit,) = group
        return DedicatedSlot(
            unit,
            partial(self._engine, unit[0]),
            capacity=settings.max_running,
            max_waiting=settings.max_queued_requests,
            start_guess_s=self._start_guess_s,
            changed=self.pool.changed,
        )

    def _shared_slot(self, units: tuple[tuple[str, ...], ...]) -> SharedSlot:
        settings = self._settings
        simulated = settings.engine == "simulated"
        return SharedSlot(
            [self._unit(unit) for unit in units],
            self._swapping_engine,
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
            apart=not simulated and self._swap_method == "respawn",
        )

    @property
    def _swap_method(self) -> str:
        """How this pool's units take each other's place."""
        method = self._settings.swap.method
        if method == "auto":
            return "respawn" if self._settings.gpus > 0 else "inplace"
        return method

    @property
    def _start_guess_s(self) -> float:
        settings = self._settings
        return settings.simulated.load_s if settings.engine == "simulated" else _VLLM_START_S

    def _unit(self, unit: tuple[str, ...]) -> Unit:
        config, settings = self._config, self._settings
        size = profile_bytes(config, unit[0])
        if needs := config.needs(unit[0]):
            return Unit(unit[0], unit, config.experts[unit[0]].pinned, size, needs)
        if settings.engine == "vllm" and (folder := folder_here(config, unit[0])) is not None:
            try:
                info = inspect_model(folder)
            except CoeError as error:
                # Told again, to those who ask for it, when its turn comes.
                log.warning("expert %s: %s", unit[0], error.message)
            else:
                size = (
                    weights_bytes(info, settings.vllm.dtype) if isinstance(info, ModelInfo) else 0
                )
        return Unit(unit[0], unit, config.experts[unit[0]].pinned, size)

    # --- engines

    def _engine(self, base: str) -> SwappingEngine:
        """An engine that runs one unit, with the adapters that it has now."""
        settings = self._settings
        adapters = tuple(name for name in self._present[base].made if name != base)
        if adapters:
            self._with_adapters.add(base)
        else:
            self._with_adapters.discard(base)
        if settings.engine == "simulated":
            return SimulatedEngine((base, *adapters), settings.simulated, self._observer)
        if adapters or self._config.experts[base].form != "merged":
            return LazyEngine(partial(self._make_vllm, base, adapters))
        return LazyEngine(partial(self._make_swapping, base, alone=True))

    def _swapping_engine(self, first: str) -> SwappingEngine:
        """An engine that starts with `first`, and can run all units of its family."""
        settings = self._settings
        if settings.engine == "simulated":
            # While a reload lets experts go, the config does not know them any more.
            known = [name for name in self._played if name in self._config.experts]
            bases = {name: needs for name in known if (needs := self._config.needs(name))}
            return SimulatedEngine(self._played, settings.simulated, self._observer, bases)
        units = self._config.units(self._kind)
        adapters = next((unit[1:] for unit in units if unit[0] == first), ())
        method = self._swap_method
        if method == "sleep":
            return LazyEngine(partial(self._make_sleeping, first))
        merged = self._config.experts[first].form == "merged"
        steered = any(self._config.needs(name) == first for name in self._played)
        if adapters or (method == "respawn" and not merged and not steered):
            return LazyEngine(partial(self._make_vllm, first, adapters))
        return LazyEngine(partial(self._make_swapping, first, alone=method == "respawn"))

    def _make_vllm(self, base: str, adapters: tuple[str, ...]) -> SwappingEngine:
        # Imported here: it takes seconds, and only a pool with real engines needs it.
        from service.engine.vllm.engine import VllmEngine, VllmModel

        config, settings = self._config, self._settings
        paths = {name: str(config.experts[name].adapter) for name in adapters}
        folder = folder_of(config, base)
        info = inspect_model(Path(folder))
        if isinstance(info, ModelInfo):
            self._observer.on_weights(base, weights_bytes(info, settings.vllm.dtype))
        model = VllmModel(base, folder, paths, embeds=config.embeds(base))
        options = config.vllm_of(self._kind, base)
        return VllmEngine(
            model,
            options,
            on_cpu=settings.gpus == 0,
            observer=self._observer,
            secrets=config.key_variables,
        )

    def _make_sleeping(self, first: str) -> SwappingEngine:
        from service.engine.vllm.engine import VllmEngine, VllmModel

        config, settings = self._config, self._settings
        units = {unit[0]: unit for unit in config.units(self._kind)}
        level = settings.swap.sleep_level

        def build(name: str) -> Sleeper:
            paths = {one: str(config.experts[one].adapter) for one in units[name][1:]}
            embeds = config.embeds(name)
            model = VllmModel(name, folder_of(config, name), paths, embeds=embeds)
            options = config.vllm_of(self._kind, name)
            return VllmEngine(
                model,
                options,
                on_cpu=False,
                observer=self._observer,
                sleep_level=level,
                secrets=config.key_variables,
            )

        sizes = {n: self._unit(unit).size_bytes for n, unit in units.items()} if level == 1 else {}
        return SleepingEngines(first, units, build, sizes)

    def _make_swapping(self, first: str, *, alone: bool = False) -> SwappingEngine:
        from service.engine.vllm.swapping import SwappingVllmEngine

        settings = self._settings
        own = _weights(self._config, first)
        sources = self._sources_like(first, own, alone=alone)
        self._sources.add(sources)
        return SwappingVllmEngine(
            first,
            sources,
            self._config.vllm_of(self._kind, first),
            on_cpu=settings.gpus == 0,
            canary_interval=settings.swap.canary_interval,
            canaries=self._canaries,
            observer=self._observer,
            cache=self._shared_cache(),
            secrets=self._config.key_variables,
        )

    def _shared_cache(self) -> SharedWeightCache | None:
        """Where this pool's engines share weights: on a GPU. Raises ExpertFailedError."""
        settings = self._settings
        if self._cache is None and settings.gpus > 0:
            self._cache = SharedWeightCache(settings.swap.host_bytes)
        return self._cache

    def _sources_like(self, first: str, own: Weights, *, alone: bool) -> _WeightCatalog:
        """The experts that an engine of one family can run, `first` first. May fetch models.

        `alone`: of these, only those that run on the weights of `first`.
        """
        family = _family_in(first, own.folder)
        options = self._config.vllm_of(self._kind, first)
        found = _WeightCatalog()
        for unit in self._config.units(self._kind):
            name = unit[0]
            if alone and first not in (name, self._config.needs(name)):
                continue
            # A unit with adapters needs an engine made for adapters: not this one.
            if name != first and len(unit) > 1:
                continue
            # Nor can one be made for other kernels.
            if self._config.vllm_of(self._kind, name) != options:
                continue
            # Nor one that makes text for who makes vectors.
            if self._config.embeds(name) != self._config.embeds(first):
                continue
            try:
                weights = _weights(self._config, name)
                if _family_in(name, weights.folder) == family:
                    found[name] = weights
            except CoeError as error:
                # Its own fault, told when its turn comes; the others go on.
                log.error("expert %s: %s", name, error.message)
        ordered = _WeightCatalog(
            {name: found[name] for name in sorted(found, key=lambda n: n != first)}
        )
        ordered.alone = alone
        return ordered


def _policy(settings: PoolConfig) -> SwapPolicy:
    swap = settings.swap
    return SwapPolicy(
        min_stay_s=swap.min_stay_s,
        max_wait_s=swap.max_wait_s,
        host_bytes=swap.host_bytes,
        prefetch=swap.prefetch,
        preempt=swap.running == "preempt",
    )


def _units_of(
    config: Config, kind: str, profiles: Mapping[str, str], versions: Mapping[str, str]
) -> dict[str, _MadeUnit]:
    """The units of a pool's config, and what each of their experts is made of."""
    units = {}
    for unit in config.units(kind):
        own = config.experts[unit[0]]
        # What its engine computes with.
        kernels = own.vllm if own.base is None else config.experts[own.base].vllm
        made = {}
        for name in unit:
            expert = config.experts[name]
            base = config.experts[expert.base].model if expert.base is not None else None
            named = (expert.model, expert.base, base, expert.adapter, expert.profile)
            embeds = config.embeds(unit[0])
            shaped = (profiles.get(name), expert.form, expert.strength, kernels, embeds)
            made[name] = _Made((*named, *shaped), versions.get(name, ""))
        units[unit[0]] = _MadeUnit(made, config.needs(unit[0]))
    return units


def _weights(config: Config, expert: str) -> Weights:
    from service.engine.vllm.swapping import Weights

    settings = config.experts[expert]
    folder = folder_of(config, expert)
    if settings.form == "steered":
        try:
            return Weights(folder, steering=steering_of(config, expert, Path(folder)))
        except ConfigError as error:
            return Weights(folder, fault=error.message)
    adapter = settings.adapter if settings.form == "merged" else None
    return Weights(folder, adapter, settings.strength, embeds=config.embeds(expert))


def _family_in(expert: str, folder: str) -> str:
    info = inspect_model(Path(folder))
    if not isinstance(info, ModelInfo):
        raise ConfigError(f"experts.{expert}.model: this folder holds an adapter, not a model")
    return info.family
