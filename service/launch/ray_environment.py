"""Environment variables that Ray Serve and HAProxy read when they are imported or started.

Set them before importing `service.deployment`.
"""

from __future__ import annotations

import math
import os
import random
import resource
import socket
from pathlib import Path

from service.config import ServerConfig
from service.errors import CoeError
from service.launch.haproxy_config import write_wrapper
from service.rpc.cluster_secret import make_secret

# Serve's default range for gateway ports. Each cluster on a machine takes a block of its own.
_GATEWAY_PORTS = range(30000, 31000)
_PORT_BLOCK = 20
_MAX_CONNECTIONS = 4096


def prepare(run_dir: Path, server: ServerConfig, fallback_socket: Path) -> None:
    """Set the variables for a cluster on this machine.

    HAProxy listens on the config's address; its own pages and the gateways listen on loopback.

    Args:
        run_dir: Folder for the cluster's files.
        server: Address, limits and drain time.
        fallback_socket: The Unix socket of the startup server, which answers while no gateway runs.
    """
    haproxy = run_dir / "haproxy"
    haproxy.mkdir(parents=True, exist_ok=True)
    stats, metrics, fallback, fallback_grpc = _free_ports(4)
    first = _free_port_block()
    wrapper = write_wrapper(
        haproxy,
        host=server.host,
        own_ports=(stats, metrics),
        header_timeout_s=server.limits.header_timeout_s,
        fallback_socket=fallback_socket,
    )
    if os.access(wrapper, os.X_OK):  # false where the folder is mounted noexec
        os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(wrapper)
    # Ray listens on every interface of this machine; a token protects it.
    make_secret(run_dir / "ray-token")
    os.environ.update(
        every_node(server)
        | {
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
            # Two services on one machine must not share these ports.
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            # HAProxy sends requests here while no gateway is up. Serve's proxies share ports, so
            # with the default one service's requests would reach another service.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
            "RAY_SERVE_HAPROXY_MAXCONN": str(_connections()),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _PORT_BLOCK),
            "RAY_AUTH_TOKEN_PATH": str(run_dir / "ray-token"),
        }
    )


def every_node(server: ServerConfig) -> dict[str, str]:
    """Return the variables that every node of a cluster needs before Ray starts there.

    `deploy/ray/node.env` holds them for clusters that are started by other means.
    """
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(int(_longest_drain_s(server)) + 5),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(_GATEWAY_PORTS.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(_GATEWAY_PORTS.stop),
        # Serve waits at least this long before it stops a gateway, so that load balancers
        # notice. HAProxy learns of it at once.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
        # HAProxy closes the connection of a client that neither sends nor reads, and the gateway
        # notices. It keeps streams on which the service is silent.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(math.ceil(server.limits.stall_timeout_s)),
        # A gateway's machine that does not answer a connect by then is down, and the request goes
        # to another one. Serve waits for 5 s, three times before it marks the gateway as down.
        "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": "2",
        # Serve restarts HAProxy after three failed checks.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.25",
        # Serve's counters are exported ten times a second by default, by idle processes as well.
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
        # An engine core must not outlive the replica that started it.
        "RAY_process_group_cleanup_enabled": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's default niceness of 15 would slow down the engines.
        "RAY_worker_niceness": "0",
        # Delays until autoscaling sees load: pushes of replicas and of handles in s, and the
        # interval of measurements as a part of the look-back period of 11 s.
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR": "0.05",
        "RAY_DEDUP_LOGS": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _longest_drain_s(server: ServerConfig) -> float:
    """Return how long streams may go on in an HAProxy whose gateways have changed, in s."""
    gateways = server.gateways
    return server.drain_s + (gateways.downscale_drain_s if gateways.scales else 0.0)


def _connections() -> int:
    """Return HAProxy's connection limit. HAProxy exits if it would exceed its open files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    # Two files per connection, and about 2,100 for checks and threads at Serve's default of 4,096.
    return max(100, min(_MAX_CONNECTIONS, int((hard - 200) / 2.6)))


def _free_port_block() -> int:
    """Return the first of 20 consecutive free ports, so that clusters share none."""
    starts = list(_GATEWAY_PORTS[::_PORT_BLOCK])
    random.shuffle(starts)
    for start in starts:
        if all(map(_is_free, range(start, start + _PORT_BLOCK))):
            return start
    raise CoeError(f"no {_PORT_BLOCK} consecutive free ports in {_GATEWAY_PORTS.start}-30999")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


_HEAD = """\
# The environment of every node of a Ray cluster that serves coe, before `ray start` and for
# `serve deploy`: Ray Serve reads it when it is imported. HARD_STOP_AFTER_S and TIMEOUT_CLIENT_S
# come from server.drain_s and server.limits.stall_timeout_s: here the defaults.
#   set -a; . deploy/ray/node.env; set +a
# Written by `python -m service.launch.ray_environment >deploy/ray/node.env`.
"""


def node_env() -> str:
    """Return the text of `deploy/ray/node.env`."""
    variables = every_node(ServerConfig())
    return _HEAD + "".join(f"{name}={value}\n" for name, value in variables.items())


if __name__ == "__main__":
    print(node_env(), end="")
