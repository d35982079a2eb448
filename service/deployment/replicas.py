"""The replicas of the Serve application: pools and gateways."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from service.config import Config
from service.deployment import direct_prompts
from service.deployment.config_reload import config_file, current_config, follow, reload, version
from service.deployment.live_changes import pool_changes
from service.deployment.pool_http_server import QuietServer, bind_free_port, server_config
from service.deployment.serve_autoscaling import gateway_stats, pool_stats
from service.deployment.service_stop_signal import EndableApp, EndOfService
from service.engine.compile_cache import compile_cache, without_compiler
from service.errors import UnavailableError
from service.gateway.gateway_reload import GatewayRuntime
from service.gpu_devices import gpu_memory, visible_gpus
from service.models.model_store import model_root
from service.pool.pool_process import PoolProcess
from service.rpc import pool_address_registry
from service.rpc.cluster_secret import read_secret
from service.rpc.local_paths import node_folder
from service.telemetry.json_logging import ENGINE_LOGS, set_up_logs
from service.telemetry.node_scrape_target import own_folder

log = logging.getLogger("coe.deployment")

# Mean age of the processor time that a gateway's load is computed from.
_CPU_S = 10.0
# The delays before a pool is called again. The delay doubles from the first to the last.
_FIRST_WAKE_RETRY_S, _LAST_WAKE_RETRY_S = 0.5, 8.0


class PoolReplica:
    """A pool in a Serve replica, with its own HTTP server."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config_json: str, kind: str, secret_path: str, host: str | None
    ) -> None:
        set_up_logs()
        # Engine processes inherit this: their lines must not hold prompts or schemas either.
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(ENGINE_LOGS))
        in_force = config_file(Path(secret_path))
        seen = version(in_force)
        config = current_config(in_force, config_json)
        for name in config.key_variables:
            # Ray has emptied the variables; engines do not need the names either.
            os.environ.pop(name, None)
        self._config = config
        self._kind = kind
        # Where the config in force is a file, pools are removed and replaced while others go on.
        self._is_replaceable = in_force.exists()
        self._end_of_service = EndOfService(Path(secret_path))
        secret = read_secret(Path(secret_path))
        node = node_folder(secret)
        # vLLM's engines leave sockets behind. In this folder the supervisor removes them.
        with contextlib.suppress(OSError):
            own_folder(node)
            os.environ.setdefault("VLLM_RPC_BASE_PATH", str(node))
        if config.pools[kind].gpus > 0:
            models = Path(config.models_dir) if config.models_dir else model_root()
            visible = visible_gpus(await asyncio.to_thread(gpu_memory), os.environ)
            os.environ |= compile_cache(models, visible[0].name if visible else "", os.environ)
        else:
            os.environ |= without_compiler(os.environ)
        # A run on this machine has a folder for its files, which ends with it.
        files = in_force.parent if self._is_replaceable else node
        self._process = PoolProcess(config, kind, secret, node=node, logs=files / "servers")
        host = host or ray.util.get_node_ip_address()
        listener = bind_free_port(host)
        self._server = QuietServer(server_config(self._process.app))
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        port = listener.getsockname()[1]
        self._metadata = {
            "url": f"http://{host}:{port}",
            "kind": kind,
            "boot": self._process.pool.boot,
        }
        await self._process.start()
        self._boot_s = max(0.0, time.time() - psutil.Process().create_time())
        self._following = asyncio.create_task(follow(in_force, seen, self._reload))

    async def _reload(self, config: Config) -> None:
        """Apply another config, unless Serve removes or replaces this replica because of it."""
        changes = await asyncio.to_thread(pool_changes, self._config, config)
        if self._kind in changes.removed or self._kind in changes.replaced:
            return
        await self._process.reload(config)
        self._config = config

    def record_replica_metadata(self) -> dict[str, str]:
        """Return this pool's address for gateways. Serve calls this once, when it is ready."""
        return self._metadata

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load, which Serve can't see because requests do not pass through it."""
        return pool_stats(self._process.pool.load(), self._boot_s)

    def check_health(self) -> None:
        """Raise if the pool or its server has failed; Serve then replaces this replica.

        Raises:
            RuntimeError: The pool is unhealthy, or its HTTP server ended.
        """
        if (reason := self._process.pool.unhealthy()) is not None:
            raise RuntimeError(reason)
        if self._serving.done():
            raise RuntimeError("the pool's HTTP server ended")

    async def wake(self) -> str:
        """Do nothing; the call alone makes Serve start a replica if there is none."""
        return self._metadata["boot"]

    async def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is None:
            return
        self._following.cancel()
        pool = process.pool
        settings = self._config.pools[self._kind]
        stays = self._is_replaceable and not self._end_of_service.announced
        pool.refuse_new(replaced=stays)
        removal_s = settings.scaling.downscale_drain_s if settings.scales or stays else 0.0
        await self._end_of_service.wait_for_requests(pool.queued, removal_s)
        await process.stop(self._config.server.drain_s)
        self._server.should_exit = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._serving, 2)


@serve.ingress()
class GatewayReplica:
    """A gateway in a Serve replica; Serve's own HTTP server runs its application."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config_json: str,
        secret_path: str,
        admin_key_path: str,
        pools: dict[str, DeploymentHandle],
    ) -> None:
        set_up_logs()
        in_force = config_file(Path(secret_path))
        seen = version(in_force)
        config = current_config(in_force, config_json)
        self._handles = pools
        self._config = config
        self._in_force = in_force
        self._cpu = CpuShare(time.monotonic, time.process_time)
        self._waking: dict[str, asyncio.Task[None]] = {}
        secret = read_secret(Path(secret_path))
        self._process = GatewayRuntime(
            config,
            secrets.token_hex(8),
            secret,
            admin_key=read_secret(Path(admin_key_path)),
            wake=self._wake_for,
            behind_serve=True,
            node=node_folder(secret),
            reload=partial(asyncio.to_thread, self._put_in_force) if in_force.exists() else None,
            count_replicas=self._count_scaled,
        )
        await self._process.start()
        # A full collection would walk through every imported module's objects, on the loop.
        gc.collect()
        gc.freeze()
        self._following = asyncio.create_task(follow(in_force, seen, self._reload))
        self._app: Any = self._process
        if config.server.gateways.scales:
            self._app = EndableApp(self._process)
            end_of_service = EndOfService(Path(secret_path))
            self._ending = asyncio.create_task(
                self._app.end_after(end_of_service, config.server.drain_s)
            )
        # Serve starts its HTTP server after this constructor.
        direct_prompts.use_by_default(self._app)
        loop = asyncio.get_running_loop()
        directory = self._process.directory
        pool_address_registry.listen(lambda known: _in_loop(loop, lambda: directory.update(known)))
        self._find_pools(config.pools)

    def _find_pools(self, kinds: Iterable[str]) -> None:
        """Follow the addresses of pools of these kinds; a handle does so from its first call."""
        for kind in kinds:
            if self._config.pools[kind].min_replicas > 0:
                self._wake(kind)

    def _put_in_force(self) -> dict[str, list[str]]:
        return reload(self._in_force, ray.cluster_resources())

    async def _count_scaled(self) -> dict[str, dict[str, int]]:
        """Count the replicas of deployments whose number changes."""
        config = self._config
        scaled = {f"pool-{kind}" for kind, pool in config.pools.items() if pool.scales}
        if config.server.gateways.scales:
            scaled.add("gateway")
        return await _count_replicas(scaled) if scaled else {}

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load. Serve calls this every second where gateways are scaled."""
        return gateway_stats(self._process.state.metrics.in_flight, self._cpu.read())

    async def _reload(self, config: Config) -> None:
        """Apply another config to new requests; running requests keep theirs."""
        await self._process.reload(config)
        before, self._config = self._config.pools, config
        for kind in before.keys() - config.pools.keys():
            self._handles.pop(kind, None)
        self._find_pools(config.pools.keys() - before.keys())

    def _wake_for(self, expert: str) -> None:
        config = self._process.current.config  # with the experts that an admin has added
        for kind in self._config.pools:
            if expert in config.experts and expert in config.local_experts(kind):
                self._wake(kind)

    def _wake(self, kind: str) -> None:
        running = self._waking.get(kind)
        if running is None or running.done():
            self._waking[kind] = asyncio.create_task(self._call_wake(kind))

    async def _call_wake(self, kind: str) -> None:
        """Call a pool of this kind. A new kind may not be deployed yet."""
        wait_s = _FIRST_WAKE_RETRY_S
        while kind in self._config.pools:
            try:
                await (await self._handle(kind)).wake.remote()
            except Exception as error:
                log.warning("waking a pool of kind %s failed: %s", kind, type(error).__name__)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _LAST_WAKE_RETRY_S)
            else:
                return

    async def _handle(self, kind: str) -> DeploymentHandle:
        if (known := self._handles.get(kind)) is not None:
            return known
        app = serve.get_replica_context().app_name
        found = await asyncio.to_thread(serve.get_deployment_handle, f"pool-{kind}", app)
        return self._handles.setdefault(kind, found)

    async def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            self._following.cancel()
            for waking in self._waking.values():
                waking.cancel()
            await process.stop()


_STATES = {"RUNNING": "running", "STOPPING": "stopping", "STOPPED": "stopping"}


async def _count_replicas(deployments: Collection[str]) -> dict[str, dict[str, int]]:
    """Count the replicas of these deployments by state, as Serve's controller knows them.

    Raises:
        UnavailableError: The controller does not answer.
    """
    app = serve.get_replica_context().app_name
    try:
        found = (await asyncio.to_thread(serve.status)).applications.get(app)
    except (RayError, RayServeException) as error:
        raise UnavailableError(f"Ray Serve's controller: {type(error).__name__}") from None
    counts: dict[str, dict[str, int]] = {}
    for name, status in found.deployments.items() if found is not None else ():
        if name in deployments:
            counts[name] = dict.fromkeys(("starting", "running", "stopping"), 0)
            for state, count in status.replica_states.items():
                counts[name][_STATES.get(state, "starting")] += count
    return counts


class CpuShare:
    """The share of a core that this process has used between two readings.

    Args:
        clock: The time in s.
        cpu_clock: The processor time of this process in s.
    """

    def __init__(self, clock: Callable[[], float], cpu_clock: Callable[[], float]) -> None:
        self._clock, self._cpu_clock = clock, cpu_clock
        self._at_s, self._used_s = clock(), cpu_clock()
        self._share = 0.0

    def read(self) -> float:
        """Return the share since the last reading, averaged with earlier ones."""
        now_s, used_s = self._clock(), self._cpu_clock()
        passed_s = now_s - self._at_s
        if passed_s > 0:
            latest = (used_s - self._used_s) / passed_s
            self._share += (1 - math.exp(-passed_s / _CPU_S)) * (latest - self._share)
            self._at_s, self._used_s = now_s, used_s
        return self._share


def _in_loop(loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has closed: the process is ending
        loop.call_soon_threadsafe(act)
