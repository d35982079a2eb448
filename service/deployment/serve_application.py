"""The Ray Serve application of a config: its deployments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from service.config import Config, PoolConfig
from service.deployment.replicas import GatewayReplica, PoolReplica
from service.deployment.serve_autoscaling import gateway_scaling, pool_scaling
from service.deployment.serve_pool_discovery import DiscoveryRequestRouter

APP = "coe"
# A gateway is never replaced while the service runs: whatever may change, it changes by itself.
_GATEWAY_VERSION = "1"
# Ray resources place replicas on nodes: a node has one unit of a resource for each replica that it
# may hold.
GATEWAY_RESOURCE = "coe-gateway"


def pool_resource(kind: str) -> str:
    """Return the Ray resource of nodes for pools of this kind."""
    return f"coe-pool-{kind}"


def application(
    config: Config,
    secret_path: Path,
    admin_key_path: Path,
    *,
    host: str | None,
    placed: bool = False,
    deployed: Mapping[str, DeployedPool] | None = None,
) -> serve.Application:
    """Build the Serve application of a config.

    Args:
        config: The composition.
        secret_path: File with the cluster's secret.
        admin_key_path: File with the admin key.
        host: Address that pools bind; None: their node's address.
        placed: Replicas run only on nodes with their resource (`GATEWAY_RESOURCE`,
            `pool_resource`).
        deployed: Where kinds of pools may change while the service runs: how each is deployed.
            None lets Serve replace every replica when the application is deployed again.
    """
    # Whether a key was set decides where the model's folder is asked, as for capabilities.
    config_json = config.model_dump_json(exclude_unset=True)
    pools = {
        kind: _pool_deployment(config, kind, placed, (deployed or {}).get(kind)).bind(
            config_json, kind, str(secret_path), host
        )
        for kind in config.pools
    }
    gateways = config.server.gateways
    scaling: dict[str, Any] = {"num_replicas": gateways.min_replicas}
    drain_s = config.server.drain_s
    if gateways.scales:
        scaling = {"autoscaling_config": gateway_scaling(gateways)}
        # `EndOfService` shortens this when the whole service stops.
        drain_s += gateways.downscale_drain_s
    gateway = serve.deployment(
        name="gateway",
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=drain_s + 2,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
        health_check_timeout_s=10,
        # Serve would write a line per request to disk; `server.access_log` replaces it.
        logging_config={"enable_access_log": False},
        ray_actor_options={
            "num_cpus": 0.1,
            "resources": {GATEWAY_RESOURCE: 1} if placed else {},
            "runtime_env": {"env_vars": _GATEWAY_ENVIRONMENT},
        },
        **scaling,
    )(GatewayReplica)
    if deployed is not None:
        gateway = with_version(gateway, _GATEWAY_VERSION)
    return gateway.bind(config_json, str(secret_path), str(admin_key_path), pools)


def with_version(deployment: serve.Deployment, version: str) -> serve.Deployment:
    """Return the deployment with a version. Serve keeps replicas whose version stays the same.

    Serve has no public way to say so: without a version, it replaces all replicas at each deploy.
    """
    return deployment.options(version=version, _internal=True)


@dataclass(frozen=True, slots=True)
class DeployedPool:
    """A kind of pool, as its present replicas were deployed.

    Attributes:
        version: Its version; another one replaces the replicas.
        config: The config that they began with. Their environment is made of it, as another
            environment would replace them, too.
    """

    version: str
    config: Config


def _pool_deployment(
    config: Config, kind: str, placed: bool, deployed: DeployedPool | None
) -> serve.Deployment:
    pool = config.pools[kind]
    scaling: dict[str, Any] = {"num_replicas": pool.min_replicas}
    drain_s = config.server.drain_s
    if pool.scales:
        scaling = {"autoscaling_config": pool_scaling(config, kind)}
    if pool.scales or deployed is not None:
        # `EndOfService` shortens this when the whole service stops.
        drain_s += pool.scaling.downscale_drain_s
    began = deployed.config if deployed is not None else config
    made: serve.Deployment = serve.deployment(
        name=f"pool-{kind}",
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=drain_s + 10,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
        # Importing vLLM holds the interpreter for seconds at a time.
        health_check_timeout_s=60,
        request_router_config=RequestRouterConfig(request_router_class=DiscoveryRequestRouter),
        ray_actor_options={
            "num_cpus": pool.cpus,
            "num_gpus": pool.gpus,
            "resources": {pool_resource(kind): 1} if placed else {},
            "runtime_env": {"env_vars": _pool_environment(began, pool)},
        },
        **scaling,
    )(PoolReplica)
    return made if deployed is None else with_version(made, deployed.version)


# Variables from which commands and examples read a key.
CLIENT_KEYS = frozenset({"COE_ADMIN_KEY", "COE_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"})

# Serve and the gateway share one event loop. A hop between two loops would cost a request more than
# all work of the gateway.
_GATEWAY_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "OMP_NUM_THREADS": "1",
}


def _pool_environment(config: Config, pool: PoolConfig) -> dict[str, str]:
    # Pools and their engines need no key from this machine's environment. Ray cannot remove a
    # variable, so it is emptied.
    environment = dict.fromkeys(sorted(config.key_variables | CLIENT_KEYS), "")
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Its own store of responses is a dictionary without bound that all tenants share.
        "VLLM_ENABLE_RESPONSES_API_STORE": "0",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if pool.gpus == 0:
        threads = str(pool.vllm.threads)
        environment |= {
            # Ray sets OMP's threads itself, and vLLM's own binding puts every
            # engine on the same core.
            "OMP_NUM_THREADS": threads,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
    return environment
