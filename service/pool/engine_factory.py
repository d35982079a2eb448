"""Makes the engines of one pool from its config.

Only this module depends on both the config and the engine classes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from service.config import CommandConfig, Config, PoolConfig
from service.engine.command.engine import CommandEngine, default_endpoints, server_environment
from service.engine.command.server_log import last_lines, log_path
from service.engine.engine_interface import EngineObserver, SwappingEngine
from service.engine.gpu_share import GpuShare
from service.engine.lazy_engine import LazyEngine
from service.engine.scoped_env import whole_environment
from service.engine.shared_weight_cache import SharedWeightCache, remove_dead_folders
from service.engine.simulated_engine import SimulatedEngine
from service.engine.sleeping_engines import Sleeper, SleepingEngines
from service.errors import CoeError, ConfigError
from service.gpu_devices import largest_gpu_bytes
from service.models import AdapterInfo, ModelInfo, inspect_model
from service.models.expert_folders import folder_here, folder_of
from service.moe.virtual_expert_profiles import profile_bytes, steering_of
from service.pool.gpu_memory_plan import gpu_groups, utilization
from service.pool.memory_plan import (
    gpu_memory,
    gpu_need_bytes,
    layer_room_bytes,
    sleepers_of,
    slots_of,
    weights_bytes,
)
from service.pool.slot_units import Unit
from service.torch_build import gpu_fault, torch_build

if TYPE_CHECKING:
    from service.engine.vllm.swapping_engine import Canary, Weights

log = logging.getLogger("coe.app")


class WeightCatalog(Mapping[str, "Weights"]):
    """The locations of the weights that one running engine can run, by expert.

    The engine keeps a reference to its catalog, and `update` changes the catalog in place after
    the config has changed. Two catalogs are never equal.

    Args:
        weights: The weights by expert. The engine starts with the first expert.
        alone: Whether the catalog holds only one expert and the experts that share its weights.
    """

    def __init__(self, weights: Mapping[str, Weights], *, alone: bool) -> None:
        self.alone = alone
        self._weights = dict(weights)

    def update(self, weights: Mapping[str, Weights]) -> None:
        """Replace the weights. Experts that stay keep their order."""
        for name in [name for name in self._weights if name not in weights]:
            del self._weights[name]
        self._weights.update(weights)

    def __getitem__(self, expert: str) -> Weights:
        return self._weights[expert]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class EngineFactory:
    """Makes engines that are not started yet, and updates running engines after config changes.

    Args:
        config: The config in force.
        kind: The pool's name in the config.
        observer: Receives the events of the engines, for metrics.
        logs: The folder for the logs of servers that commands start; None for a temporary one.
            `close` removes it.
    """

    def __init__(
        self, config: Config, kind: str, observer: EngineObserver, logs: Path | None = None
    ) -> None:
        self._logs = logs
        self._config = config
        self._kind = kind
        self._observer = observer
        self._canaries: dict[str, Canary] = {}
        self._catalogs: weakref.WeakSet[WeightCatalog] = weakref.WeakSet()
        # The experts that simulated engines answer for. Running engines share this dict.
        self._simulated_experts: dict[str, None] = {}
        self._cache: SharedWeightCache | None = None
        # By dedicated unit, the index of its slot among the groups of GPUs.
        self._gpu_index: dict[str, int] = {}
        # By slot, the GPUs of its engine and the share of each.
        self._gpu_shares: dict[int, GpuShare] = {}
        # Engines that share a GPU change their memory one at a time.
        self._gpu_turn = asyncio.Lock()
        remove_dead_folders()

    @property
    def _settings(self) -> PoolConfig:
        return self._config.pools[self._kind]

    # --- changes of the config

    def set_config(self, config: Config) -> None:
        """Use another config for the engines that are made from now on."""
        self._config = config
        if self._cache is not None:
            self._cache.bound_bytes = self._settings.swap.host_bytes

    def refresh(self, present: Iterable[str]) -> None:
        """Update the catalogs of running engines. This may read model folders.

        Args:
            present: Experts that are in the pool, including those that are being removed.
        """
        self.name_experts(present)
        known = set(self._config.local_experts(self._kind))
        for catalog in list(self._catalogs):
            # The engine may have started with an expert that the new config lacks.
            first = next((name for name in catalog if name in known), None)
            if first is not None:
                catalog.update(self._catalog_of(first, catalog[first], alone=catalog.alone))

    def name_experts(self, present: Iterable[str]) -> None:
        """Let simulated engines answer for the config's experts and for those in the pool."""
        # An engine may be starting with an expert until the removal of that expert has finished.
        names = [*self._config.local_experts(self._kind), *present]
        for name in [name for name in self._simulated_experts if name not in names]:
            del self._simulated_experts[name]
        self._simulated_experts.update(dict.fromkeys(names))

    def forget(self, expert: str) -> None:
        """Forget the canary of a removed expert, because another expert may take its name."""
        self._canaries.pop(expert, None)
        self._gpu_index.pop(expert, None)

    # --- units

    @property
    def swap_method(self) -> str:
        """The swap method of this pool's units, with `auto` resolved."""
        method = self._settings.swap.method
        if method == "auto":
            return "respawn" if self._settings.gpus > 0 else "inplace"
        return method

    def unit(self, experts: tuple[str, ...]) -> Unit:
        """Describe the unit of these experts. The first expert has the weights."""
        config, settings = self._config, self._settings
        name = experts[0]
        pinned = config.experts[name].pinned
        size = profile_bytes(config, name)
        if needs := config.needs(name):
            return Unit(name, experts, pinned, size, needs)
        if (command := self._command_of(name)) is not None:
            # A GPU's memory is none of the host's. A unit of no bytes would have a guessed size.
            held = command.memory_bytes if settings.gpus == 0 else command.sleep_bytes
            return Unit(name, experts, pinned, max(1, held))
        if settings.engine == "vllm" and (folder := folder_here(config, name)) is not None:
            try:
                info = inspect_model(folder)
            except CoeError as error:
                # The error is raised again when the expert is loaded, and then clients get it.
                log.warning("expert %s: %s", name, error.message)
            else:
                size = 0
                if isinstance(info, ModelInfo):
                    size = weights_bytes(info, settings.vllm.dtype)
        return Unit(name, experts, pinned, size)

    # --- engines

    def dedicated_engine(self, base: str, adapters: tuple[str, ...]) -> SwappingEngine:
        """Make an engine that runs one unit."""
        settings = self._settings
        if settings.engine == "simulated":
            return SimulatedEngine((base, *adapters), settings.simulated, self._observer)
        if self._command_of(base) is not None:
            return LazyEngine(partial(self._make_command, base, self._index_of(base)))
        if adapters or self._config.experts[base].form != "merged":
            spare = settings.vllm.spare_adapters
            slot = self._index_of(base)
            return LazyEngine(partial(self._make_vllm, base, adapters, slot, spare=spare))
        slot = self._index_of(base)
        return LazyEngine(partial(self._make_swapping, base, alone=True, slot=slot))

    def shared_engine(self, first: str, slot: int | None = None) -> SwappingEngine:
        """Make an engine that starts with `first` and can run all units of its family.

        Args:
            first: The unit that the engine starts with.
            slot: The index of the slot among the pool's; None for a unit's own slot.
        """
        is_own = slot is None
        slot = self._index_of(first) if slot is None else slot
        settings = self._settings
        if settings.engine == "simulated":
            # A reload may be removing this expert, and then the new config lacks it.
            known = [name for name in self._simulated_experts if name in self._config.experts]
            bases = {name: needs for name in known if (needs := self._config.needs(name))}
            return SimulatedEngine(
                self._simulated_experts, settings.simulated, self._observer, bases
            )
        if (command := self._command_of(first)) is not None:
            takes_turns = command.sleep is not None and not is_own
            make = self._make_sleeping_commands if takes_turns else self._make_command
            return LazyEngine(partial(make, first, slot))
        units = self._config.units(self._kind)
        adapters = next((unit[1:] for unit in units if unit[0] == first), ())
        method = self.swap_method
        if method == "sleep":
            return LazyEngine(partial(self._make_sleeping, first, slot))
        merged = self._config.experts[first].form == "merged"
        steered = any(self._config.needs(name) == first for name in self._simulated_experts)
        if adapters or (method == "respawn" and not merged and not steered):
            return LazyEngine(partial(self._make_vllm, first, adapters, slot))
        alone = method == "respawn"
        return LazyEngine(partial(self._make_swapping, first, alone=alone, slot=slot))

    # --- GPUs

    def _index_of(self, unit: str) -> int:
        """Return the index of a unit's own slot: the lowest that no other unit has."""
        if unit not in self._gpu_index:
            taken = set(self._gpu_index.values())
            self._gpu_index[unit] = next(i for i in range(len(taken) + 1) if i not in taken)
        return self._gpu_index[unit]

    def reserved_gpu_shares(self) -> dict[int, list[GpuShare]]:
        """Return the engines' shares of each GPU, by its index in the replica.

        Engines that were made count, whether they have started or not. Of those that take turns in
        a slot by sleeping, one is awake.
        """
        found: dict[int, list[GpuShare]] = {}
        for slot, share in self._gpu_shares.items():
            if slot < slots_of(self._config, self._kind):
                for gpu in share.device_ids:
                    found.setdefault(gpu, []).append(share)
        return found

    def _gpu_share(self, unit: tuple[str, ...], slot: int) -> GpuShare | None:
        """Compute the part of the replica's GPUs that an engine takes. It may run nvidia-smi.

        Returns:
            The part, or None for a pool on CPU.

        Raises:
            ConfigError: vLLM's share of the GPUs can't hold the weights, or the installed torch
                can't use GPUs.
            ModelStoreError: A folder could not be read.
        """
        settings = self._settings
        if settings.gpus == 0:
            return None
        if self._command_of(unit[0]) is None and (fault := gpu_fault(torch_build())):
            raise ConfigError(f"pools.{self._kind}.gpus: {settings.gpus:g}, but {fault}")
        config, slots = self._config, slots_of(self._config, self._kind)
        try:
            groups = gpu_groups(settings, slots)
        except ValueError as error:
            # Checks of the config refuse this, and an engine that starts nevertheless has room.
            log.warning("pools.%s.%s", self._kind, error)
            groups = [tuple(range(settings.vllm.engine_gpus))]

        def inspect(name: str) -> ModelInfo | AdapterInfo:
            return inspect_model(Path(config.experts[name].adapter or folder_of(config, name)))

        def inspect_readable(name: str) -> ModelInfo | AdapterInfo | None:
            try:
                return inspect(name)
            except CoeError:
                return None  # this engine starts without it, and its own load tells why

        layer_bytes = layer_room_bytes(config, self._kind, inspect_readable)
        given = settings.vllm.args.get("gpu_memory_utilization")
        if given is None:
            need = gpu_need_bytes(config, self._kind, unit, inspect)
            given = utilization(
                settings,
                need,
                math.ceil(slots / len(groups)),
                sleepers_of(config, self._kind),
                gpu_memory(settings, largest_gpu_bytes()),
                layer_bytes,
            )
        devices = groups[slot % len(groups)]
        self._gpu_shares[slot] = GpuShare(float(given), devices, layer_bytes)
        return GpuShare(float(given), devices if len(groups) > 1 else (), layer_bytes)

    def _make_vllm(
        self, base: str, adapters: tuple[str, ...], slot: int, *, spare: int = 0
    ) -> SwappingEngine:
        # The import takes seconds, and only a pool with real engines needs it.
        from service.engine.vllm.engine import VllmEngine, VllmModel

        config, settings = self._config, self._settings
        paths = {name: str(config.experts[name].adapter) for name in adapters}
        folder = folder_of(config, base)
        info = inspect_model(Path(folder))
        if isinstance(info, ModelInfo):
            self._observer.on_weights(base, weights_bytes(info, settings.vllm.dtype))
        if isinstance(info, ModelInfo) and info.is_moe and settings.gpus == 0:
            spare = 0  # vLLM has no adapters of mixtures on CPU
        pools = config.uses_pooling_runner(base)
        model = VllmModel(base, folder, paths, pooling_runner=pools, spare_adapters=spare)
        options = config.vllm_of(self._kind, base)
        return VllmEngine(
            model,
            options,
            on_cpu=settings.gpus == 0,
            observer=self._observer,
            secrets=config.key_variables,
            gpu_share=self._gpu_share((base, *adapters), slot),
        )

    def _make_sleeping(self, first: str, slot: int) -> SwappingEngine:
        from service.engine.vllm.engine import VllmEngine, VllmModel

        config, settings = self._config, self._settings
        units = {
            unit[0]: unit
            for unit in config.units(self._kind)
            if config.experts[unit[0]].command is None
        }
        level = settings.swap.sleep_level

        def build(name: str) -> Sleeper:
            paths = {adapter: str(config.experts[adapter].adapter) for adapter in units[name][1:]}
            pooling_runner = config.uses_pooling_runner(name)
            model = VllmModel(name, folder_of(config, name), paths, pooling_runner=pooling_runner)
            options = config.vllm_of(self._kind, name)
            return VllmEngine(
                model,
                options,
                on_cpu=False,
                observer=self._observer,
                sleep_level=level,
                secrets=config.key_variables,
                gpu_share=self._gpu_share(units[name], slot),
            )

        sizes = {n: self.unit(unit).size_bytes for n, unit in units.items()} if level == 1 else {}
        return SleepingEngines(first, units, build, sizes, self._gpu_turn)

    # --- servers by command

    def _command_of(self, expert: str) -> CommandConfig | None:
        """Return the command of an expert that has one, in a pool with real engines."""
        settings = self._config.experts.get(expert)
        if settings is None or self._settings.engine == "simulated":
            return None
        return settings.command

    def _make_command(self, name: str, slot: int) -> CommandEngine:
        config = self._config
        expert = config.experts[name]
        command = expert.command
        assert command is not None
        devices = self._devices_of(self._gpu_share((name,), slot))
        env, secrets = server_environment(command, config.key_variables, devices)
        endpoints = command.endpoints or default_endpoints(expert.capabilities)
        return CommandEngine(name, command, endpoints, env, secrets, self._log_folder())

    def _make_sleeping_commands(self, first: str, slot: int) -> SwappingEngine:
        """Make the servers of a slot that sleep while others of them run."""
        sizes = {}
        for unit in self._config.units(self._kind):
            command = self._command_of(unit[0])
            if command is not None and command.sleep is not None:
                sizes[unit[0]] = self.unit(unit).size_bytes
        units = {name: (name,) for name in sizes}
        return SleepingEngines(
            first, units, partial(self._make_command, slot=slot), sizes, self._gpu_turn
        )

    @staticmethod
    def _devices_of(share: GpuShare | None) -> str | None:
        """Return the value of CUDA_VISIBLE_DEVICES for a server; None leaves it as it is."""
        if share is None or not share.device_ids:
            return None
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = given.split(",") if given else None
        return ",".join(visible[i] if visible else str(i) for i in share.device_ids)

    def _log_folder(self) -> Path:
        if self._logs is None:
            self._logs = Path(tempfile.mkdtemp(prefix="coe-logs-"))
        return self._logs

    def server_log(self, expert: str, lines: int) -> list[str] | None:
        """Return the last lines of an expert's server; None where no command starts one."""
        command = self._command_of(expert)
        if command is None:
            return None
        # While another engine starts, this process's own environment lacks its keys.
        env = whole_environment()
        secrets = [env[name] for name in command.secret_env if name in env]
        path = log_path(self._log_folder(), expert)
        return last_lines(path, lines, secrets, earlier=True)

    def _make_swapping(self, first: str, *, alone: bool = False, slot: int = 0) -> SwappingEngine:
        from service.engine.vllm.swapping_engine import SwappingVllmEngine

        settings = self._settings
        weights = self._catalog_of(first, _weights(self._config, first), alone=alone)
        catalog = WeightCatalog(weights, alone=alone)
        self._catalogs.add(catalog)
        return SwappingVllmEngine(
            first,
            catalog,
            self._config.vllm_of(self._kind, first),
            on_cpu=settings.gpus == 0,
            canary_interval=settings.swap.canary_interval,
            canaries=self._canaries,
            observer=self._observer,
            cache=self.weight_cache(),
            secrets=self._config.key_variables,
            gpu_share=self._gpu_share((first,), slot),
        )

    def weight_cache(self) -> SharedWeightCache | None:
        """Return the cache in which this pool's engines share weights; None for a pool on CPU.

        Raises:
            ExpertFailedError: The shared memory could not be created.
        """
        settings = self._settings
        if self._cache is None and settings.gpus > 0:
            self._cache = SharedWeightCache(settings.swap.host_bytes)
        return self._cache

    def close(self) -> None:
        """Free the shared memory of the pool's weights, and remove the logs of its servers."""
        if self._cache is not None:
            self._cache.close()
        if self._logs is not None:
            shutil.rmtree(self._logs, ignore_errors=True)

    def _catalog_of(self, first: str, own: Weights, *, alone: bool) -> dict[str, Weights]:
        """List the experts that an engine of one family can run. This may download models.

        Args:
            first: The expert that the engine starts with. It comes first in the result.
            own: The weights of `first`.
            alone: Whether to list only the experts that run on the weights of `first`.
        """
        family = _family_in(first, own.folder)
        options = self._config.vllm_of(self._kind, first)
        found: dict[str, Weights] = {}
        for unit in self._config.units(self._kind):
            name = unit[0]
            if alone and first not in (name, self._config.needs(name)):
                continue
            if self._command_of(name) is not None:
                continue
            # A unit with adapters needs an engine with LoRA support, which this engine lacks.
            if name != first and len(unit) > 1:
                continue
            # Kernels are chosen when an engine starts, so other kernels need another engine.
            if self._config.vllm_of(self._kind, name) != options:
                continue
            # An engine makes either text or vectors, never both.
            if self._config.uses_pooling_runner(name) != self._config.uses_pooling_runner(first):
                continue
            try:
                weights = _weights(self._config, name)
                if _family_in(name, weights.folder) == family:
                    found[name] = weights
            except CoeError as error:
                # Only this expert is at fault. Its clients get the error when it is loaded.
                log.error("expert %s: %s", name, error.message)
        return {name: found[name] for name in sorted(found, key=lambda name: name != first)}


def _weights(config: Config, expert: str) -> Weights:
    from service.engine.vllm.swapping_engine import Weights

    settings = config.experts[expert]
    folder = folder_of(config, expert)
    if settings.form == "steered":
        try:
            return Weights(folder, steering=steering_of(config, expert, Path(folder)))
        except ConfigError as error:
            return Weights(folder, fault=error.message)
    adapter = settings.adapter if settings.form == "merged" else None
    pooling_runner = config.uses_pooling_runner(expert)
    return Weights(folder, adapter, settings.strength, pooling_runner=pooling_runner)


def _family_in(expert: str, folder: str) -> str:
    info = inspect_model(Path(folder))
    if not isinstance(info, ModelInfo):
        raise ConfigError(f"experts.{expert}.model: this folder holds an adapter, not a model")
    return info.family
