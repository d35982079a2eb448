"""Ray Serve: the deployments, and starting and stopping them on this machine.

The only module that imports ray. Serve places, starts, scales, health-checks and
replaces; no token travels through it. A pool binds a port of its own and tells
it as replica metadata, which gateways follow.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import random
import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
import uvicorn
from ray import serve
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingContext,
    AutoscalingPolicy,
    HTTPOptions,
    ProxyLocation,
    RequestRouterConfig,
)
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import (
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from service.app import GatewayProcess, PoolProcess
from service.config import Config, PoolConfig
from service.link import addresses
from service.link.client import PoolAddress
from service.link.secret import read_secret
from service.telemetry.logs import set_up_logs

APP = "coe"
_PORTS = range(31100, 32000)
_QUEUED = "queued"
_LEFT_S = 3.0
log = logging.getLogger("coe.deployment")


# --- following replicas


class FollowingRouter(RequestRouter):
    """Serve's hook for who gets a handle's calls, used to hear of replicas as they come and go.

    The calls themselves (only `wake`) go to any replica.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's replicas have changed; runs in the handle's loop, which may not be ours."""
        super().update_replicas(replicas)
        found = []
        for replica in replicas:
            told = replica.replica_metadata
            if {"url", "kind", "boot"} <= told.keys():
                found.append(PoolAddress(told["url"], told["kind"], told["boot"]))
        addresses.put(str(self._deployment_id), found)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Any order will do."""
        del pending_request
        return [candidate_replicas] if candidate_replicas else []


# --- the two kinds of replica


class PoolReplica:
    """One pool in one Serve replica, with an HTTP server of its own."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config_json: str, kind: str, secret_path: str, host: str
    ) -> None:
        set_up_logs()
        config = Config.model_validate_json(config_json)
        self._drain_s = config.server.drain_s
        self._process = PoolProcess(config, kind, read_secret(Path(secret_path)))
        listener = bind_free_port(host)
        self._server = QuietServer(server_config(self._process.app))
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        port = listener.getsockname()[1]
        self._told = {
            "url": f"http://{host}:{port}",
            "kind": kind,
            "boot": self._process.pool.boot,
        }
        self._process.pool.start()

    def record_replica_metadata(self) -> dict[str, str]:
        """What gateways need to find this pool. Serve asks once, when it is ready."""
        return self._told

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve can't see: requests queued and running here."""
        return {_QUEUED: float(self._process.pool.queued())}

    def check_health(self) -> None:
        """Serve replaces this replica when it raises."""
        if (why := self._process.pool.unhealthy()) is not None:
            raise RuntimeError(why)
        if self._serving.done():
            raise RuntimeError("the pool's HTTP server ended")

    async def wake(self) -> str:
        """Does nothing: a call of it makes Serve start a replica where there is none."""
        return self._told["boot"]

    async def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is None:
            return
        await process.pool.stop(self._drain_s)
        self._server.should_exit = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._serving, 2)


@serve.ingress()
class GatewayReplica:
    """One gateway in one Serve replica: Serve's own HTTP server carries its application."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config_json: str,
        secret_path: str,
        admin_key_path: str,
        pools: dict[str, DeploymentHandle],
    ) -> None:
        set_up_logs()
        config = Config.model_validate_json(config_json)
        self._handles = pools
        self._kinds_of: dict[str, list[str]] = {}
        for kind in config.pools:
            for expert in config.local_experts(kind):
                self._kinds_of.setdefault(expert, []).append(kind)
        self._waking: dict[str, asyncio.Task[None]] = {}
        self._process = GatewayProcess(
            config,
            secrets.token_hex(8),
            read_secret(Path(secret_path)),
            admin_key=read_secret(Path(admin_key_path)),
            wake=self._wake_for,
            behind_serve=True,
        )
        await self._process.start()
        loop = asyncio.get_running_loop()
        directory = self._process.directory
        addresses.listen(lambda known: _in_loop(loop, lambda: directory.update(known)))
        for kind, pool in config.pools.items():
            if pool.min_replicas > 0:
                self._wake(kind)

    def __serve_build_asgi_app__(self) -> Any:
        return self._process.gateway.app()

    def _wake_for(self, expert: str) -> None:
        for kind in self._kinds_of.get(expert, ()):
            self._wake(kind)

    def _wake(self, kind: str) -> None:
        running = self._waking.get(kind)
        if running is None or running.done():
            self._waking[kind] = asyncio.create_task(self._call_wake(kind))

    async def _call_wake(self, kind: str) -> None:
        try:
            await self._handles[kind].wake.remote()
        except Exception as error:
            log.warning("waking a pool of kind %s: %s", kind, type(error).__name__)

    async def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            await process.stop()


def _in_loop(loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has closed: the process is ending
        loop.call_soon_threadsafe(act)


# --- a server in somebody else's process


class QuietServer(uvicorn.Server):
    """uvicorn that leaves the process's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are Serve's business."""
        yield


def server_config(app: Any) -> uvicorn.Config:
    """How pools (and gateways without Serve) are served."""
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
        backlog=4096,
    )


def bind_free_port(host: str) -> socket.socket:
    """A listening socket on a free port of ours. Raises OSError when all are taken."""
    ports = list(_PORTS)
    random.shuffle(ports)
    for port in ports:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.bind((host, port))
        except OSError:
            listener.close()
            continue
        listener.set_inheritable(False)
        return listener
    raise OSError(f"no free port in {_PORTS.start}-{_PORTS.stop - 1} on {host}")


# --- the application


def queued_work(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Serve's autoscaling policy for pools: replicas for the work that they report.

    Held requests at gateways count too (Serve sees their `wake` calls), so that a
    pool comes up from zero.
    """
    reported = (context.aggregated_metrics or {}).get(_QUEUED, {})
    queued = sum(float(value) for value in reported.values())
    target = float(context.config.get_target_ongoing_requests())
    held = 1 if context.total_num_requests > 0 else 0
    wanted = max(math.ceil(queued / target), held)
    low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(low, min(high, wanted)), {}


def application(
    config: Config, secret_path: Path, admin_key_path: Path, host: str
) -> serve.Application:
    """The Serve application of a config. `host`: the address that pools bind."""
    config_json = config.model_dump_json()
    pools = {
        kind: _pool_deployment(config, kind).bind(config_json, kind, str(secret_path), host)
        for kind in config.pools
    }
    gateway = serve.deployment(
        name="gateway",
        num_replicas=config.server.gateways,
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=config.server.drain_s + 2,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
        health_check_timeout_s=10,
        ray_actor_options={
            "num_cpus": 0.1,
            "runtime_env": {"env_vars": _GATEWAY_ENVIRONMENT},
        },
    )(GatewayReplica)
    return gateway.bind(config_json, str(secret_path), str(admin_key_path), pools)


def _pool_deployment(config: Config, kind: str) -> Any:
    pool = config.pools[kind]
    scaling: dict[str, Any]
    if pool.min_replicas == pool.most_replicas:
        scaling = {"num_replicas": pool.min_replicas}
    else:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=pool.min_replicas,
                max_replicas=pool.most_replicas,
                target_ongoing_requests=pool.target_queued,
                # Longer than Serve's own interval, which it insists on.
                look_back_period_s=11,
                upscale_delay_s=2,
                downscale_delay_s=300,
                policy=AutoscalingPolicy(policy_function="service.deployment:queued_work"),
            )
        }
    return serve.deployment(
        name=f"pool-{kind}",
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=config.server.drain_s + 10,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
        # Importing vLLM holds the interpreter for seconds at a time.
        health_check_timeout_s=60,
        request_router_config=RequestRouterConfig(request_router_class=FollowingRouter),
        ray_actor_options={
            "num_cpus": pool.cpus,
            "num_gpus": pool.gpus,
            "runtime_env": {"env_vars": _pool_environment(pool)},
        },
        **scaling,
    )(PoolReplica)


# One thread for everything: a hop between Serve's loop and ours would cost a
# request more than all we do with it.
_GATEWAY_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "OMP_NUM_THREADS": "1",
}


def _pool_environment(pool: PoolConfig) -> dict[str, str]:
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if pool.gpus == 0:
        threads = str(pool.vllm.threads)
        environment |= {
            # Ray sets OMP's threads itself, and vLLM's own binding puts every
            # engine on the same core.
            "OMP_NUM_THREADS": threads,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
    return environment


# --- this machine


class LocalCluster:
    """Ray, Serve and HAProxy on this machine, for as long as `coe serve` runs.

    The environment must have been prepared by `service.cluster_env` before this
    module was imported: Ray Serve reads its settings when it is imported.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config = config
        self._run_dir = run_dir

    def start(self) -> None:
        """Start Ray and Serve's controller and proxy."""
        # Its progress is ours to tell.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        pools = self._config.pools.values()
        cpus = sum(pool.cpus * pool.most_replicas for pool in pools) + self._config.server.gateways
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, int(cpus) + 2),
            include_dashboard=False,
            object_store_memory=100 * 1024**2,
            namespace=APP,
            log_to_driver=os.environ.get("COE_RAY_LOGS") == "1",
            logging_level=logging.ERROR,
            configure_logging=True,
            _temp_dir=str(self._run_dir / "ray"),
        )
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=self._config.server.host, port=self._config.server.port),
        )

    def deploy(self, secret_path: Path, admin_key_path: Path) -> None:
        """Deploy the application and wait until gateways and pools run (engines load later)."""
        app = application(self._config, secret_path, admin_key_path, "127.0.0.1")
        serve.run(app, name=APP, route_prefix="/", blocking=False)

    def stop(self) -> None:
        """Drain and stop everything; whatever of ours is left after that is ended."""
        ours = _descendants(self._run_dir)
        with contextlib.suppress(Exception):
            # First the application alone: `shutdown` takes HAProxy away at the same
            # time, and with it every stream that still runs.
            serve.delete(APP)
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        _, left = psutil.wait_procs(ours | _descendants(self._run_dir), timeout=_LEFT_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_LEFT_S)


def _descendants(run_dir: Path) -> set[psutil.Process]:
    """Our children, theirs, and processes that name our folder: their parent may have died."""
    found = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(run_dir) in part for part in process.cmdline()):
                found.add(process)
    found.discard(psutil.Process())
    return found
