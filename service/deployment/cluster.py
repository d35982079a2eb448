"""The application on a Ray cluster that somebody else runs: by KubeRay, or `serve deploy`.

Every node needs the environment of `service.launch.environment`, and the files that are named
here: a pool or gateway reads the secrets where it runs. Secrets never stand in a
Serve config, because Ray shows those.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from service.config import load_config, read_config
from service.deployment.application import application


class ClusterArgs(BaseModel):
    """What a Serve config says about the application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: Path | dict[str, Any] = Field(
        description="The config file, the same on every node; or its content, so that a change "
        "of it is a change of the Serve config, which Serve then rolls out."
    )
    secret: Path = Field(description="File with the cluster's secret, on every node.")
    admin_key: Path = Field(description="File with the admin key, on nodes with gateways.")
    placed: bool = Field(
        True,
        description="Gateways run only on nodes with the Ray resource coe-gateway, pools only "
        "on those with coe-pool-KIND, one replica per unit of it.",
    )


def build(args: dict[str, Any]) -> serve.Application:
    """The application, as `import_path: service.deployment.cluster:build`.

    `args`: see ClusterArgs. Raises pydantic's ValidationError and ConfigError, which Serve tells.
    """
    told = ClusterArgs.model_validate(args)
    config = (
        load_config(told.config)
        if isinstance(told.config, Path)
        else read_config(told.config, "the Serve config's args.config", Path("/"))
    )
    # Whoever runs the cluster says where it listens: never on its nodes' loopback.
    server = config.server.model_copy(update={"host": "0.0.0.0"})
    config = config.model_copy(update={"server": server})
    return application(config, told.secret, told.admin_key, host=None, placed=told.placed)
