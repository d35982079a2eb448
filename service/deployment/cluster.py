"""The application on a Ray cluster that somebody else runs: by KubeRay, or `serve deploy`.

Every node needs the environment of `service.cluster_env`, and the files that are named
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


def build(args: ClusterArgs) -> serve.Application:
    """The application, as `import_path: service.deployment.cluster:build`. Raises ConfigError."""
    config = (
        load_config(args.config)
        if isinstance(args.config, Path)
        else read_config(args.config, "the Serve config's args.config", Path("/"))
    )
    return application(config, args.secret, args.admin_key, host=None, placed=args.placed)
