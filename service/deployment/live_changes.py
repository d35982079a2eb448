"""What a change of the config means for a running service: live, by new replicas, or a restart.

Pure, but for the files of the models that `share_weights` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from service.config import Config, PoolConfig
from service.deployment.gpu_check import check_gpus
from service.errors import ConfigError
from service.pool.same_weight_experts import share_weights

# Sections that may change while the service runs.
_LIVE = frozenset(
    {
        "added_experts",
        "budgets",
        "categories",
        "experts",
        "keys",
        "pools",
        "recipes",
        "router",
        "savings",
        "shadow",
        "tenants",
    }
)
# Keys of a pool that its replicas, or Ray Serve, change while the replicas run.
_LIVE_OF_POOL = frozenset({"experts", "swap", "min_replicas", "max_replicas", "autoscaling"})
# Of these, the keys that are Ray Serve's.
_SERVE_OF_POOL = frozenset({"min_replicas", "max_replicas", "autoscaling"})


@dataclass(frozen=True, slots=True)
class PoolChanges:
    """What becomes of the kinds of pools.

    Attributes:
        added: New kinds.
        removed: Kinds that drain and end.
        replaced: Kinds whose replicas drain and are replaced, with the keys that need it.
        scaled: Kinds whose number of replicas, or the rule for it, is another one.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scaled: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != PoolChanges()

    def sentences(self) -> list[str]:
        """Return what happens, a sentence for each kind of change."""
        found = []
        if self.added:
            found.append(f"new pools start: {', '.join(self.added)}")
        if self.removed:
            found.append(f"pools drain and end: {', '.join(self.removed)}")
        for kind, keys in self.replaced.items():
            found.append(f"replicas of {kind} drain and are replaced: {', '.join(keys)} changed")
        if self.scaled:
            found.append(f"other numbers of replicas: {', '.join(self.scaled)}")
        return found


def pool_changes(old: Config, new: Config) -> PoolChanges:
    """Return what becomes of the kinds of pools when a config replaces another."""
    both = [kind for kind in new.pools if kind in old.pools]
    replaced = {kind: keys for kind in both if (keys := _replacing(old, new, kind))}
    return PoolChanges(
        added=tuple(kind for kind in new.pools if kind not in old.pools),
        removed=tuple(kind for kind in old.pools if kind not in new.pools),
        replaced=replaced,
        scaled=tuple(
            kind
            for kind in both
            if kind not in replaced
            and _differing(old.pools[kind], new.pools[kind]) & _SERVE_OF_POOL
        ),
    )


def _replacing(old: Config, new: Config, kind: str) -> tuple[str, ...]:
    """Return the keys of a kind whose change needs other replicas."""
    before, after = old.pools[kind], new.pools[kind]
    keys = _differing(before, after) - _LIVE_OF_POOL
    slots = after.slots
    if not keys and slots is not None:
        # Engines of one expert each do not become slots in which experts take turns.
        held, wanted = (share_weights(one, kind).config.groups(kind) for one in (old, new))
        if len(held) <= slots < len(wanted):
            keys = {"experts"}
    return tuple(sorted(keys))


def fixed_sections(old: Config, new: Config) -> tuple[str, ...]:
    """Return the sections whose change needs a restart of the whole service."""
    return tuple(sorted(_differing(old, new) - _LIVE))


def check_fixed(old: Config, new: Config) -> None:
    """Refuse changes that need a restart of the whole service.

    Raises:
        ConfigError: Names the first such section.
    """
    for name in fixed_sections(old, new):
        raise ConfigError(f"{name}: can't be changed while the service runs; restart it")


def check_resources(config: Config, have: Mapping[str, float]) -> None:
    """Check that Ray has the GPUs and CPUs of the pools; else new replicas would wait for ever.

    Args:
        config: The config.
        have: Ray's resources, as `ray.cluster_resources` tells them.

    Raises:
        ConfigError: They are too few.
    """
    check_gpus(config, have.get("GPU", 0.0))
    needed = sum(pool.cpus * pool.most_replicas for pool in config.pools.values())
    if needed > (cpus := have.get("CPU", 0.0)):
        raise ConfigError(
            f"pools: their cpus add up to {needed:g}, and Ray was started with {cpus:g}, which is "
            "enough for the pools at the start; lower pools.KIND.cpus, or restart the service"
        )


def _differing(old: Config | PoolConfig, new: Config | PoolConfig) -> set[str]:
    fields = type(old).model_fields
    return {name for name in fields if getattr(old, name) != getattr(new, name)}
