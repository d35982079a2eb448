"""A Ray cluster of several nodes on this machine, each with an address of its own on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from service.launch.haproxy_config import write_wrapper
from service.rpc.cluster_secret import make_secret
from tests.support.coe_serve_process import wait_until

ROOT = Path(__file__).parents[2]
# Not 127.0.0.1, for which Ray takes an address of the machine's network.
HEAD = "127.0.0.11"
_BIN = Path(sys.executable).parent


@dataclass
class RayCluster:
    """A running cluster. Everything it writes is in `folder`."""

    folder: Path
    environment: dict[str, str]
    gcs_port: int
    dashboard_port: int
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"{HEAD}:{self.gcs_port}"

    @property
    def log(self) -> str:
        """What the nodes have said."""
        return (self.folder / "log").read_text(errors="replace")

    def start(self, ip: str, resources: dict[str, float]) -> None:
        """Start a node; the first one is the head."""
        head = not self.nodes
        place = [f"--address={self.address}"]
        if head:
            place = [
                "--head",
                f"--port={self.gcs_port}",
                "--include-dashboard=true",
                f"--dashboard-host={HEAD}",
                f"--dashboard-port={self.dashboard_port}",
                f"--ray-client-server-port={_free_port()}",
                f"--temp-dir={self.folder / 'r'}",
            ]
        with open(self.folder / "log", "ab") as log:
            self.nodes[ip] = subprocess.Popen(
                [
                    _BIN / "ray",
                    "start",
                    *place,
                    "--block",
                    f"--node-ip-address={ip}",
                    "--num-cpus=2",
                    "--num-gpus=0",
                    "--object-store-memory=80000000",
                    f"--dashboard-agent-listen-port={_free_port()}",
                    f"--resources={json.dumps(resources)}",
                ],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, *command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a program with the cluster's environment, to its end."""
        return subprocess.run(
            [str(_BIN / command[0]), *command[1:]],
            env=self.environment | {"RAY_ADDRESS": self.address},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def processes(self, ip: str) -> list[psutil.Process]:
        """A node's processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            me = psutil.Process(self.nodes[ip].pid)
            return [me, *me.children(recursive=True)]
        return []

    def kill(self, ip: str) -> None:
        """A node's machine is gone: all of its processes at once."""
        doomed = self.processes(ip)
        for item in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                item.kill()
        psutil.wait_procs(doomed, timeout=10)
        self.nodes.pop(ip).wait(10)

    def end(self) -> None:
        """End every node."""
        for ip in list(self.nodes):
            self.kill(ip)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(str(self.folder) in part for part in process.cmdline()):
                    process.kill()


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """A cluster without nodes yet, with the environment of deploy/ray/node.env."""
    # Short: Ray's sockets are below it.
    folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    for line in (ROOT / "deploy" / "ray" / "node.env").read_text().splitlines():
        if not line.startswith("#"):
            key, _, value = line.partition("=")
            environment[key] = value
    make_secret(folder / "token")
    haproxy = folder / "h"
    haproxy.mkdir()
    stats, metrics = _free_port(), _free_port()
    # As `python -m service.launch.haproxy_config` does it for Serve's own ports.
    wrapper = write_wrapper(
        folder / "w", own_ports=(stats, metrics), header_timeout_s=10, fallback_socket=None
    )
    environment |= {
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "PYTHONPATH": str(ROOT),
        # Of its own, as other services on this machine have theirs.
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "a.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "m.sock"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
    }
    cluster = RayCluster(folder, environment, _free_port(), _free_port())
    try:
        yield cluster
    except BaseException:
        sys.stderr.write(cluster.log[-8000:])
        raise
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


def up(cluster: RayCluster) -> None:
    """Wait until the head's dashboard answers, which Serve is deployed through."""

    def answers() -> bool:
        with contextlib.closing(socket.socket()) as probe:
            return probe.connect_ex((HEAD, cluster.dashboard_port)) == 0

    wait_until(answers, "Ray's dashboard answers")
