"""The environment that Ray Serve and HAProxy read when they are imported or started.

To be prepared before `service.deployment` is imported.
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
from service.launch.haproxy import write_wrapper
from service.rpc.auth import make_secret

# Serve's own range for the ports of gateways; each cluster on a machine takes a
# stretch of it for itself.
_GATEWAY_PORTS = range(30000, 31000)
_STRETCH = 20
_CONNECTIONS = 4096


def prepare(run_dir: Path, server: ServerConfig, lobby: Path) -> None:
    """Set the variables for a cluster of our own on this machine, with its files in `run_dir`.

    HAProxy listens where the config says; its own pages, and the gateways behind it, on loopback.
    `lobby`: the Unix socket that answers what no gateway can.
    """
    haproxy = run_dir / "haproxy"
    haproxy.mkdir(parents=True, exist_ok=True)
    stats, metrics, fallback, fallback_grpc = _free_ports(4)
    first = _free_stretch()
    wrapper = write_wrapper(
        haproxy,
        host=server.host,
        own_ports=(stats, metrics),
        header_timeout_s=server.limits.header_timeout_s,
        lobby=lobby,
    )
    if os.access(wrapper, os.X_OK):  # not where the folder forbids programs
        os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(wrapper)
    # Ray listens on every interface of this machine. Whoever has no token gets nothing.
    make_secret(run_dir / "ray-token")
    os.environ.update(
        every_node(server)
        | {
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
            # Two services on one machine must not fight for these.
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            # Where HAProxy sends requests while no gateway is up. Serve's proxies share their
            # ports, so that with the default one service's requests would reach another's.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
            "RAY_SERVE_HAPROXY_MAXCONN": str(_connections()),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _STRETCH),
            "RAY_AUTH_TOKEN_PATH": str(run_dir / "ray-token"),
        }
    )


def every_node(server: ServerConfig) -> dict[str, str]:
    """What every node of a cluster needs in its environment before Ray starts there.

    `deploy/ray/node.env` holds it for clusters that others start.
    """
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(int(server.drain_s) + 5),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(_GATEWAY_PORTS.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(_GATEWAY_PORTS.stop),
        # Serve waits this long at least before it stops a gateway, for load
        # balancers to notice; ours is told at once.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
        # A client that neither sends nor reads: its connection is closed then, and
        # the gateway notices. A stream that is quiet on our side is left alone.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(math.ceil(server.limits.stall_timeout_s)),
        # Three looks in vain and HAProxy is started again.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.25",
        # An engine core must not outlive the replica that started it.
        "RAY_process_group_cleanup_enabled": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray would run its workers at niceness 15, and so our engines.
        "RAY_worker_niceness": "0",
        # How soon autoscaling hears of queued work.
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _connections() -> int:
    """How many HAProxy may have open: it ends at once where its files would be over the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return _CONNECTIONS
    # Two files each, and some 2,100 for checks and threads at Serve's own 4,096.
    return max(100, min(_CONNECTIONS, int((hard - 200) / 2.6)))


def _free_stretch() -> int:
    """The first of 20 ports that nobody listens on, so that no two clusters share any."""
    starts = list(_GATEWAY_PORTS[::_STRETCH])
    random.shuffle(starts)
    for start in starts:
        if all(map(_is_free, range(start, start + _STRETCH))):
            return start
    raise CoeError(f"no {_STRETCH} free ports together in {_GATEWAY_PORTS.start}-30999")


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
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


_HEAD = """\
# The environment of every node of a Ray cluster that serves coe, before `ray start` and for
# `serve deploy`: Ray Serve reads it when it is imported. HARD_STOP_AFTER_S and TIMEOUT_CLIENT_S
# come from server.drain_s and server.limits.stall_timeout_s: here the defaults.
#   set -a; . deploy/ray/node.env; set +a
# Written by `python -m service.launch.environment >deploy/ray/node.env`.
"""


def node_env() -> str:
    """The text of `deploy/ray/node.env`."""
    told = every_node(ServerConfig())
    return _HEAD + "".join(f"{name}={value}\n" for name, value in told.items())


if __name__ == "__main__":
    print(node_env(), end="")
