"""The process of a pool: its engines, its application and its metrics."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path
from typing import Any

from service.config import Config
from service.config.effective_config import (
    AddedExperts,
    EffectiveConfig,
    with_added,
)
from service.errors import (
    CoeError,
    ConfigError,
    ConflictError,
    UnknownModelError,
)
from service.gpu_devices import gpu_memory, visible_gpus
from service.models import inspect_model
from service.models.expert_folders import allowed_adapter_folder, check_adapter_folder, folder_here
from service.moe.virtual_expert_profiles import profile_bytes
from service.pool.added_expert_check import check_diff, check_files
from service.pool.gpu_memory_monitor import GpuMemoryMonitor, GpuState
from service.pool.pool import Pool
from service.pool.pool_builder import PoolBuilder
from service.rpc.pool_asgi_app import PoolApp
from service.telemetry import metric_declarations
from service.telemetry.model_server_metrics import ModelServerLoad
from service.telemetry.pool_metrics import PoolMetrics
from service.telemetry.telemetry_setup import node_target, traces_of

_LOG_LINES = 200


class PoolProcess:
    """A pool with its engines, its application and its metrics.

    Args:
        config: The config in force.
        kind: The pool's name in the config.
        secret: The cluster's secret.
        node: The folder of this node's metrics sockets; None where nothing is scraped.
        logs: The folder for the logs of servers that commands start; None for a temporary one.
    """

    def __init__(
        self,
        config: Config,
        kind: str,
        secret: str,
        *,
        node: Path | None = None,
        logs: Path | None = None,
    ) -> None:
        self.pool_metrics = PoolMetrics(config.pools[kind].vllm.moe_capture)
        pool = Pool(kind, self.pool_metrics)
        if logs is not None:
            logs = logs / f"{kind}-{pool.boot}"  # another replica may have the same experts
        self._builder = PoolBuilder(config, kind, pool, self.pool_metrics, logs)
        self.pool = self._builder.pool
        if (resolved := self._builder.swap_method) is not None:
            choice = resolved.choice
            self.pool_metrics.registry.put(
                metric_declarations.SWAP_METHOD, 1, choice.method, choice.source
            )
        self._traces = traces_of(config, "pool", f"{kind}-{self.pool.boot}")
        if self._traces is not None:
            self.pool_metrics.traced = self._traces.pooled
        self.pool_metrics.follow(self.pool)
        # The config of the file, and the experts that an admin has added to it.
        self._given = config
        self._added = AddedExperts()
        self._turn = asyncio.Lock()
        self._config = config
        self._weights: dict[str, int] = {}
        self._gpu_monitor = GpuMemoryMonitor(
            lambda: visible_gpus(gpu_memory(), os.environ),
            lambda: self._builder.engines.reserved_gpu_shares(),
        )
        self.app = PoolApp(self.pool, self, secret, config.server.most_inner_bytes)
        self._node = node_target(config, node, f"pool-{kind}-{self.pool.boot}", self.metrics)

    async def start(self) -> None:
        """Start the engines, in the background."""
        if self._node is not None:
            await self._node.start()
        self.pool.start()

    async def stop(self, drain_s: float) -> None:
        """Drain for at most `drain_s` seconds, then stop the engines."""
        await self._builder.stop(drain_s)
        if self._traces is not None:
            await asyncio.to_thread(self._traces.stop)
        if self._node is not None:
            await self._node.stop()

    async def reload(self, config: Config) -> None:
        """Change the pool to match another config. The experts that an admin has added stay."""
        async with self._turn:
            effective = await self._effective(config, self._added)
            self._given = config
            await self._change(effective)

    async def set_added(self, added: AddedExperts) -> None:
        """Serve these added experts and no others. Those of an earlier revision are left out."""
        async with self._turn:
            if added.revision <= self._added.revision:
                return
            effective = await self._effective(self._given, added)
            if effective != self._config:
                await self._change(effective)
            self._added = added
        self.pool.added_revision = added.revision
        self.pool.changed()

    async def check_added(self, added: AddedExperts, name: str) -> None:
        """Check that the pool can take an added expert in without touching another one.

        Raises:
            DisallowedFieldError: The expert's adapter lies in no allowed folder.
            ConflictError: It can't be served here.
        """
        await asyncio.to_thread(self._check_added, added, name)

    def _check_added(self, added: AddedExperts, name: str) -> None:
        check_adapter_folder(self._given, name, added.experts[name].expert.adapter)
        found = self._with_added(self._given, added)
        kind = self.pool.kind
        try:
            if (why := found.left_out.get(name)) is not None:
                raise ConfigError(why)
            if name not in found.config.local_experts(kind):
                return
            check_files(found.config, kind, name, added.experts[name])
            check_diff(self._builder.difference(found.config), name)
        except CoeError as error:
            raise ConflictError(error.message) from None

    async def _effective(self, config: Config, added: AddedExperts) -> Config:
        return (await asyncio.to_thread(self._with_added, config, added)).config

    @staticmethod
    def _with_added(config: Config, added: AddedExperts) -> EffectiveConfig:
        return with_added(
            config, added, unserved=True, folder_of=partial(allowed_adapter_folder, config)
        )

    async def _change(self, config: Config) -> None:
        # An attempt that fails is made again, because the config is another one until then.
        await self._builder.reload(config)
        self._config = config
        self._weights.clear()

    def experts(self) -> dict[str, Any]:
        details = self.pool.details()
        for name, entry in details.items():
            if "shares" in entry or name not in self._config.experts:
                continue
            if (weight_bytes := self._weight_bytes(name)) is not None:
                entry["weight_bytes"] = weight_bytes
        return details

    def _weight_bytes(self, expert: str) -> int | None:
        """Return the bytes of an expert's weights, from the headers of its files.

        The result is None where the files are not on this machine.
        """
        if expert in self._weights:
            return self._weights[expert]
        expert = self._config.owner_of(expert)
        settings = self._config.experts[expert]
        if settings.profile is not None:
            return profile_bytes(self._config, expert)
        is_adapter = settings.base is not None and settings.form == "adapter"
        try:
            folder = settings.adapter if is_adapter else folder_here(self._config, expert)
            if folder is None:
                return None
            self._weights[expert] = inspect_model(Path(folder)).weight_bytes
        except CoeError:
            return None
        return self._weights[expert]

    def model_server_load(self) -> dict[str, Any]:
        """Return the load by which an endpoint picker chooses (`ModelServerLoad`)."""
        kind = self.pool.kind
        adapters = [
            name
            for name in self._config.local_experts(kind)
            if self._config.experts[name].adapter is not None
            and self._config.experts[name].form == "adapter"
        ]
        load = ModelServerLoad.of_pool(
            self.pool.snapshot(), adapters, self._adapter_room(), self.pool_metrics.kv_usage()
        )
        return load.to_wire()

    def _adapter_room(self) -> int:
        """The number of adapters that engines of this pool are started for."""
        config, kind = self._given, self.pool.kind
        settings = config.pools[kind]
        takes_turns = settings.slots is not None and settings.slots < len(config.groups(kind))
        spare = 0 if takes_turns else settings.vllm.spare_adapters
        return sum(
            len(unit) - 1 + (spare if config.experts[unit[0]].model is not None else 0)
            for unit in config.units(kind)
        )

    async def gpus(self) -> list[dict[str, Any]]:
        return [state.to_wire() for state in await self._gpu_states()]

    async def _gpu_states(self) -> tuple[GpuState, ...]:
        on_gpu = self._config.pools[self.pool.kind].gpus > 0
        return await self._gpu_monitor.states() if on_gpu else ()

    async def moe_statistics(self, expert: str) -> dict[str, Any]:
        return await self.pool_metrics.routing_stats(self.pool.held_name(expert))

    async def server_log(self, expert: str) -> dict[str, Any]:
        """Return the last lines of the server that a command started for an expert.

        Raises:
            UnknownModelError: The pool has no such expert, or no command starts it.
        """
        held = self.pool.held_name(expert)
        lines = await asyncio.to_thread(self._builder.engines.server_log, held, _LOG_LINES)
        if lines is None:
            raise UnknownModelError(f"expert {expert[:128]!r} has no server that a command starts")
        return {"lines": lines}

    async def metrics(self) -> str:
        states = await self._gpu_states()
        # Old figures of a driver that hangs would pass for new ones.
        self.pool_metrics.registry.forget(metric_declarations.GPU_MEMORY)
        for state in states:
            memory = state.memory
            self.pool_metrics.set_gpu_memory(
                str(memory.index),
                total=memory.total_bytes,
                used=memory.used_bytes,
                free=memory.free_bytes,
                reserved=state.reserved_bytes,
            )
        return await self.pool_metrics.text({"pool": f"{self.pool.kind}-{self.pool.boot}"})
