"""Ray, Serve and HAProxy on this machine, for `coe serve`."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path

import psutil
import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from service.config import Config
from service.deployment.find_run_processes import processes_of_run
from service.deployment.gpu_check import check_gpus, check_torch
from service.deployment.live_changes import PoolChanges, pool_changes
from service.deployment.serve_application import APP, DeployedPool, application
from service.deployment.service_stop_signal import EndOfService
from service.torch_build import torch_build

_EXIT_TIMEOUT_S = 3.0
# Time beyond the drain in which replicas stop their engines, in s.
_DELETE_S = 20.0


class LocalCluster:
    """Ray, Serve and HAProxy on this machine, for as long as `coe serve` runs.

    Call `service.launch.ray_environment.prepare` before importing this module, because Ray Serve
    reads its settings when it is imported.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config = config
        self._run_dir = run_dir
        self._end_of_service: EndOfService | None = None
        self._keys: tuple[Path, Path] | None = None
        self._deployed = {kind: DeployedPool("1", config) for kind in config.pools}
        self._deploys = 1

    def start_ray(self) -> None:
        """Start Ray's own processes.

        Raises:
            ConfigError: The machine has too few GPUs, or a torch that can't use them.
        """
        check_torch(self._config, torch_build())
        # The supervisor reports the progress.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        pools = self._config.pools.values()
        gateways = self._config.server.gateways.most_replicas
        cpus = sum(pool.cpus * pool.most_replicas for pool in pools) + gateways
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
        check_gpus(self._config, ray.cluster_resources().get("GPU", 0.0))

    def start_serve(self) -> None:
        """Start Serve's controller and HAProxy."""
        server = self._config.server
        # Serve binds the gateways' own ports to this address too. The wrapper of HAProxy listens
        # on the config's address, so that the gateways can stay on loopback.
        program = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH", "")
        wrapped = Path(program).is_relative_to(self._run_dir)
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(
                host="127.0.0.1" if wrapped else server.host, port=server.port
            ),
        )

    def deploy(self, secret_path: Path, admin_key_path: Path) -> None:
        """Deploy the application and wait until gateways and pools run (engines load later)."""
        self._end_of_service = EndOfService(secret_path)
        self._keys = secret_path, admin_key_path
        serve.run(self._application(), name=APP, route_prefix="/", blocking=False)

    def _application(self) -> serve.Application:
        assert self._keys is not None
        return application(self._config, *self._keys, host="127.0.0.1", deployed=self._deployed)

    @staticmethod
    def resources() -> dict[str, float]:
        """Return the CPUs and GPUs that Ray has."""
        found: dict[str, float] = ray.cluster_resources()
        return found

    def redeploy(self, config: Config) -> PoolChanges:
        """Let Serve add, remove, replace and scale pools, without waiting for it.

        Replicas that do not change go on. Those that go drain first.

        Returns:
            What changes.
        """
        changes = pool_changes(self._config, config)
        if changes:
            new = DeployedPool(str(self._deploys + 1), config)
            fresh = {*changes.added, *changes.replaced}
            before = self._config, self._deployed
            self._deployed = {
                kind: new if kind in fresh else self._deployed[kind] for kind in config.pools
            }
            self._config = config
            try:
                target = serve.RunTarget(self._application(), name=APP, route_prefix="/")
                serve.run_many([target], wait_for_applications_running=False)
            except BaseException:
                self._config, self._deployed = before
                raise
            self._deploys += 1
        self._config = config
        return changes

    def stop(self) -> None:
        """Drain and stop everything; kill the processes that are left after that."""
        processes = processes_of_run(self._run_dir)
        if self._end_of_service is not None:
            with contextlib.suppress(OSError):
                self._end_of_service.announce()
        # Where Ray was never started, Serve would start it in order to shut it down.
        if ray.is_initialized():
            # First the application alone: `shutdown` stops HAProxy at the same time, and every
            # running stream with it. Serve would wait for a hanging replica for as long as a
            # removed one may drain.
            deleting = threading.Thread(target=_delete_application, daemon=True)
            deleting.start()
            deleting.join(self._config.server.drain_s + _DELETE_S)
            with contextlib.suppress(Exception):
                serve.shutdown()
            ray.shutdown()
        processes |= processes_of_run(self._run_dir)
        _, alive = psutil.wait_procs(processes, timeout=_EXIT_TIMEOUT_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_EXIT_TIMEOUT_S)


def _delete_application() -> None:
    with contextlib.suppress(Exception):
        serve.delete(APP)
