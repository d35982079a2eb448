"""Checks a config's pools against the GPUs and the torch of a machine. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable

from service.config import Config
from service.errors import ConfigError
from service.torch_build import TorchBuild, gpu_fault


def check_gpus(config: Config, have: float) -> None:
    """Check that this machine has the pools' GPUs; otherwise Ray would wait for them forever.

    Raises:
        ConfigError: A pool, or all pools together, need more than `have` GPUs.
    """
    found = f"Ray finds {have:g} on this machine" if have else "Ray finds none on this machine"
    hint = "nvidia-smi shows what its driver sees"
    for kind, pool in config.pools.items():
        if pool.gpus > have:
            raise ConfigError(
                f"pools.{kind}.gpus: a replica needs {pool.gpus:g}, and {found} ({hint})"
            )
    always = sum(pool.gpus * pool.min_replicas for pool in config.pools.values())
    if always > have:
        raise ConfigError(f"pools: their replicas need {always:g} GPUs, and {found} ({hint})")


def node_faults(config: Config, nodes: Iterable[float]) -> list[str]:
    """Return a line for each kind of pool of which no node can hold a replica.

    A replica is one process with all of its GPUs, whatever parallel sizes its engines have, so that
    it never spans nodes.

    Args:
        config: The config.
        nodes: The GPUs of each node. Nothing is known of a cluster where none has any, because its
            nodes with GPUs may start on demand.
    """
    most = max(nodes, default=0.0)
    return [
        f"pools.{kind}.gpus: a replica needs {pool.gpus:g} GPUs on one node, and the largest node "
        f"has {most:g}; its replica would wait for ever. Use smaller parallel sizes (vllm."
        "tensor_parallel_size, vllm.args.pipeline_parallel_size, vllm.args.data_parallel_size), "
        "and more replicas for more load"
        for kind, pool in config.pools.items()
        if 0 < most < pool.gpus
    ]


def check_nodes(config: Config, nodes: Iterable[float]) -> None:
    """Check that some node of a cluster can hold a replica of each kind of pool.

    Args:
        config: The config.
        nodes: The GPUs of each node, as for `node_faults`.

    Raises:
        ConfigError: No node has a pool's GPUs.
    """
    if faults := node_faults(config, nodes):
        raise ConfigError("; ".join(faults))


def check_torch(config: Config, build: TorchBuild | None) -> None:
    """Check that the installed torch can use a GPU where a pool has one.

    Args:
        config: The config.
        build: The installed torch. None is left to the engines, which need one.

    Raises:
        ConfigError: A pool with real engines has GPUs, and torch was built for the CPU.
    """
    fault = gpu_fault(build)
    for kind, pool in config.pools.items():
        if fault and pool.gpus > 0 and pool.engine == "vllm":
            raise ConfigError(f"pools.{kind}.gpus: {pool.gpus:g}, but {fault}")
