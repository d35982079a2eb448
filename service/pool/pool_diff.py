"""The difference between the units of a pool and those that its config wants. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from service.config import Config


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """What an expert is made of.

    Attributes:
        parts: The settings that decide its answers.
        version: The version of its files; empty where they can't be looked at.
    """

    parts: tuple[Any, ...]
    version: str

    def matches(self, other: ExpertSource) -> bool:
        """Whether it is the same expert. Files that can't be looked at count as unchanged."""
        both_known = self.version and other.version
        return self.parts == other.parts and (not both_known or self.version == other.version)

    def updated(self, other: ExpertSource) -> ExpertSource:
        """The same expert, with whichever version of its files is known."""
        return other if other.version else self


@dataclass(frozen=True, slots=True)
class UnitSource:
    """A unit of a config.

    Attributes:
        experts: Its experts, the one with the weights first.
        needs: The unit on whose weights it runs; None for one that has weights.
    """

    experts: dict[str, ExpertSource]
    needs: str | None = None

    def matches(self, other: UnitSource) -> bool:
        """Whether the same experts are in it."""
        return self.experts.keys() == other.experts.keys() and all(
            source.matches(other.experts[name]) for name, source in self.experts.items()
        )

    def copy(self) -> UnitSource:
        """A unit with the same experts, whose experts may come and go."""
        return UnitSource(dict(self.experts), self.needs)


@dataclass(frozen=True, slots=True)
class PoolDiff:
    """What a reload has to do. Units that are neither changed nor removed go on.

    Attributes:
        added: Units that come.
        changed: Units that go, and come again as the config wants them.
        removed: Units that go for good.
        restarts: Of the changed ones those whose engine starts again for the sake of adapters,
            with the reason.
    """

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    restarts: dict[str, str] = field(default_factory=dict)

    @property
    def leaving(self) -> tuple[str, ...]:
        """The units that go."""
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
            leaving: Units that go already.
            shared: Units in a slot that can be shared.
            with_adapters: Units whose engine was started with adapters, and takes others.
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
                # Its engine was not made to be shared with the virtual experts that come.
                changed[name] = True
            elif len(target.experts) > 1 and name not in with_adapters:
                changed[name] = True
                came = ", ".join(expert for expert in target.experts if expert not in unit.experts)
                restarts[name] = f"it was started without adapters, and {came} came"
        removed = [name for name in present if name not in wanted and name not in leaving]
        # No unit may stay that runs on weights which go.
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
    """The units of a pool's config, and what each of their experts is made of.

    Args:
        config: The config.
        kind: The pool's name in it.
        profiles: Digests of steering profiles, by expert.
        versions: Versions of the experts' files, by expert.
    """
    units = {}
    for unit in config.units(kind):
        first = config.experts[unit[0]]
        # The kernels that its engine computes with.
        kernels = first.vllm if first.base is None else config.experts[first.base].vllm
        experts = {}
        for name in unit:
            expert = config.experts[name]
            base = config.experts[expert.base].model if expert.base is not None else None
            folders = (expert.model, expert.base, base, expert.adapter, expert.profile)
            embeds = config.embeds(unit[0])
            options = (profiles.get(name), expert.form, expert.strength, kernels, embeds)
            experts[name] = ExpertSource((*folders, *options), versions.get(name, ""))
        units[unit[0]] = UnitSource(experts, config.needs(unit[0]))
    return units
