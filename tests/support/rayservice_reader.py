"""Prints Ray's own reading of RayService specs (JSON on standard input, by name) as JSON.

A process of its own, because importing Ray Serve takes settings from the environment.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml


def main() -> None:
    """Print the deployments' resources, and the groups as the autoscaler sees them."""
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr as derive,
    )
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call
    from ray.serve._private.build_app import build_app
    from ray.serve.schema import ServeDeploySchema

    from service.deployment.external_cluster_app import build

    def read(spec: dict[str, Any]) -> dict[str, Any]:
        serve_config = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
        (application,) = serve_config.applications
        assert application.import_path == f"{build.__module__}:{build.__name__}"
        built = build_app(call(build, application.args), name="coe")
        deployments = {
            deployment.name: deployment.ray_actor_options.get("resources", {})
            for deployment in built.deployments
        }
        cluster = {"metadata": {"name": "c", "namespace": "n"}, "spec": spec["rayClusterConfig"]}
        types = derive(cluster)["available_node_types"]
        return {"deployments": deployments, "groups": types}

    specs: dict[str, Any] = json.load(sys.stdin)
    json.dump({name: read(spec) for name, spec in specs.items()}, sys.stdout)


if __name__ == "__main__":
    main()
