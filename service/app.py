"""The composition root: builds gateways and pools from a config. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from service.api.gateway import Gateway
from service.api.plan import Planner
from service.api.relay import Relay, RemoteSeat
from service.config import Config, PoolConfig
from service.engine.protocol import Engine
from service.engine.remote import RemoteEngine
from service.engine.simulated import SimulatedEngine
from service.errors import CoeError
from service.link.call import Call
from service.link.directory import Directory
from service.link.server import PoolApp
from service.models import locate, pull
from service.pool.pool import Pool
from service.pool.slot import Slot
from service.router.classify import Classifier
from service.router.conversation import classify_body
from service.telemetry.pool_metrics import PoolCollector, pool_text
from service.types import CategoryScores

log = logging.getLogger("coe.app")

# What a first start takes before one has been measured.
_VLLM_START_S = 40.0


class GatewayProcess:
    """A gateway with what it holds: links to pools, clients of remote experts."""

    def __init__(
        self,
        config: Config,
        gateway_id: str,
        secret: str,
        *,
        wake: Callable[[str], None],
        behind_serve: bool,
    ) -> None:
        self.directory = Directory(gateway_id, secret)
        self._seats = {
            name: RemoteSeat(
                RemoteEngine(name, expert.remote),
                expert.remote.max_in_flight,
                expert.remote.max_queue,
            )
            for name, expert in config.experts.items()
            if expert.remote is not None
        }
        self.gateway = Gateway(
            config,
            Planner(config, load_classifier(config)),
            Relay(self.directory, self._seats, wake),
            self.directory,
            lambda: {name: seat.failed for name, seat in self._seats.items()},
            behind_serve=behind_serve,
        )

    async def start(self) -> None:
        """Connect remote experts; one that can't be is shown as failed."""
        for name, seat in self._seats.items():
            try:
                await seat.engine.start()
            except CoeError as error:
                seat.failed = error.message
                log.error("expert %s failed: %s", name, error.message)

    async def stop(self) -> None:
        """Close every connection."""
        await self.directory.close()
        await asyncio.gather(*(seat.engine.stop() for seat in self._seats.values()))


def load_classifier(config: Config) -> Callable[[Mapping[str, Any]], CategoryScores] | None:
    """Stage 1 of the router, or None where the config names no artifact. Raises ArtifactError."""
    if config.router.artifact is None:
        return None
    return partial(classify_body, Classifier.load(Path(config.router.artifact)))


class PoolProcess:
    """A pool with its engines, its application and its metrics."""

    def __init__(self, config: Config, kind: str, secret: str) -> None:
        self.pool = build_pool(config, kind)
        self._collector = PoolCollector(self.pool.snapshot)
        self.app = PoolApp(self, secret, config.server.max_body_bytes)

    async def run(self, call: Call, body: bytes, send: Any) -> None:
        """See `PoolHandler`."""
        await self.pool.run(call, body, send)

    def snapshots(self) -> Any:
        """See `PoolHandler`."""
        return self.pool.snapshots()

    def metrics(self) -> bytes:
        """See `PoolHandler`."""
        return pool_text(self._collector)


def build_pool(config: Config, kind: str) -> Pool:
    """A pool of this kind: one slot for each expert with full weights, with its adapters."""
    settings = config.pools[kind]
    pool = Pool(kind)
    held = config.local_experts(kind)
    for base in held:
        if config.experts[base].base is not None:
            continue
        adapters = tuple(name for name in held if config.experts[name].base == base)
        simulated = settings.engine == "simulated"
        pool.add(
            Slot(
                (base, *adapters),
                partial(_build_engine, config, settings, base, adapters),
                capacity=settings.max_running,
                max_waiting=settings.max_queue,
                start_guess_s=settings.simulated.load_s if simulated else _VLLM_START_S,
                changed=pool.changed,
            )
        )
    return pool


def _build_engine(
    config: Config, settings: PoolConfig, base: str, adapters: tuple[str, ...]
) -> Engine:
    if settings.engine == "simulated":
        return SimulatedEngine((base, *adapters), settings.simulated)
    # Imported here: it takes seconds, and only a pool with real engines needs it.
    from service.engine.vllm import VllmEngine, VllmModel

    source = config.experts[base].model
    assert source is not None
    root = Path(config.models_dir) if config.models_dir is not None else None
    folder = locate(source, root=root) or pull(source, dest_root=root)
    paths = {name: str(config.experts[name].adapter) for name in adapters}
    return VllmEngine(VllmModel(base, str(folder), paths), settings.vllm, on_cpu=settings.gpus == 0)
