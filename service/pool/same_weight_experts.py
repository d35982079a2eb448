"""Experts that have the same weights, and the names under which a pool holds them.

Two experts have the same weights where they come from the same files by the same settings of the
engine: the same model; or the same adapter or profile of such a base, in the same form and
strength. A variant always has its base's weights. A pool holds such weights once, under a *held
name*, and translates the name of each call to it. The pool and its engines therefore know a config
in which each held name is one expert.

The held name is that of the first expert with the weights, and stays for as long as any expert has
them. A reload that removes this expert, or gives it other weights, leaves the others' weights where
they are. Other weights of that name are then held under a name that no expert can have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.config import Config, ExpertConfig
from service.errors import CoeError
from service.models.expert_folders import folder_here

# Names of experts have no tilde.
_MORE = "~"

Origin = tuple[object, ...]
FolderOf = Callable[[Config, str], str | None]


@dataclass(frozen=True, slots=True)
class WeightSharing:
    """The weights that a pool holds.

    Attributes:
        config: The config whose experts are the pool's weights, each once, by its held name.
            Remote experts stay.
        held: The held name of each of the pool's experts.
    """

    config: Config
    held: Mapping[str, str] = field(default_factory=dict)

    @property
    def shared(self) -> dict[str, str]:
        """The experts without weights of their own in the pool, each with the one that has them.

        That one is the first of the experts with the weights.
        """
        first: dict[str, str] = {}
        return {
            name: first[held]
            for name, held in self.held.items()
            if first.setdefault(held, name) != name
        }


def share_weights(
    config: Config,
    kind: str,
    before: Config | None = None,
    folder_of: FolderOf | None = None,
) -> WeightSharing:
    """Find the experts of a pool that have the same weights.

    Args:
        config: The config.
        kind: The pool's name in the config.
        before: The config of the weights that the pool holds already. They keep their names.
        folder_of: Returns where the full weights of an expert are, or None where that is unknown.
            By default, where they are on this machine.
    """
    origins = _Origins(config, kind, folder_of or _folder_here)
    groups: dict[Origin, list[str]] = {}
    for name in config.local_experts(kind):
        groups.setdefault(origins.of(name), []).append(name)
    held_before = _held_before(before, kind, folder_of or _folder_here, groups)
    names = dict(held_before)
    for origin, members in groups.items():
        if origin not in names:
            names[origin] = _free_name(members, names.values())
    held = {name: names[origin] for origin, members in groups.items() for name in members}
    experts = {name: one for name, one in config.experts.items() if one.remote is not None}
    for origin, members in groups.items():
        pinned = any(config.experts[name].pinned for name in members)
        own = held_before.get(origin)
        if own is not None and before is not None:
            # The same weights by the same settings: other words for them are no change.
            expert = before.experts[own]
        else:
            expert = config.experts[members[0]]
            base = held[expert.base] if expert.base is not None else None
            expert = expert.model_copy(update={"base": base})
        experts[names[origin]] = expert.model_copy(update={"pinned": pinned})
    pool = config.pools[kind]
    pools = {**config.pools, kind: pool.model_copy(update={"experts": tuple(names.values())})}
    ordered = {name: held[name] for name in config.experts if name in held}
    return WeightSharing(config.model_copy(update={"experts": experts, "pools": pools}), ordered)


def _held_before(
    before: Config | None, kind: str, folder_of: FolderOf, groups: Collection[Origin]
) -> dict[Origin, str]:
    """Return the names of weights that the pool holds already and goes on to hold."""
    if before is None:
        return {}
    origins = _Origins(before, kind, folder_of)
    found: dict[Origin, str] = {}
    for name in before.local_experts(kind):
        origin = origins.of(name)
        if origin in groups:
            found.setdefault(origin, name)
    # An expert on a base that is held under another name now is loaded anew.
    return {
        origin: name
        for origin, name in found.items()
        if (base := before.experts[name].base) is None or found.get(origins.of(base)) == base
    }


def _free_name(members: list[str], taken: Collection[str]) -> str:
    more = (f"{members[0]}{_MORE}{i}" for i in itertools.count(2))
    return next(name for name in itertools.chain(members, more) if name not in taken)


class _Origins:
    """Where the weights of a config's experts come from. Equal origins make equal weights."""

    def __init__(self, config: Config, kind: str, folder_of: FolderOf) -> None:
        self._config = config
        self._folder_of = folder_of
        # A simulated pool loads nothing, so that only files that are there can be the same.
        self._simulated = config.pools[kind].engine == "simulated"

    def of(self, expert: str) -> Origin:
        """Return the origin of an expert's weights."""
        expert = self._config.owner_of(expert)
        settings = self._config.experts[expert]
        if settings.base is None:
            return (self._model(expert, settings), *self._options(expert))
        base = self.of(settings.base)
        for file in (settings.adapter, settings.profile):
            if file is not None:
                return (base, settings.form, settings.strength, self._path(expert, file))
        return base

    def _model(self, expert: str, settings: ExpertConfig) -> Origin:
        if settings.command is not None:
            # Nobody can tell what a server has loaded, so that each is another one.
            return ("command", expert, settings.command.model_dump_json())
        folder = self._folder_of(self._config, expert)
        if folder is not None:
            return ("folder", folder)
        return ("source", settings.model, expert if self._simulated else "")

    def _options(self, expert: str) -> Origin:
        """Return the settings by which an engine of these weights is another one."""
        kernels = self._config.experts[expert].vllm.model_dump_json()
        return (kernels, self._config.uses_pooling_runner(expert))

    def _path(self, expert: str, file: str) -> Origin:
        path = Path(file)
        if self._simulated and not path.exists():
            return ("source", file, expert)
        return ("file", str(path.resolve()))


def _folder_here(config: Config, expert: str) -> str | None:
    try:
        folder = folder_here(config, expert)
        return str(folder.resolve()) if folder is not None else None
    except (OSError, CoeError):
        return None
