"""A Ray cluster of two nodes and a Redis, each in a network namespace, that serves coe.

| node | what is on it |
| --- | --- |
| head | Ray's head and Serve's controller, HAProxy, a gateway, pools `here` and `both` |
| far | HAProxy, a gateway, pools `there` and `both` |
| store | Redis |
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psutil
import yaml

from loadtests.lib.child_processes import fetch, say
from loadtests.nodes.namespace_network import Namespace, Network, left_behind, network
from service.config import read_config
from service.launch.haproxy_config import write_wrapper
from service.launch.ray_environment import every_node
from service.rpc.cluster_secret import make_secret, read_secret

TENANT = "nodes"
KEY_ENV = "COE_NODES_KEY"
PORT = 8000
_GCS, _DASHBOARD, _REDIS = 6379, 8265, 6380
_HAPROXY_PAGES = (8404, 9101)
_BIN = Path(sys.executable).parent
_START_S = 150.0
_USABLE = ("device", "host", "disk")
_RESOURCES: Mapping[str, Mapping[str, float]] = {
    "head": {"coe-gateway": 1, "coe-pool-here": 1, "coe-pool-both": 1},
    "far": {"coe-gateway": 1, "coe-pool-there": 1, "coe-pool-both": 1},
}


def settings(redis_ip: str) -> dict[str, Any]:
    """Two gateways, an expert on each node, and one whose pool is on both."""
    simulated = {"engine": "simulated", "cpus": 0.1}
    speed = {"decode_ms": 20, "tokens": 8}
    return {
        "server": {"port": PORT, "drain_s": 5.0, "gateways": 2},
        "store": {"kind": "redis", "url": f"redis://{redis_ip}:{_REDIS}/0"},
        "tenants": {
            TENANT: {
                "requests_per_min": 1_000_000,
                "tokens_per_min": 1_000_000_000,
                "concurrent": 10_000,
                "budget": {"amount": 1_000_000_000, "period": "day"},
            }
        },
        "keys": {TENANT: {"tenant": TENANT, "key_env": KEY_ENV}},
        "experts": {
            name: {"model": "m", "categories": ["general"]} for name in ("here", "there", "both")
        },
        "pools": {
            "here": {**simulated, "experts": ["here"], "simulated": speed},
            "there": {**simulated, "experts": ["there"], "simulated": speed},
            "both": {**simulated, "experts": ["both"], "min_replicas": 2, "simulated": speed},
        },
    }


@dataclass
class NodeCluster:
    """The running cluster, and the means to hurt its nodes.

    Attributes:
        network: Its network.
        folder: Everything that it writes.
        key: A client's key.
        config: Its config.
        nodes: Its nodes, by name.
        durable: Whether Ray's state is in Redis, so that the head may restart.
        restarts: How often each node ended by itself and was started again.
    """

    network: Network
    folder: Path
    key: str
    config: dict[str, Any]
    nodes: dict[str, Namespace]
    durable: bool = False
    restarts: dict[str, int] = field(default_factory=dict)
    _ray: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def head(self) -> Namespace:
        """The node of Ray's head and the front door."""
        return self.nodes["head"]

    @property
    def far(self) -> Namespace:
        """The other node."""
        return self.nodes["far"]

    @property
    def admin_key(self) -> str:
        """The service's admin key."""
        return read_secret(self.folder / "admin_key")

    def start_node(self, name: str) -> None:
        """Start Ray on a node, as its supervisor would."""
        node = self.nodes[name]
        place = [f"--address={self.head.ip}:{_GCS}"]
        if name == "head":
            # Ray takes processes of the other node for a head that still runs here.
            (self.folder / "r" / "ray_current_cluster").unlink(missing_ok=True)
            place = [
                *("--head", f"--port={_GCS}", f"--temp-dir={self.folder / 'r'}"),
                *("--include-dashboard=true", f"--dashboard-host={node.ip}"),
                f"--dashboard-port={_DASHBOARD}",
            ]
        with open(self.folder / f"{name}.log", "ab") as log:
            self._ray[name] = subprocess.Popen(
                node.command(
                    *(str(_BIN / "ray"), "start", *place, "--block"),
                    *(f"--node-ip-address={node.ip}", "--num-cpus=2", "--num-gpus=0"),
                    "--object-store-memory=80000000",
                    f"--resources={json.dumps(dict(_RESOURCES[name]))}",
                ),
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_redis(self) -> None:
        """Start Redis on its node."""
        store = self.nodes["store"]
        subprocess.Popen(
            store.command(
                *("redis-server", "--port", str(_REDIS), "--bind", store.ip),
                *("--protected-mode", "no", "--save", "", "--dir", str(self.folder)),
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def environment(self, name: str) -> dict[str, str]:
        """Return a node's environment: that of `deploy/ray/node.env`, and HAProxy's own files."""
        server = read_config(self.config, "loadtests", Path("/")).server
        haproxy = self.folder / name[0]
        haproxy.mkdir(exist_ok=True)
        wrapper = write_wrapper(
            haproxy / "w", own_ports=_HAPROXY_PAGES, header_timeout_s=10, fallback_socket=None
        )
        own = {
            "BINARY_PATH": str(wrapper),
            "CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "SOCKET_PATH": str(haproxy / "a.sock"),
            "SERVER_STATE_BASE": str(haproxy),
            "SERVER_STATE_FILE": str(haproxy / "state"),
            "METRICS_SOCKET_PATH": str(haproxy / "m.sock"),
            "NBTHREAD": "1",
        }
        return (
            {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
            | every_node(server)
            | {f"RAY_SERVE_HAPROXY_{key}": value for key, value in own.items()}
            | {
                "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
                "PYTHONPATH": os.getcwd(),
                KEY_ENV: self.key,
            }
            | (
                {"RAY_REDIS_ADDRESS": f"{self.nodes['store'].ip}:{_REDIS}"}
                if self.durable and name == "head"
                else {}
            )
        )

    def deploy(self) -> None:
        """Deploy the service with `serve deploy`.

        Raises:
            RuntimeError: It failed.
        """
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config))
        arguments = {name: str(self.folder / name) for name in ("secret", "admin_key")}
        application = {
            "name": "coe",
            "route_prefix": "/",
            "import_path": "service.deployment.external_cluster_app:build",
            "args": {**arguments, "config": str(self.folder / "config.yaml"), "placed": True},
        }
        plan = self.folder / "serve.yaml"
        plan.write_text(
            yaml.safe_dump(
                {
                    "proxy_location": "EveryNode",
                    "http_options": {"host": "0.0.0.0", "port": PORT},
                    "applications": [application],
                }
            )
        )
        address = f"http://{self.head.ip}:{_DASHBOARD}"
        done = subprocess.run(
            self.head.command(str(_BIN / "serve"), "deploy", "--address", address, str(plan)),
            env=self.environment("head"),
            capture_output=True,
            text=True,
            check=False,
            timeout=_START_S,
        )
        if done.returncode != 0:
            raise RuntimeError(f"serve deploy: {done.stderr[-2000:]}")

    def shut_down(self) -> None:
        """Stop the service, as `serve shutdown` does, and leave Ray and Redis."""
        address = f"http://{self.head.ip}:{_DASHBOARD}"
        subprocess.run(
            self.head.command(str(_BIN / "serve"), "shutdown", "--yes", "--address", address),
            env=self.environment("head"),
            capture_output=True,
            check=False,
            timeout=_START_S,
        )
        door = self.head.ip
        wait_for("its end", lambda: "an answer" if fetch(PORT, "/", host=door)[0] else "")

    def kill(self, name: str) -> None:
        """Kill all processes of a node; its supervisor is gone as well."""
        ray = self._ray.pop(name)
        count = self.nodes[name].kill()
        ray.wait(10)
        say(f"{name}: killed {count} processes")

    def supervise(self) -> None:
        """Start nodes again that have ended by themselves."""
        for name, ray in list(self._ray.items()):
            if ray.poll() is not None:
                say(f"{name}: Ray ended by itself ({ray.returncode}), and is started again")
                self.restarts[name] = self.restarts.get(name, 0) + 1
                # What it could not end itself, a supervisor's control group would end.
                self.nodes[name].kill()
                self.start_node(name)

    def pools(self) -> int:
        """Return how many pools the gateway knows that knows the fewest."""
        return int(min((value for _, value in self._samples("coe_pools", "head")), default=0.0))

    def requests_by_gateway(self, node: str) -> dict[str, float]:
        """Return how many requests each gateway has ended, by its id, as a node's door tells."""
        found: dict[str, float] = {}
        for labels, value in self._samples("coe_requests_total", node):
            gateway = labels.partition('gateway="')[2].partition('"')[0]
            found[gateway] = found.get(gateway, 0.0) + value
        return found

    def metric(self, name: str, node: str = "head") -> float:
        """Return the sum of a metric's samples of all gateways and pools; -1: nobody answers."""
        samples = self._samples(name, node)
        return sum(value for _, value in samples) if samples else -1.0

    def _samples(self, name: str, node: str) -> list[tuple[str, float]]:
        """Return the labels and values of a metric's samples; none where nobody answers."""
        _, body = fetch(PORT, "/metrics", admin_key=self.admin_key, host=self.nodes[node].ip)
        starts = (name + " ", name + "{")
        lines = [line for line in body.decode().splitlines() if line.startswith(starts)]
        return [(head, float(value)) for head, _, value in (line.rpartition(" ") for line in lines)]

    def lacks(self) -> str:
        """Return what is missing of four known pools and three usable experts; empty: nothing."""
        status, body = fetch(PORT, "/ready", admin_key=self.admin_key, host=self.head.ip)
        if status != 200:
            return f"/ready answers {status}"
        experts = orjson.loads(body)["experts"].items()
        lost = [name for name, state in experts if state["state"] not in _USABLE]
        if lost:
            return f"experts {', '.join(lost)}"
        return "" if (pools := self.pools()) == 4 else f"pools: {pools} of 4"

    def log(self) -> str:
        """Return the end of what the nodes have written."""
        return "\n".join(
            path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.log")
        )


def wait_for(what: str, lacks: Callable[[], str]) -> None:
    """Wait until nothing is lacking.

    Raises:
        RuntimeError: Something still is after 150 s.
    """
    end_s = time.monotonic() + _START_S
    while missing := lacks():
        if time.monotonic() > end_s:
            raise RuntimeError(f"{what}: not within {_START_S:g} s ({missing})")
        time.sleep(0.25)


@contextmanager
def node_cluster(*, durable: bool = False) -> Iterator[NodeCluster]:
    """The cluster, serving. Everything of it is gone at the end.

    Args:
        durable: See `NodeCluster`.

    Raises:
        RuntimeError: It can't be built here, or did not start.
    """
    if shutil.which("redis-server") is None:
        raise RuntimeError("this machine has no redis-server")
    folder = Path(tempfile.mkdtemp(prefix="nd-", dir="/tmp"))  # short: sockets are below it
    try:
        with network() as made:
            nodes = {name: made.add(letter) for name, letter in _LETTERS.items()}
            config = settings(nodes["store"].ip)
            key = "coe-" + secrets.token_urlsafe(32)
            cluster = NodeCluster(made, folder, key, config, nodes, durable)
            for name in ("token", "secret", "admin_key"):
                make_secret(folder / name)
            try:
                _start(cluster)
                yield cluster
            except RuntimeError:
                sys.stderr.write(cluster.log())
                raise
        if left := left_behind(made):
            raise RuntimeError(f"left behind: {', '.join(left)}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_LETTERS = {"head": "h", "far": "f", "store": "s"}


def _start(cluster: NodeCluster) -> None:
    began_s = time.monotonic()
    cluster.start_redis()
    cluster.start_node("head")
    ray = cluster.head.ip
    wait_for("Ray", lambda: "" if fetch(_DASHBOARD, "/", host=ray)[0] else "its dashboard")
    cluster.start_node("far")
    cluster.deploy()
    wait_for("the service", cluster.lacks)
    say(f"two nodes serve after {time.monotonic() - began_s:.0f} s")


def resident_mib(spaces: Mapping[str, Namespace]) -> dict[str, int]:
    """Return the memory of each node's processes, in MiB."""
    found = {}
    for name, space in spaces.items():
        total = 0
        for process in space.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        found[name] = round(total / 2**20)
    return found
