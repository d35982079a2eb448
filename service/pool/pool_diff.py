"""The difference between the units of a pool and those that its config wants. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from service.config import Config


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """The sources of an expert's answers: its settings and its files.

    Attributes:
        parts: The settings that change its answers.
        version: The version of its files; empty where the files can't be read.
    """

    parts: tuple[Any, ...]
    version: str

    def matches(self, other: ExpertSource) -> bool:
        """Return whether both describe the same expert. Unreadable files count as unchanged."""
        both_known = self.version and other.version
        return self.parts == other.parts and (not both_known or self.version == other.version)

    def updated(self, other: ExpertSource) -> ExpertSource:
        """Return the same expert with the newest known version of its files."""
        return other if other.version else self


@dataclass(frozen=True, slots=True)
class UnitSource:
    """A unit of a config.

    Attributes:
        experts: Its experts by name. The expert with the weights comes first.
        needs: The unit on whose weights it runs, or None where it has its own weights.
    """

    experts: dict[str, ExpertSource]
    needs: str | None = None

    def matches(self, other: UnitSource) -> bool:
        """Return whether both units have the same experts."""
        return self.experts.keys() == other.experts.keys() and all(
            source.matches(other.experts[name]) for name, source in self.experts.items()
        )

    def copy(self) -> UnitSource:
        """Return a copy whose experts can be changed independently."""
        return UnitSource(dict(self.experts), self.needs)


@dataclass(frozen=True, slots=True)
class PoolDiff:
    """The changes that a reload has to make. All other units keep serving.

    Attributes:
        added: Units to add.
        changed: Units to remove and to add again as the new config describes them.
        removed: Units to remove for good.
        restarts: The changed units whose engine restarts only because of adapters, each with the
            reason.
    """

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    restarts: dict[str, str] = field(default_factory=dict)

    @property
    def leaving(self) -> tuple[str, ...]:
        """The units to remove, whether or not they are added again."""
        return (*self.removed, *self.changed)

    @classmethod
    def between(
        cls,
        present: Mapping[str, UnitSource],
        wanted: Mapping[str, UnitSource],
        *,
        leaving: Collection[str],
        shared: Collection[str],
        with_adapters: Collection[str],
    ) -> PoolDiff:
        """Compare the units of a pool with those that its config wants.

        Args:
            present: The units of the pool.
            wanted: The units of the config.
            leaving: Units that are already being removed.
            shared: Units in a slot that can be shared.
            with_adapters: Units whose engine was started with adapters, so that it can load others.
        """
        bases = {unit.needs for unit in wanted.values()}
        restarts: dict[str, str] = {}
        changed = {}
        for name, unit in present.items():
            target = wanted.get(name)
            if target is None or name in leaving:
                continue
            if not unit.experts[name].matches(target.experts[name]):
                changed[name] = True
            elif name in shared:
                if not unit.matches(target):
                    changed[name] = True
                    restarts[name] = "it shares a slot, and its adapters changed"
            elif name in bases:
                # The engine was not built to be shared with the virtual experts that are added.
                changed[name] = True
            elif len(target.experts) > 1 and name not in with_adapters:
                changed[name] = True
                came = ", ".join(expert for expert in target.experts if expert not in unit.experts)
                restarts[name] = f"it was started without adapters, and {came} came"
        removed = [name for name in present if name not in wanted and name not in leaving]
        # A unit must not stay when the weights it runs on are removed.
        for name, unit in present.items():
            is_new = name not in leaving and name not in changed and name not in removed
            if is_new and (unit.needs in changed or unit.needs in removed):
                if name in wanted:
                    changed[name] = True
                else:
                    removed.append(name)
        added = tuple(name for name in wanted if name not in present)
        return cls(added, tuple(changed), tuple(removed), restarts)


def units_of(
    config: Config, kind: str, profiles: Mapping[str, str], versions: Mapping[str, str]
) -> dict[str, UnitSource]:
    """Return the units of a pool's config, with the sources of their experts.

    Args:
        config: The config.
        kind: The pool's name in the config.
        profiles: Digests of steering profiles, by expert.
        versions: Versions of the experts' files, by expert.

    Returns:
        The units by name.
    """
    units = {}
    for unit in config.units(kind):
        first = config.experts[unit[0]]
        # Other kernels need another engine, so they count as another source.
        kernels = first.vllm if first.base is None else config.experts[first.base].vllm
        experts = {}
        for name in unit:
            expert = config.experts[name]
            base = config.experts[expert.base].model if expert.base is not None else None
            folders = (expert.model, expert.base, base, expert.adapter, expert.profile)
            pooling_runner = config.uses_pooling_runner(unit[0])
            options = (profiles.get(name), expert.form, expert.strength, kernels, pooling_runner)
            parts = (*folders, *options, expert.command)
            experts[name] = ExpertSource(parts, versions.get(name, ""))
        units[unit[0]] = UnitSource(experts, config.needs(unit[0]))
    return units
