"""The config in effect: that of the file, with the experts that an admin has added. Pure.

Every gateway and pool makes it from the same two parts, so that all come to the same one. The file
wins: an added expert that does not fit into it is left out, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field, ValidationError, model_validator

from service.config.categories import CategoryConfig
from service.config.experts import ExpertConfig
from service.config.loader import faults_of, validated_config
from service.config.schema import Config
from service.config.section_base import Name, Section
from service.errors import ConfigError

# The fields of an expert that an added one may not have.
_NOT_ADDED = ("model", "remote", "command", "profile")
_HUB_ADAPTER = re.compile(r"[\w][\w.-]*/[\w][\w.-]*@[0-9a-f]{40}")
WITHOUT_ANCHOR = "it should be an absolute path, or ORG/NAME@COMMIT with all 40 digits"


class AddedExpert(Section):
    """An expert that an admin has added.

    Its adapter is a folder's absolute path, or a name of the hub with a commit.
    """

    expert: ExpertConfig
    examples: dict[Name, tuple[str, ...]] = Field(default_factory=dict)
    served: bool = False
    added_s: float = 0.0

    @model_validator(mode="after")
    def _check_kind(self) -> AddedExpert:
        for name in _NOT_ADDED:
            if getattr(self.expert, name) is not None:
                raise ValueError(
                    f"{name}: an added expert has a `base` of the config, with an adapter, "
                    "defaults or thinking"
                )
        adapter = self.expert.adapter
        if adapter is not None and not adapter.startswith("/") and not is_hub_adapter(adapter):
            raise ValueError(f"adapter: {WITHOUT_ANCHOR}, not {adapter[:128]!r}")
        return self


def is_hub_adapter(adapter: str) -> bool:
    """Return whether an adapter is named by the hub, with its commit."""
    return _HUB_ADAPTER.fullmatch(adapter) is not None


@dataclass(frozen=True, slots=True)
class AddedExperts:
    """All added experts.

    Attributes:
        revision: Grows with every change; 0 before the first.
        experts: The experts by name, in the order of their addition.
    """

    revision: int = 0
    experts: Mapping[str, AddedExpert] = field(default_factory=dict)

    def including(self, name: str, expert: AddedExpert, now_s: float) -> AddedExperts:
        """Return these with one more, or with another one in its place."""
        return replace(self, revision=self._next(now_s), experts={**self.experts, name: expert})

    def without(self, name: str, now_s: float) -> AddedExperts:
        """Return these without one."""
        left = {one: expert for one, expert in self.experts.items() if one != name}
        return replace(self, revision=self._next(now_s), experts=left)

    def _next(self, now_s: float) -> int:
        # Time lets it grow even where a file or a store has lost the revision before.
        return max(self.revision + 1, int(now_s * 1000))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON, which `from_json` reads."""
        return {
            "revision": self.revision,
            "experts": {
                name: one.model_dump(mode="json", exclude_unset=True)
                for name, one in self.experts.items()
            },
        }

    @classmethod
    def from_json(cls, data: Any) -> AddedExperts:
        """Read what `to_json` returned.

        Raises:
            ConfigError: It is damaged, or of another version.
        """
        try:
            experts = {
                str(name): AddedExpert.model_validate(one) for name, one in data["experts"].items()
            }
            return cls(int(data["revision"]), experts)
        except (KeyError, TypeError, ValueError, AttributeError):
            # The original error may quote a system prompt.
            raise ConfigError("the added experts are damaged, or of another version") from None


def parse_added_expert(data: Mapping[str, Any], now_s: float) -> tuple[str, AddedExpert]:
    """Read an admin's addition: the fields of an expert, with `name` and `examples`.

    Raises:
        ConfigError: A field is wrong; the message has one line per fault.
    """
    given = dict(data)
    name, examples = given.pop("name", None), given.pop("examples", {})
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}", name):
        raise ConfigError(
            "name: a name of 1 to 128 letters, digits and . _ : / - is needed, which begins with "
            "a letter or digit"
        )
    if any(part in ("", ".", "..") for part in name.split("/")):
        # Clients take such parts out of paths, and DELETE /admin/experts/NAME would miss it.
        raise ConfigError("name: no part between its slashes may be empty, . or ..")
    source = f"expert {name!r}"
    try:
        expert = ExpertConfig.model_validate(given)
    except ValidationError as error:
        faults = faults_of(error, source, section=("experts", name))
        raise ConfigError("\n".join(faults)) from None
    try:
        added = AddedExpert.model_validate(
            {"expert": expert, "examples": examples, "added_s": now_s}
        )
    except ValidationError as error:
        raise ConfigError("\n".join(faults_of(error, source))) from None
    return name, added


@dataclass(frozen=True, slots=True)
class EffectiveConfig:
    """A config with added experts.

    Attributes:
        config: The config in effect.
        left_out: The added experts that do not fit into the config, with the reasons.
    """

    config: Config
    left_out: Mapping[str, str] = field(default_factory=dict)


def with_added(
    config: Config,
    added: AddedExperts,
    *,
    unserved: bool = False,
    folder_of: Callable[[str], str] = str,
    built_in_artifact: str | None = None,
) -> EffectiveConfig:
    """Return a config with added experts.

    What the config had stays as it is: the same fallback, prices, categories and artifact.

    Args:
        config: The config.
        added: The added experts.
        unserved: Whether those count as well that are still being checked.
        folder_of: Returns the folder of an adapter that is named by the hub or by its path. Raises
            a ConfigError where no adapter may lie.
        built_in_artifact: The router's built-in artifact, which stays although categories with
            examples come.
    """
    merge = _Merge(config, folder_of, built_in_artifact)
    left_out: dict[str, str] = {}
    kept: dict[str, AddedExpert] = {}
    result = config
    wanted = [(n, one) for n, one in added.experts.items() if one.served or unserved]
    # Parts are tried as a whole, and halved where they don't fit: a merge of a thousand experts
    # takes a while, and a thousand merges of them would take minutes.
    parts = [wanted] if wanted else []
    while parts:
        part = parts.pop()
        try:
            result = merge.all_of({**kept, **dict(part)})
        except ConfigError as error:
            if len(part) == 1:
                left_out[part[0][0]] = error.message
            else:
                half = len(part) // 2
                parts += [part[half:], part[:half]]
        else:
            kept.update(part)
    return EffectiveConfig(result, left_out)


class _Merge:
    """Puts added experts into a config.

    Args:
        config: The config.
        folder_of: Returns the folder of an adapter that is named by the hub or by its path.
        built_in_artifact: The router's built-in artifact.
    """

    def __init__(
        self, config: Config, folder_of: Callable[[str], str], built_in_artifact: str | None
    ) -> None:
        self._config = config
        self._folder_of = folder_of
        self._built_in_artifact = built_in_artifact

    def all_of(self, added: Mapping[str, AddedExpert]) -> Config:
        """Return the config with all of these.

        Raises:
            ConfigError: One of them does not fit.
        """
        config = self._config
        experts = dict(config.experts)
        categories = dict(config.categories)
        for name, one in added.items():
            self._check_names(name, one, added)
            experts[name] = self._expert(name, one.expert, experts)
            for category, examples in one.examples.items():
                if category in categories:
                    raise ConfigError(
                        f"expert {name!r}: examples.{category}: there is a category of this name; "
                        "an added expert may join it by `categories`, without examples"
                    )
                categories[category] = CategoryConfig(examples=examples, expert=name)
        changes: dict[str, Any] = {
            "experts": experts,
            "categories": categories,
            "pools": self._pools(added),
        }
        if categories and not config.categories and config.router.artifact is None:
            artifact = {"artifact": self._built_in_artifact}
            changes["router"] = config.router.model_copy(update=artifact)
        given = {name: getattr(config, name) for name in config.model_fields_set}
        *_, last = added
        merged = validated_config({**given, **changes}, f"expert {last!r}")
        self._check_room(merged, added)
        return _as_before(config, merged, last)

    def _expert(
        self, name: str, expert: ExpertConfig, known: Mapping[str, ExpertConfig]
    ) -> ExpertConfig:
        changes: dict[str, Any] = {}
        if expert.adapter is not None:
            try:
                changes["adapter"] = self._folder_of(expert.adapter)
            except ConfigError as error:
                raise ConfigError(f"expert {name!r}: adapter: {error.message}") from None
        if expert.quality_from is None and expert.auto:
            base = known.get(expert.base or "")
            changes["quality_from"] = (base and base.quality_from) or expert.base
        return expert.model_copy(update=changes)

    def _pools(self, added: Mapping[str, AddedExpert]) -> dict[str, Any]:
        """The pools, where each that lists the base of an added expert lists that one, too."""
        pools = dict(self._config.pools)
        for name, one in added.items():
            for kind, pool in pools.items():
                if pool.experts is None or one.expert.is_variant:
                    continue  # it has every expert, or a variant comes with its base
                if one.expert.base in pool.experts:
                    pools[kind] = pool.model_copy(update={"experts": (*pool.experts, name)})
        return pools

    def _check_names(self, name: str, one: AddedExpert, added: Mapping[str, AddedExpert]) -> None:
        config = self._config
        taken: dict[str, Collection[str]] = {
            "an expert": config.experts,
            "a recipe": config.recipes,
            "an alias": config.aliases,
            "a category": {*config.category_map(), *config.categories},
        }
        for what, names in taken.items():
            if name in names:
                raise ConfigError(f"expert {name!r}: the config has {what} of this name")
        for pattern in config.aliases:
            if "*" in pattern and _matches(pattern, name):
                raise ConfigError(
                    f"expert {name!r}: the alias {pattern!r} of the config stands for this name"
                )
        for other, theirs in added.items():
            if name in theirs.examples:
                raise ConfigError(
                    f"expert {name!r}: the added expert {other!r} has a category of this name"
                )
        for category in one.examples:
            if category in config.experts or category in added:
                raise ConfigError(
                    f"expert {name!r}: examples.{category}: there is an expert of this name"
                )

    def _check_room(self, merged: Config, added: Mapping[str, AddedExpert]) -> None:
        """Check that engines were started with room for the adapters.

        Raises:
            ConfigError: One was not.
        """
        for kind, pool in merged.pools.items():
            had, wanted = (len(config.groups(kind)) for config in (self._config, merged))
            if pool.slots is not None and had <= pool.slots < wanted:
                *_, last = added
                raise ConfigError(
                    f"expert {last!r}: pools.{kind}.slots is {pool.slots}, and each of its experts "
                    "has one of its own; another one with weights of its own would need one more"
                )
        taken: dict[tuple[str, str], int] = {}
        for name, one in added.items():
            base = one.expert.base
            if one.expert.adapter is None or one.expert.form != "adapter" or base is None:
                continue
            for kind, pool in merged.pools.items():
                if name not in merged.local_experts(kind):
                    continue
                place = f"expert {name!r}: pools.{kind}"
                groups = self._config.groups(kind)
                is_shared = base in {self._config.needs(other) for other in self._config.experts}
                if is_shared or (pool.slots is not None and pool.slots < len(groups)):
                    raise ConfigError(
                        f"{place}: {base!r} takes turns with others in a slot, so that no adapter "
                        "can be added beside it while it runs; add it with `form: merged`"
                    )
                taken[kind, base] = taken.get((kind, base), 0) + 1
                if taken[kind, base] > pool.vllm.spare_adapters:
                    raise ConfigError(
                        f"{place}: vllm.spare_adapters is {pool.vllm.spare_adapters}, so that the "
                        f"engine of {base!r} has no room for this adapter; set it higher in the "
                        "config, which starts its replicas anew, or remove an added expert"
                    )


def _as_before(config: Config, merged: Config, name: str) -> Config:
    """Return the merged config, where what it derives for others is as in the config before.

    Raises:
        ConfigError: It would have another fallback.
    """
    if merged.fallback != config.fallback:
        raise ConfigError(
            f"expert {name!r}: categories: general is that of the fallback, {config.fallback!r}"
        )
    if merged.computation_rate == config.computation_rate:
        return merged
    rate = {"per_billion_parameters": config.computation_rate}
    return merged.model_copy(update={"prices": config.prices.model_copy(update=rate)})


def _matches(pattern: str, name: str) -> bool:
    """Return whether an alias with `*` stands for a name."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None
