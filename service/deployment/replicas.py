"""The replicas of the Serve application: pools and gateways."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from service.config import Config
from service.deployment.config_reload import config_file, current_config, follow, reload, version
from service.deployment.pool_http_server import QuietServer, bind_free_port, server_config
from service.gateway.runtime import GatewayRuntime
from service.pool.process import PoolProcess
from service.rpc import pool_addresses
from service.rpc.auth import node_folder, read_secret
from service.telemetry.logging import ENGINE_LOGS, set_up_logs
from service.telemetry.node_exporter import own_folder

# Name of a pool's autoscaling metric.
QUEUED = "queued"
log = logging.getLogger("coe.deployment")


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
        self._drain_s = config.server.drain_s
        secret = read_secret(Path(secret_path))
        node = node_folder(secret)
        # vLLM's engines leave sockets behind. In this folder the supervisor removes them.
        with contextlib.suppress(OSError):
            own_folder(node)
            os.environ.setdefault("VLLM_RPC_BASE_PATH", str(node))
        self._process = PoolProcess(config, kind, secret, node=node)
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
        self._following = asyncio.create_task(follow(in_force, seen, self._process.reload))

    def record_replica_metadata(self) -> dict[str, str]:
        """Return this pool's address for gateways. Serve calls this once, when it is ready."""
        return self._metadata

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the queued and running requests, which Serve can't see."""
        return {QUEUED: float(self._process.pool.queued())}

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
        await process.stop(self._drain_s)
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
            reload=partial(asyncio.to_thread, reload, in_force) if in_force.exists() else None,
        )
        await self._process.start()
        # A full collection would walk through every imported module's objects, on the loop.
        gc.collect()
        gc.freeze()
        self._following = asyncio.create_task(follow(in_force, seen, self._reload))
        loop = asyncio.get_running_loop()
        directory = self._process.directory
        pool_addresses.listen(lambda known: _in_loop(loop, lambda: directory.update(known)))
        for kind, pool in config.pools.items():
            if pool.min_replicas > 0:
                self._wake(kind)

    def __serve_build_asgi_app__(self) -> Any:
        return self._process

    async def _reload(self, config: Config) -> None:
        """Apply another config to new requests; running requests keep theirs."""
        await self._process.reload(config)
        self._config = config

    def _wake_for(self, expert: str) -> None:
        for kind in self._config.pools:
            if expert in self._config.experts and expert in self._config.local_experts(kind):
                self._wake(kind)

    def _wake(self, kind: str) -> None:
        running = self._waking.get(kind)
        if running is None or running.done():
            self._waking[kind] = asyncio.create_task(self._call_wake(kind))

    async def _call_wake(self, kind: str) -> None:
        try:
            await self._handles[kind].wake.remote()
        except Exception as error:
            log.warning("waking a pool of kind %s failed: %s", kind, type(error).__name__)

    async def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            self._following.cancel()
            await process.stop()


def _in_loop(loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has closed: the process is ending
        loop.call_soon_threadsafe(act)
