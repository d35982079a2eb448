"""The environment that Ray Serve and HAProxy read when they are imported or started.

To be prepared before `service.deployment` is imported.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from service.link.secret import make_secret


def prepare(run_dir: Path, drain_s: float) -> None:
    """Set the variables for a cluster of our own on this machine, with its files in `run_dir`."""
    haproxy = run_dir / "haproxy"
    haproxy.mkdir(parents=True, exist_ok=True)
    stats, metrics = _free_ports(2)
    # Ray listens on every interface of this machine. Whoever has no token gets nothing.
    make_secret(run_dir / "ray-token")
    os.environ.update(
        {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
            # Two services on one machine must not fight for these.
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(int(drain_s) + 5),
            # Serve waits this long at least before it stops a gateway, for load
            # balancers to notice; ours is told at once.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
            # An engine core must not outlive the replica that started it.
            "RAY_process_group_cleanup_enabled": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(run_dir / "ray-token"),
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
    )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
