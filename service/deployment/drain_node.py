"""Drains a Ray node; a pod runs this before it stops.

    python -m service.deployment.drain_node --within 55

It reports the node as draining and waits until the node has no replicas. Serve starts replacements
on other nodes if there is room, takes this node's replicas out of service, and lets their requests
end.
"""

from __future__ import annotations

import os
import sys
import time

import click
import psutil
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # of the compiled module
from ray.core.generated import autoscaler_pb2

_REPLICA = "ray::ServeReplica:"
_POLL_S = 0.25
_ALIVE = 0  # GcsNodeInfo.state


@click.command()
@click.option(
    "--within", "within_s", type=click.IntRange(1), required=True, help="Time limit in s."
)
@click.option("--address", help="Ray's address. Default: $RAY_ADDRESS.")
@click.option("--node-ip", help="This node's address. Default: the one that Ray finds.")
def main(within_s: int, address: str | None, node_ip: str | None) -> None:
    """Take this Ray node out of service, and wait until its replicas have ended."""
    drain(address or os.environ["RAY_ADDRESS"], node_ip or ray.util.get_node_ip_address(), within_s)


def drain(address: str, node_ip: str, within_s: float) -> None:
    """Drain the node with this address; exits with status 1 if Ray refuses or is not there."""
    end_s = time.monotonic() + within_s
    gcs = GcsClient(address=address)
    here = {
        node_id: info.start_time_ms
        for node_id, info in gcs.get_all_node_info(timeout=10).items()
        if info.node_manager_address == node_ip and info.state == _ALIVE
    }
    if not here:
        sys.exit(f"no Ray node at {node_ip}")
    # The youngest one: Ray may not know yet that an earlier node at this address is gone.
    node = max(here, key=lambda node_id: here[node_id])
    accepted, reason = gcs.drain_node(
        node.hex(),
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the node is stopping",
        int((time.time() + within_s) * 1000),
    )
    if not accepted:
        sys.exit(f"Ray refuses to drain the node: {reason}")
    while time.monotonic() < end_s and _replicas(node_ip):
        time.sleep(_POLL_S)


def _replicas(node_ip: str) -> list[psutil.Process]:
    """Return the replicas on the node: the children of its raylet."""
    found = []
    for process in psutil.process_iter():
        try:
            if f"--node_ip_address={node_ip}" in process.cmdline():
                children = process.children()
                found += [child for child in children if _title(child).startswith(_REPLICA)]
        except psutil.Error:
            continue
    return found


def _title(process: psutil.Process) -> str:
    try:
        return process.cmdline()[0]
    except (psutil.Error, IndexError):
        return ""


if __name__ == "__main__":
    main()
