"""Whether a machine has the accelerators that a config's pools ask for. Pure."""

from __future__ import annotations

from service.config import Config
from service.errors import ConfigError


def check_gpus(config: Config, have: float) -> None:
    """Hold the pools against this machine's GPUs: none come later, and Ray would wait for ever.

    Raises ConfigError.
    """
    found = f"Ray finds {have:g} on this machine" if have else "Ray finds none on this machine"
    hint = "nvidia-smi tells what its driver sees"
    for kind, pool in config.pools.items():
        if pool.gpus > have:
            raise ConfigError(
                f"pools.{kind}.gpus: a replica asks for {pool.gpus:g}, and {found} ({hint})"
            )
    always = sum(pool.gpus * pool.min_replicas for pool in config.pools.values())
    if always > have:
        raise ConfigError(f"pools: their replicas ask for {always:g} GPUs, and {found} ({hint})")
