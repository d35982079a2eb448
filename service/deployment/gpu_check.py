"""Checks a config's pools against the GPUs of a machine. Pure functions."""

from __future__ import annotations

from service.config import Config
from service.errors import ConfigError


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
