"""The application on an external Ray cluster, deployed by KubeRay or `serve deploy`.

Every node needs the environment of `service.launch.ray_environment` and the files that the
arguments name: a pool or gateway reads the secrets on its own node. A Serve config never holds
secrets, because Ray displays it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from service.config import load_config, read_config
from service.deployment.gpu_check import check_nodes, node_faults
from service.deployment.serve_application import application

log = logging.getLogger("coe.deployment")


class ClusterArgs(BaseModel):
    """Arguments of the application in a Serve config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: Path | dict[str, Any] = Field(
        description="The config file, the same on every node; or its content, so that Serve rolls "
        "out every change of it."
    )
    secret: Path = Field(description="File with the cluster's secret, on every node.")
    admin_key: Path = Field(description="File with the admin key, on nodes with gateways.")
    placed: bool = Field(
        True,
        description="Gateways run only on nodes with the Ray resource coe-gateway, and pools only "
        "on nodes with coe-pool-KIND; one replica per unit of the resource.",
    )
    nodes_may_join: bool = Field(
        False,
        description="Nodes with more GPUs than those that run may start on demand, so that a pool "
        "waits for one. Otherwise a pool that fits on no node is refused.",
    )


def build(args: dict[str, Any]) -> serve.Application:
    """Build the application for `import_path: service.deployment.external_cluster_app:build`.

    Args:
        args: Fields of `ClusterArgs`.

    Raises:
        ValidationError: The arguments are wrong; Serve reports it.
        ConfigError: The config is wrong, or no node can hold one of its pools; Serve reports it.
    """
    arguments = ClusterArgs.model_validate(args)
    config = (
        load_config(arguments.config)
        if isinstance(arguments.config, Path)
        else read_config(arguments.config, "the Serve config's args.config", Path("/"))
    )
    # The cluster's operator decides where it listens; loopback would be of no use.
    server = config.server.model_copy(update={"host": "0.0.0.0"})
    config = config.model_copy(update={"server": server})
    if ray.is_initialized():
        nodes = [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]
        if not arguments.nodes_may_join:
            check_nodes(config, nodes)
        for fault in node_faults(config, nodes):
            log.warning("%s", fault)
    return application(
        config, arguments.secret, arguments.admin_key, host=None, placed=arguments.placed
    )
