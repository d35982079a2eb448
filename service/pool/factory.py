"""From a config to a pool's slots and engines, and from one config to the next.

The only place that knows both what a config says and what engines are made of.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.config import Config, PoolConfig
from service.engine.base import EngineObserver, SwappingEngine
from service.engine.lazy_engine import LazyEngine
from service.engine.simulated import SimulatedEngine
from service.engine.sleep_mode import Sleeper, SleepingEngines
from service.engine.weight_cache import SharedWeightCache, clear_dead
from service.errors import CoeError, ConfigError
from service.models import ModelInfo, inspect_model
from service.models.expert_folders import file_versions, folder_here, folder_of
from service.moe.profiles import profile_bytes, profile_digests, steering_of
from service.pool.memory_plan import weights_bytes
from service.pool.planner import SwapPolicy
from service.pool.pool import Pool
from service.pool.slots.base import BaseSlot
from service.pool.slots.swapping import SwapSlot
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


class PoolFactory:
    """The pool of one kind: built once, and changed as its config changes.

    A slot for each unit (an expert with full weights, and its adapters) and the virtual experts
    of it, who take turns; with fewer slots than that, all share them, take turns, and move
    between them.
    """

    def __init__(self, config: Config, kind: str, pool: Pool, watch: EngineObserver) -> None:
        self._config = config
        self._kind = kind
        self._watch = watch
        self._canaries: dict[str, Canary] = {}
        self._sources: weakref.WeakSet[_WeightCatalog] = weakref.WeakSet()
        self._played: dict[str, None] = {}
        self._cache: SharedWeightCache | None = None
        clear_dead()
        self._profiles = profile_digests(config)
        self._files = file_versions(config, config.local_experts(kind))
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

        Returns when what went is gone: its running requests have ended.
        """
        old, self._config = self._config, config
        profiles, self._profiles = self._profiles, await asyncio.to_thread(profile_digests, config)
        names = config.local_experts(self._kind)
        found = await asyncio.to_thread(file_versions, config, names)
        # What can't be looked at now is as it was; what was not here yet has not changed since.
        files = {name: version or self._files.get(name, "") for name, version in found.items()}
        read = {name: version or files.get(name, "") for name, version in self._files.items()}
        self._files = files
        before = {unit[0]: _signature(old, unit, profiles, read) for unit in old.units(self._kind)}
        after = {
            unit[0]: _signature(config, unit, self._profiles, files)
            for unit in config.units(self._kind)
        }
        units = {unit[0]: unit for unit in config.units(self._kind)}
        # An engine that was not made to be shared has to make room for one that is.
        alone = {
            base
            for name in after
            if (base := config.needs(name)) in before and not self.pool.is_shared(base)
        }
        gone = [name for name in before if after.get(name) != before[name] or name in alone]
        self.pool.set_policy(_policy(self._settings))
        if self._cache is not None:
            self._cache.bound_bytes = self._settings.swap.host_bytes
        later = [name for name in after if name in gone or config.needs(name) in gone]
        # Those that only come first: they may have to take a slot over.
        for name in [name for name in after if name not in before and name not in later]:
            await self._come(units[name])
        whys = {
            name: f"expert {name!r} was changed in the config, or its files were; ask again"
            if name in after
            else f"expert {name!r} is not in the config any more"
            for name in gone
        }
        # Virtual experts before what they run on.
        virtual = [name for name in gone if old.needs(name)]
        rest = [name for name in gone if name not in virtual]
        for some in (virtual, rest):
            await asyncio.gather(*(self.pool.remove(name, whys[name], names) for name in some))
        for name in gone:
            self._canaries.pop(name, None)
            self._watch.on_removed(name)
        await asyncio.to_thread(self._look_again)
        for name in later:
            await self._come(units[name])
        for name in after:
            self.pool.set_pinned(name, config.experts[name].pinned)

    async def stop(self, drain_s: float) -> None:
        """Stop the pool; nothing of it stays in shared memory."""
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
        for sources in list(self._sources):
            # One that went is not known to the config any more.
            first = next((name for name in sources if name in self._played), None)
            if first is not None:
                found = self._sources_like(first, sources[first], alone=sources.alone)
                for name in [name for name in sources if name not in found]:
                    del sources[name]
                sources.update(found)

    def _name_played(self) -> None:
        names = self._config.local_experts(self._kind)
        for name in [name for name in self._played if name not in names]:
            del self._played[name]
        self._played.update(dict.fromkeys(names))

    # --- slots

    def _own_slot(self, group: tuple[tuple[str, ...], ...]) -> BaseSlot[SwappingEngine]:
        if len(group) > 1:
            return self._shared_slot(group)
        settings = self._settings
        (unit,) = group
        base, *adapters = unit
        return BaseSlot(
            unit,
            partial(self._engine, base, tuple(adapters)),
            capacity=settings.max_running,
            max_waiting=settings.max_queued_requests,
            start_guess_s=self._start_guess_s,
            changed=self.pool.changed,
        )

    def _shared_slot(self, units: tuple[tuple[str, ...], ...]) -> SwapSlot:
        settings = self._settings
        simulated = settings.engine == "simulated"
        return SwapSlot(
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

    def _engine(self, base: str, adapters: tuple[str, ...]) -> SwappingEngine:
        """An engine that runs one unit."""
        settings = self._settings
        if settings.engine == "simulated":
            return SimulatedEngine((base, *adapters), settings.simulated, self._watch)
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
            return SimulatedEngine(self._played, settings.simulated, self._watch, bases)
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
            self._watch.on_weights(base, weights_bytes(info, settings.vllm.dtype))
        model = VllmModel(base, folder, paths)
        options = config.vllm_of(self._kind, base)
        return VllmEngine(
            model,
            options,
            on_cpu=settings.gpus == 0,
            watch=self._watch,
            secrets=config.key_variables,
        )

    def _make_sleeping(self, first: str) -> SwappingEngine:
        from service.engine.vllm.engine import VllmEngine, VllmModel

        config, settings = self._config, self._settings
        units = {unit[0]: unit for unit in config.units(self._kind)}
        level = settings.swap.sleep_level

        def build(name: str) -> Sleeper:
            paths = {one: str(config.experts[one].adapter) for one in units[name][1:]}
            model = VllmModel(name, folder_of(config, name), paths)
            options = config.vllm_of(self._kind, name)
            return VllmEngine(
                model,
                options,
                on_cpu=False,
                watch=self._watch,
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
            watch=self._watch,
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


def _signature(
    config: Config, unit: tuple[str, ...], profiles: Mapping[str, str], files: Mapping[str, str]
) -> tuple[Any, ...]:
    """What a unit's weights depend on: where that changes, it is another one."""
    parts: list[Any] = []
    for name in unit:
        expert = config.experts[name]
        base = config.experts[expert.base].model if expert.base is not None else None
        made = (expert.adapter, expert.profile, profiles.get(name), expert.form, expert.strength)
        parts.append((name, expert.model, expert.base, base, files.get(name), *made))
    # And on what its engine computes with.
    own = config.experts[unit[0]]
    parts.append(own.vllm if own.base is None else config.experts[own.base].vllm)
    return tuple(parts)


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
    return Weights(folder, adapter, settings.strength)


def _family_in(expert: str, folder: str) -> str:
    info = inspect_model(Path(folder))
    if not isinstance(info, ModelInfo):
        raise ConfigError(f"experts.{expert}.model: this folder holds an adapter, not a model")
    return info.family
