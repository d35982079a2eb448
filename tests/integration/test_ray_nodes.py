"""A Ray cluster of two nodes on this machine, with `serve deploy` and the sample of deploy/ray.

One pool on each node, and the gateway on the head's. Simulated engines. The tests follow
each other: one node is killed, comes back, and leaves in order.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import yaml

from service.rpc.cluster_secret import make_secret
from tests.support.coe_serve_process import free_port, wait_until
from tests.support.ray_cluster import HEAD, ROOT, RayCluster, ray_cluster, up

pytestmark = pytest.mark.cluster

OTHER = "127.0.0.12"
POOL = {"engine": "simulated", "cpus": 0.1, "simulated": {"decode_ms": 20, "tokens": 10}}
CONFIG = {
    "server": {"drain_s": 20, "allow_unauthenticated": True},  # asks for no keys
    "experts": {"general": {"model": "m", "categories": ["general"]}},
    "pools": {"here": POOL, "there": POOL},
}


class Client:
    """Asks the service; without any retry of its own."""

    def __init__(self, port: int) -> None:
        self._port = port

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON, or 0 where nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        except (OSError, ValueError):
            return 0, None
        finally:
            connection.close()

    def pools(self) -> int:
        """Pools that the gateway knows of."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
            return int(
                next(
                    (
                        float(line.split()[-1])
                        for line in text.splitlines()
                        if line.startswith("coe_pools")
                    ),
                    0,
                )
            )
        except OSError:
            return 0
        finally:
            connection.close()

    def ask(self, tokens: int, *, stream: bool = False) -> tuple[int, str]:
        """Status and body of a chat."""
        words = [{"role": "user", "content": "hello"}]
        body = {"model": "auto", "messages": words, "max_tokens": tokens, "stream": stream}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            headers = {"content-type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Two nodes."""
    with ray_cluster() as running:
        running.start(HEAD, {"coe-gateway": 1, "coe-pool-here": 1})
        up(running)
        running.start(OTHER, {"coe-pool-there": 1})
        yield running


@pytest.fixture(scope="module")
def client(cluster: RayCluster) -> Client:
    """The service, deployed with the sample config, its paths and its port changed."""
    (cluster.folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    data = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
    port = free_port()
    data["http_options"] = {"host": "127.0.0.1", "port": port}
    arguments = data["applications"][0]["args"]
    arguments["config"] = str(cluster.folder / "config.yaml")
    for name in ("secret", "admin_key"):
        arguments[name] = str(cluster.folder / name)
        make_secret(cluster.folder / name)
    (cluster.folder / "serve.yaml").write_text(yaml.safe_dump(data))
    dashboard = f"http://{HEAD}:{cluster.dashboard_port}"
    ran = cluster.run("serve", "deploy", "--address", dashboard, str(cluster.folder / "serve.yaml"))
    assert ran.returncode == 0, ran.stderr
    made = Client(port)
    wait_until(lambda: made.get("/ready")[0] == 200, "an expert answers")
    wait_until(lambda: made.pools() == 2, "the gateway knows of both pools")
    return made


def test_ray_nodes_run_the_wrapped_haproxy(cluster: RayCluster, client: Client) -> None:
    """The wrapper has changed its configuration: own pages on loopback, our faults."""
    (path,) = (cluster.folder / "h").rglob("haproxy.cfg")
    text = path.read_text()
    assert "# limits of coe" in text
    for name in ("STATS", "METRICS"):
        port = cluster.environment[f"RAY_SERVE_HAPROXY_{name}_PORT"]
        assert f"bind 127.0.0.1:{port}" in text
        assert f"*:{port}" not in text
    assert client.get("/health")[0] == 200


def listening(cluster: RayCluster, ip: str) -> set[str]:
    """The addresses on which a node's pools listen."""
    found = set()
    for process in cluster.processes(ip):
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.Error:
            continue
        found |= {
            connection.laddr.ip
            for connection in connections
            if connection.status == psutil.CONN_LISTEN and 31100 <= connection.laddr.port < 32000
        }
    return found


def test_ray_pools_listen_on_their_own_node_s_address(cluster: RayCluster, client: Client) -> None:
    assert client.ask(3)[0] == 200
    assert listening(cluster, HEAD) == {HEAD}
    assert listening(cluster, OTHER) == {OTHER}


def test_ray_traffic_continues_when_a_pool_s_node_is_killed(
    cluster: RayCluster, client: Client
) -> None:
    answered: list[int] = []
    killed_after: list[int] = []
    end = threading.Event()

    def go_on() -> None:
        while not end.is_set():
            status, body = client.ask(5)
            assert status == 200, body
            answered.append(status)

    with ThreadPoolExecutor(6) as threads:
        running = [threads.submit(go_on) for _ in range(6)]
        try:
            wait_until(lambda: len(answered) > 30, "requests are answered")
            cluster.kill(OTHER)
            killed_after.append(len(answered))
            wait_until(lambda: client.pools() == 1, "the gateway has noticed")
            noticed = len(answered)
            wait_until(lambda: len(answered) > noticed + 30, "requests are answered")
        finally:
            end.set()
        for item in running:
            item.result()
    assert answered[killed_after[0] :]


def test_ray_node_that_returns_is_used_again(cluster: RayCluster, client: Client) -> None:
    cluster.start(OTHER, {"coe-pool-there": 1})
    wait_until(lambda: client.pools() == 2, "its pool is there again")
    assert listening(cluster, OTHER) == {OTHER}


def test_ray_node_drains_without_cutting_a_stream(cluster: RayCluster, client: Client) -> None:
    tokens = 300  # six seconds
    with ThreadPoolExecutor(8) as threads:
        streams = [threads.submit(client.ask, tokens, stream=True) for _ in range(8)]
        began_s = time.monotonic()
        wait_until(lambda: busy(client) == 8, "all are running")
        ran = cluster.run(
            "python", "-m", "service.deployment.drain_node", "--within", "40", "--node-ip", OTHER
        )
        took_s = time.monotonic() - began_s
        assert ran.returncode == 0, ran.stderr
        for stream in streams:
            status, body = stream.result()
            assert status == 200
            assert body.rstrip().endswith("data: [DONE]")
            assert body.count('"content"') >= tokens
    assert took_s < 40
    assert listening(cluster, OTHER) == set()
    assert client.ask(3)[0] == 200


def busy(client: Client) -> int:
    """Requests that run in pools now."""
    connection = http.client.HTTPConnection("127.0.0.1", client._port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    lines = [line for line in text.splitlines() if line.startswith("coe_requests_running{")]
    return int(sum(float(line.split()[-1]) for line in lines))
