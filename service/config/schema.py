"""The root of the config, and checks across sections."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Annotated

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from service.config.added_experts import AddedExpertsConfig
from service.config.aliases import AliasConfig, AliasName, RollbackConfig, resolve_aliases
from service.config.answer_cache import CacheConfig
from service.config.autoscaling import AutoscalingConfig, GatewaysConfig
from service.config.batches import BatchesConfig
from service.config.categories import CategoryConfig, Fault, example_faults
from service.config.circuit_breaker import BreakerConfig
from service.config.command_experts import CommandConfig, ServerCall, SleepCall
from service.config.expert_request_defaults import DefaultsConfig
from service.config.experts import (
    POOLING,
    TEXT,
    ExpertConfig,
    MediaConfig,
    PriceConfig,
    RemoteConfig,
)
from service.config.feedback import FeedbackConfig
from service.config.guard import GuardConfig, InjectionConfig, PiiConfig
from service.config.moe_options import ON_CPU, EplbOptions, ExpertKernels, ExpertOffload
from service.config.pools import MoeCapture, PoolConfig, SimulatedOptions, SwapOptions, VllmOptions
from service.config.prices import PricesConfig
from service.config.recipes import DeliberationConfig, RecipeConfig, RecruitmentConfig
from service.config.request_limits import RequestLimits
from service.config.responses import ResponsesConfig
from service.config.router import EncoderConfig, RouterConfig
from service.config.router_presets import (
    AutoPresetConfig,
    BestPresetConfig,
    FastPresetConfig,
    PresetsConfig,
)
from service.config.savings import SavingsConfig
from service.config.section_base import Name, Section
from service.config.server import ServerConfig
from service.config.sessions import SessionsConfig
from service.config.shadow import PromoteConfig, ShadowConfig
from service.config.store import StoreConfig
from service.config.telemetry import TelemetryConfig
from service.config.tenants import (
    DEFAULT_TENANT,
    BudgetConfig,
    KeyConfig,
    SpendConfig,
    TenantConfig,
    known_tenant,
)
from service.config.thinking import ThinkingConfig
from service.types import Recipe


class Config(Section):
    """The root of the config: a composition of experts."""

    server: ServerConfig = Field(default_factory=lambda: ServerConfig())
    router: RouterConfig = Field(default_factory=lambda: RouterConfig())
    telemetry: TelemetryConfig = Field(default_factory=lambda: TelemetryConfig())
    models_dir: str | None = Field(
        None, description="Folder of the model store. Default: $COE_MODELS or ~/.cache/coe/models."
    )
    experts: dict[Name, ExpertConfig] = Field(description="The experts, by name.", min_length=1)
    recipes: dict[Name, RecipeConfig] = Field(
        default_factory=dict, description="Recipes of several experts, by name."
    )
    aliases: dict[AliasName, AliasConfig] = Field(
        default_factory=dict,
        description="Other names that clients may ask for, such as `gpt-4o-mini: auto`. In a name "
        "`*` stands for any characters; a name without it comes before those with it, and the "
        "longest of these comes first. Experts, recipes and `auto` keep their names.",
    )
    categories: dict[Name, CategoryConfig] = Field(
        default_factory=dict,
        description="Categories of prompts by description and examples, by name. They need no fit, "
        "and stand beside those of the router's artifact.",
    )
    pools: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")], PoolConfig] = Field(
        default_factory=dict, description="The pools, by kind."
    )
    tenants: dict[Name, TenantConfig] = Field(
        default_factory=dict,
        description="The tenants, by name. If there are none, a key may have any tenant; else one "
        "of these or `default`, which has no limits unless it is listed.",
    )
    keys: dict[Name, KeyConfig] = Field(
        default_factory=dict, description="API keys of the config, by name."
    )
    prices: PricesConfig = Field(default_factory=lambda: PricesConfig())
    budgets: dict[Name, BudgetConfig] = Field(default_factory=dict, description="Budgets, by name.")
    feedback: FeedbackConfig = Field(default_factory=lambda: FeedbackConfig())
    savings: SavingsConfig = Field(default_factory=lambda: SavingsConfig())
    shadow: ShadowConfig = Field(default_factory=lambda: ShadowConfig())
    batches: BatchesConfig = Field(default_factory=lambda: BatchesConfig())
    responses: ResponsesConfig = Field(default_factory=lambda: ResponsesConfig())
    store: StoreConfig = Field(default_factory=lambda: StoreConfig())
    added_experts: AddedExpertsConfig = Field(default_factory=lambda: AddedExpertsConfig())

    @model_validator(mode="after")
    def _check_references(self) -> Config:
        _check_bases(self)
        _fill_variants(self)
        _check_names(self)
        _check_aliases(self)
        _check_idle_keep(self)
        _check_kernels(self)
        _check_thinking(self)
        _check_tenants(self)
        _check_shadow(self)
        _check_categories(self)
        return self

    @property
    def computation_rate(self) -> float:
        """Units of cost per million tokens and billion active parameters of a local expert."""
        given = self.prices.per_billion_parameters
        if given is not None:
            return given
        return 0.0 if any(expert.price is not None for expert in self.experts.values()) else 1.0

    @property
    def fallback(self) -> str:
        """The expert for prompts of no expert's category."""
        if self.router.fallback is not None:
            return self.router.fallback
        for name, expert in self.experts.items():
            if "general" in expert.categories:
                return name
        chosen = (name for name, expert in self.experts.items() if expert.auto)
        return next(chosen, next(iter(self.experts)))

    def local_experts(self, kind: str) -> tuple[str, ...]:
        """Return the experts of pools of this kind, bases before experts that build on them.

        A variant is wherever its base is.
        """
        named = self.pools[kind].experts
        names = [
            name
            for name, expert in self.experts.items()
            if expert.remote is None and (named is None or self.owner_of(name) in named)
        ]

        def depth(name: str) -> int:
            expert = self.experts[name]
            return 2 if expert.is_variant else int(expert.base is not None)

        return tuple(sorted(names, key=depth))

    def owner_of(self, expert: str) -> str:
        """Return the expert that a variant is a way to ask; for other experts the expert itself."""
        settings = self.experts[expert]
        return settings.base if settings.is_variant and settings.base else expert

    def units(self, kind: str) -> tuple[tuple[str, ...], ...]:
        """Return the experts of a pool, grouped by the weights that they run on.

        Each tuple has an expert with full or merged weights, followed by its adapters. A virtual
        expert is a unit of its own: it uses its base's weights, but never at the same time.
        Variants are in no unit, because they are asked as their base.
        """
        held = [name for name in self.local_experts(kind) if not self.experts[name].is_variant]
        return tuple(
            (
                name,
                *(
                    other
                    for other in held
                    if self.experts[other].base == name and self.experts[other].form == "adapter"
                ),
            )
            for name in held
            if self.experts[name].model is not None
            or self.experts[name].command is not None
            or self.experts[name].form != "adapter"
        )

    def vllm_of(self, kind: str, expert: str) -> VllmOptions:
        """Return vLLM's options for an expert in a pool; its base's own override the pool's."""
        settings = self.experts[self.owner_of(expert)]
        own = (settings if settings.base is None else self.experts[settings.base]).vllm
        given = {name: value for name, value in own if value is not None}
        return self.pools[kind].vllm.model_copy(update=given)

    def bounds_thinking(self, expert: str) -> bool:
        """Return whether budgets of thinking hold for an expert, wherever it is answered.

        vLLM needs to know the marks of thinking, by a parser or by `reasoning_config`. OpenAI's
        fields have no budget. A server that a command starts would ignore the field or not.
        """
        remote, owner = self.experts[expert].remote, self.owner_of(expert)
        if remote is not None:
            return remote.thinking_fields != "openai"
        if self.experts[owner].command is not None:
            return False
        return all(
            pool.vllm.reasoning_parser is not None or "reasoning_config" in pool.vllm.args
            for pool in self.pools.values()
            if pool.engine == "vllm" and (pool.experts is None or owner in pool.experts)
        )

    def groups(self, kind: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Return the units of a pool, grouped by slot: each base with its virtual experts."""
        units = self.units(kind)
        return tuple(
            (unit, *(other for other in units if self.needs(other[0]) == unit[0]))
            for unit in units
            if not self.needs(unit[0])
        )

    def needs(self, expert: str) -> str | None:
        """Return the base of a virtual expert; None for other experts."""
        settings = self.experts[expert]
        return settings.base if settings.form == "steered" else None

    @property
    def key_variables(self) -> frozenset[str]:
        """Environment variables that hold keys of clients, remote endpoints and stores.

        Only gateways may read them. The hub's token is not one of them: pools fetch models with it.
        """
        named = [key.key_env for key in self.keys.values()]
        named += [e.remote.api_key_env for e in self.experts.values() if e.remote is not None]
        named += [self.store.url_env, self.store.cache_url_env]
        return frozenset(name for name in named if name is not None) - {"HF_TOKEN"}

    def uses_pooling_runner(self, expert: str) -> bool:
        """Return whether vLLM runs an expert for vectors, scores or classes, and not for text."""
        capabilities = {*self.experts[self.owner_of(expert)].capabilities}
        return bool(POOLING & capabilities) and not TEXT & capabilities

    def model_sources(self, only: str | None = None) -> dict[str, str]:
        """Return the models that pools with real engines need: expert → source.

        Args:
            only: Kind of pool; None: all pools.
        """
        return {
            name: source
            for kind, pool in self.pools.items()
            if pool.engine == "vllm" and only in (None, kind)
            for name in self.local_experts(kind)
            if (source := self.experts[name].model) is not None
        }

    def category_map(self) -> dict[str, str]:
        """Return category → expert. The first expert that names a category gets it."""
        mapping = {
            name: category.expert
            for name, category in self.categories.items()
            if category.expert is not None
        }
        for name, expert in self.experts.items():
            for category in expert.categories:
                mapping.setdefault(category, name)
        mapping.setdefault("general", self.fallback)
        return mapping


def _check_tenants(config: Config) -> None:
    names = set(config.experts)
    limits = [(f"tenants.{n}", t) for n, t in config.tenants.items()]
    for place, section in [*limits, *((f"keys.{n}", k) for n, k in config.keys.items())]:
        for name in section.experts or ():
            if name in config.aliases:
                raise ValueError(
                    f"{place}.experts: {name!r} is an alias; list the experts that it stands for "
                    f"({', '.join(sorted(names))})"
                )
            if name not in names:
                raise ValueError(f"{place}.experts: {_unknown(name, names)}")
    of_tenants = [(f"keys.{n}", k.tenant) for n, k in config.keys.items()]
    for place, tenant in of_tenants:
        if not known_tenant(tenant, config.tenants):
            raise ValueError(f"{place}.tenant: {unknown_tenant(tenant, config.tenants)}")
    # Keys may have any tenant until some are listed. A budget of a misspelt one would bound nobody.
    named = {DEFAULT_TENANT, *config.tenants, *(key.tenant for key in config.keys.values())}
    for name, budget in config.budgets.items():
        if budget.tenant is not None and budget.tenant not in named:
            hint = "" if config.tenants else "; a tenant of stored keys has to be in `tenants`"
            why = unknown_tenant(budget.tenant, named)
            raise ValueError(f"budgets.{name}.tenant: {why}{hint}")
    if config.store.kind == "memory" and config.server.gateways.most_replicas > 1:
        raise ValueError(
            "server.gateways: several gateways need a shared store; set store.kind to redis"
        )


def _check_bases(config: Config) -> None:
    for name, expert in config.experts.items():
        if expert.base is None:
            continue
        base = config.experts.get(expert.base)
        if base is None:
            raise ValueError(f"experts.{name}.base: {_unknown(expert.base, set(config.experts))}")
        if expert.is_variant and base.is_variant:
            raise ValueError(
                f"experts.{name}.base: {expert.base!r} is a variant itself; name its base, "
                f"{base.base!r}"
            )
        if not expert.is_variant and base.model is None:
            raise ValueError(
                f"experts.{name}.base: {expert.base!r} has no full weights of its own; "
                "a base is an expert with `model`"
            )
        if expert.remote is not None and expert.remote != base.remote:
            raise ValueError(
                f"experts.{name}.remote: a variant has its base's endpoint; leave it out"
            )


def _fill_variants(config: Config) -> None:
    """Give each variant what it shares with its base, and check the rest."""
    for name, expert in config.experts.items():
        if not expert.is_variant or expert.base is None:
            continue
        base = config.experts[expert.base]
        filled: dict[str, object] = {"remote": base.remote}
        for field in ("capabilities", "media", "space"):
            if field not in expert.model_fields_set and field in base.model_fields_set:
                filled[field] = getattr(base, field)
        config.experts[name] = expert = expert.model_copy(update=filled)
        lacking = set(expert.capabilities) - set(base.capabilities)
        if "capabilities" not in base.model_fields_set:
            lacking -= {"vision", "audio"}  # the model's folder decides
        if lacking:
            raise ValueError(
                f"experts.{name}.capabilities: its base {expert.base!r} lacks "
                f"{', '.join(sorted(lacking))}; it has {', '.join(base.capabilities)}"
            )
    for name, expert in config.experts.items():
        if expert.defaults is None:
            continue
        if expert.defaults.wants_json and "json" not in expert.capabilities:
            raise ValueError(
                f"experts.{name}.defaults.response_format: the expert lacks the capability json"
            )


def _check_shadow(config: Config) -> None:
    shadow, names = config.shadow, set(config.experts)
    asked = [("experts", name) for name in shadow.experts or ()]
    for field, name in [*asked, *([("judge", shadow.judge)] if shadow.judge else ())]:
        if name not in names:
            raise ValueError(f"shadow.{field}: {_unknown(name, names)}")
        if "chat" not in config.experts[name].capabilities:
            raise ValueError(f"shadow.{field}: {name!r} lacks the capability chat")
    if shadow.judge is not None and shadow.judge in (shadow.experts or ()):
        raise ValueError(f"shadow.judge: {shadow.judge!r} would judge its own answers")
    willing = [name for name, tenant in config.tenants.items() if tenant.shadow]
    if willing and shadow.budget is None:
        raise ValueError(f"tenants.{willing[0]}.shadow: needs shadow.budget")


def _check_categories(config: Config) -> None:
    """Check examples, and that every category has one expert."""
    faults: list[Fault] = [
        (("categories", *place), text) for place, text in example_faults(config.categories)
    ]
    if config.categories and not config.router.static and config.router.encoder is None:
        faults.append((("router", "static"), "categories with examples need it, or an encoder"))
    names = set(config.experts)
    for name, category in config.categories.items():
        if category.expert is None:
            if not any(name in expert.categories for expert in config.experts.values()):
                faults.append(
                    (
                        ("categories", name),
                        "no expert has this category; name one as `expert`, or name the category "
                        "in an expert's `categories`",
                    )
                )
        elif category.expert not in names:
            faults.append((("categories", name, "expert"), _unknown(category.expert, names)))
    if faults:
        raise PydanticCustomError("categories", "{faults}", {"faults": faults})


def _check_names(config: Config) -> None:
    names = set(config.experts)
    for name in config.experts:
        if name == "auto" or name.startswith(("auto/", "auto:")):
            raise ValueError(f"experts.{name}: the prefix 'auto' is reserved")
    for name, expert in config.experts.items():
        if (other := expert.quality_from) is None:
            continue
        if other not in names or other == name:
            raise ValueError(f"experts.{name}.quality_from: {_unknown(other, names - {name})}")
        if (further := config.experts[other].quality_from) is not None:
            raise ValueError(
                f"experts.{name}.quality_from: {other!r} has its own quality from {further!r}; "
                "name that one"
            )
    _check_recipes(config, names)
    _check_spaces(config)
    for name in config.savings.against or ():
        if name not in names and name not in config.recipes:
            raise ValueError(f"savings.against: {_unknown(name, names | {*config.recipes})}")
        if name in config.recipes and config.recipes[name].kind == "recruit":
            raise ValueError(
                f"savings.against: {name!r} recruits other experts for each prompt, so that it has "
                "no cost of its own to compare with"
            )
    if config.router.fallback is not None and config.router.fallback not in names:
        raise ValueError(f"router.fallback: {_unknown(config.router.fallback, names)}")
    for name, expert in config.experts.items():
        if not expert.auto and (expert.categories or expert.quality or expert.quality_from):
            raise ValueError(
                f"experts.{name}.auto: false leaves it to requests that name it, so that it has "
                "neither categories nor quality"
            )
    for name, category in config.categories.items():
        if category.expert in names and not config.experts[category.expert].auto:
            raise ValueError(
                f"categories.{name}.expert: {category.expert!r} has `auto: false`, so that `auto` "
                "sends it no prompt"
            )
    if not config.experts[config.fallback].auto:
        raise ValueError(
            f"experts.{config.fallback}.auto: must not be false, because the expert is the "
            "fallback of `auto`"
        )
    placed: set[str] = set()
    for kind, pool in config.pools.items():
        for name in pool.experts or ():
            if name not in names:
                raise ValueError(f"pools.{kind}.experts: {_unknown(name, names)}")
            if config.experts[name].remote is not None:
                raise ValueError(f"pools.{kind}.experts: {name!r} is remote and needs no pool")
            if config.owner_of(name) not in (pool.experts or ()):
                raise ValueError(
                    f"pools.{kind}.experts: {name!r} is a variant of {config.owner_of(name)!r}, "
                    "which is not in this pool; list that one, and the variant comes with it"
                )
        held = config.local_experts(kind)
        for name in held:
            if config.experts[name].is_variant:
                continue
            base_name = config.experts[name].base
            if base_name is not None and base_name not in held:
                what = "a virtual expert" if config.needs(name) else "an adapter"
                raise ValueError(
                    f"pools.{kind}.experts: {name!r} is {what} of {base_name!r}, which is "
                    "not in this pool; list it too"
                )
        if not held:
            raise ValueError(f"pools.{kind}: has no expert; list one or remove the pool")
        placed.update(held)
    homeless = [n for n, e in config.experts.items() if e.remote is None and n not in placed]
    if homeless:
        raise ValueError(
            f"experts {', '.join(map(repr, homeless))} are in no pool; add a pool under `pools`"
        )


def _check_aliases(config: Config) -> None:
    """Check that aliases take nobody's name, and that each leads to something that answers."""
    names = {**config.experts, **config.recipes}
    for alias in config.aliases:
        if alias in names or _is_auto(alias):
            owner = "an expert or a recipe" if alias in names else "the reserved prefix 'auto'"
            raise ValueError(f"aliases.{alias}: the name is taken by {owner}")
    for alias, settings in config.aliases.items():
        for target in settings.to:
            if target in names or (target in config.aliases and "*" not in target):
                continue
            if not _is_auto(target) or not _auto_exists(config, target):
                raise ValueError(f"aliases.{alias}: {_unknown_target(config, target)}")
    for alias, resolved in resolve_aliases(config.aliases).items():
        spaces = {
            config.experts[target].space or config.owner_of(target): target
            for target in resolved.targets
            if target in config.experts and "embeddings" in config.experts[target].capabilities
        }
        if len(spaces) > 1:
            raise ValueError(
                f"aliases.{alias}: {', '.join(map(repr, spaces.values()))} embed into several "
                "vector spaces, which an index must not mix; share requests among experts of one "
                "`space` only"
            )


def _is_auto(name: str) -> bool:
    return name == "auto" or name.startswith(("auto/", "auto:"))


def _auto_exists(config: Config, name: str) -> bool:
    """Whether this `auto[:preset][/category]` exists."""
    head, slash, category = name.partition("/")
    preset = head.removeprefix("auto")
    known = preset in ("", *(f":{name}" for name in PresetsConfig.model_fields if name != "auto"))
    return known and (not slash or category in config.category_map())


def _unknown_target(config: Config, target: str) -> str:
    """The error text for a target of an alias that does not exist."""
    exact = [alias for alias in config.aliases if "*" not in alias]
    presets = ["auto", *(f"auto:{name}" for name in PresetsConfig.model_fields if name != "auto")]
    allowed = [*presets, *config.experts, *config.recipes, *exact]
    close = difflib.get_close_matches(target, allowed, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    kinds = {
        "auto": [*presets, "auto/CATEGORY"],
        "categories": sorted(config.category_map()),
        "experts": list(config.experts),
        "recipes": list(config.recipes),
        "aliases without *": exact,
    }
    listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    return f"no target {target[:128]!r};{hint} allowed: {listed}"


def _check_idle_keep(config: Config) -> None:
    """Check that engines can sleep whose weights shall stay in host memory while idle."""
    for kind, pool in config.pools.items():
        if pool.swap.idle_keep != "host" or pool.engine == "simulated":
            continue
        for name in config.local_experts(kind):
            command = config.experts[config.owner_of(name)].command
            sleeps = pool.swap.method == "sleep" if command is None else command.sleep is not None
            if not sleeps:
                needs = "swap.method sleep" if command is None else f"experts.{name}.command.sleep"
                raise ValueError(
                    f"pools.{kind}.swap.idle_keep: host needs {needs}, because the memory of "
                    f"{name!r} ends with its engine; use disk"
                )


def _check_kernels(config: Config) -> None:
    for kind, pool in config.pools.items():
        if pool.engine != "vllm" or pool.gpus > 0:
            continue
        for expert in config.local_experts(kind):
            own = config.experts[expert].vllm
            for name in ("moe_backend", "tuned_config_folder"):
                if getattr(own, name) not in (None, "auto"):
                    raise ValueError(f"experts.{expert}.vllm.{name}: pools.{kind}: {ON_CPU[name]}")


def _check_thinking(config: Config) -> None:
    for name, expert in config.experts.items():
        if expert.thinking is None or expert.thinking.bounded is None:
            continue
        if not config.bounds_thinking(name):
            owner = config.owner_of(name)
            if config.experts[owner].command is not None:
                advice = "leave it out: the server that a command starts may not know budgets"
            elif expert.remote is None:
                advice = "set vllm.reasoning_parser of each of its pools"
            else:
                advice = (
                    f"set experts.{owner}.remote.thinking_fields to anthropic or vllm, if the "
                    "endpoint takes these"
                )
            raise ValueError(
                f"experts.{name}.thinking.{expert.thinking.bounded}: nothing would keep it; "
                f"{advice}"
            )


def _check_recipes(config: Config, names: set[str]) -> None:
    for name, recipe in config.recipes.items():
        if name in names or name == "auto" or name.startswith(("auto/", "auto:")):
            raise ValueError(
                f"recipes.{name}: the name is taken by an expert or uses the reserved prefix 'auto'"
            )
        for expert in recipe.recipe().experts:
            if expert not in names:
                raise ValueError(f"recipes.{name}: {_unknown(expert, names)}")
            if "chat" not in config.experts[expert].capabilities:
                raise ValueError(f"recipes.{name}: {expert!r} lacks the capability chat")
        same = [
            other
            for other, given in config.recipes.items()
            if given.recipe().name == recipe.recipe().name and given.recipe() != recipe.recipe()
        ]
        if same:
            raise ValueError(
                f"recipes.{name}: has the experts of recipes.{same[0]} and other settings; only "
                "one of them can be there, because replies name it by its experts"
            )
        if (silent := silent_member(config, recipe.recipe())) is not None:
            raise ValueError(
                f"recipes.{name}.sure: {silent!r} is remote and not known to return log "
                f"probabilities; set experts.{silent}.remote.logprobs to true if it does, "
                "or `sure` to 0"
            )


def _check_spaces(config: Config) -> None:
    """Check that several embedding experts name the vector spaces of their vectors."""
    embedding = [
        name
        for name, expert in config.experts.items()
        if "embeddings" in expert.capabilities and not expert.is_variant
    ]
    unnamed = [name for name in embedding if config.experts[name].space is None]
    if len(embedding) > 1 and unnamed:
        raise ValueError(
            f"experts.{unnamed[0]}.space: {len(embedding)} experts embed "
            f"({', '.join(embedding)}); name the vector space of each, and the same one if their "
            "vectors may be in one index"
        )


def silent_member(config: Config, recipe: Recipe) -> str | None:
    """Return the member whose log probabilities a recipe needs, if it does not return them."""
    if recipe.sure <= 0:
        return None
    remote = config.experts[recipe.members[0]].remote  # a variant's is that of its base
    return recipe.members[0] if remote is not None and not remote.logprobs else None


def unknown_tenant(name: str, tenants: Collection[str]) -> str:
    """Return the error text for an unknown tenant."""
    close = difflib.get_close_matches(name, tenants, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"no tenant {name[:128]!r};{hint} tenants: {', '.join(sorted({*tenants, 'default'}))}"


def _unknown(name: str, allowed: set[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"no expert {name!r};{hint} experts: {', '.join(sorted(allowed))}"


# Every section by its path; `*` stands for a name that the user chooses.
SECTIONS: dict[tuple[str, ...], type[BaseModel]] = {
    (): Config,
    ("server",): ServerConfig,
    ("server", "limits"): RequestLimits,
    ("server", "breaker"): BreakerConfig,
    ("server", "gateways"): GatewaysConfig,
    ("router",): RouterConfig,
    ("router", "presets"): PresetsConfig,
    ("router", "presets", "fast"): FastPresetConfig,
    ("router", "presets", "auto"): AutoPresetConfig,
    ("router", "presets", "best"): BestPresetConfig,
    ("router", "sessions"): SessionsConfig,
    ("router", "encoder"): EncoderConfig,
    ("categories", "*"): CategoryConfig,
    ("telemetry",): TelemetryConfig,
    ("experts", "*"): ExpertConfig,
    ("experts", "*", "remote"): RemoteConfig,
    ("experts", "*", "command"): CommandConfig,
    ("experts", "*", "command", "sleep"): SleepCall,
    ("experts", "*", "command", "wake"): ServerCall,
    ("experts", "*", "price"): PriceConfig,
    ("experts", "*", "vllm"): ExpertKernels,
    ("experts", "*", "media"): MediaConfig,
    ("experts", "*", "defaults"): DefaultsConfig,
    ("experts", "*", "thinking"): ThinkingConfig,
    ("recipes", "*"): RecipeConfig,
    ("aliases", "*"): AliasConfig,
    ("aliases", "*", "rollback"): RollbackConfig,
    ("recipes", "*", "deliberate"): DeliberationConfig,
    ("recipes", "*", "recruit"): RecruitmentConfig,
    ("prices",): PricesConfig,
    ("feedback",): FeedbackConfig,
    ("savings",): SavingsConfig,
    ("shadow",): ShadowConfig,
    ("shadow", "budget"): SpendConfig,
    ("shadow", "promote"): PromoteConfig,
    ("batches",): BatchesConfig,
    ("responses",): ResponsesConfig,
    ("pools", "*"): PoolConfig,
    ("pools", "*", "vllm"): VllmOptions,
    ("pools", "*", "vllm", "moe_capture"): MoeCapture,
    ("pools", "*", "vllm", "expert_offload"): ExpertOffload,
    ("pools", "*", "vllm", "eplb_config"): EplbOptions,
    ("pools", "*", "autoscaling"): AutoscalingConfig,
    ("pools", "*", "swap"): SwapOptions,
    ("pools", "*", "simulated"): SimulatedOptions,
    ("tenants", "*"): TenantConfig,
    ("tenants", "*", "budget"): SpendConfig,
    ("tenants", "*", "cache"): CacheConfig,
    ("tenants", "*", "guard"): GuardConfig,
    ("tenants", "*", "guard", "injection"): InjectionConfig,
    ("tenants", "*", "guard", "pii"): PiiConfig,
    ("keys", "*"): KeyConfig,
    ("keys", "*", "budget"): SpendConfig,
    ("budgets", "*"): BudgetConfig,
    ("store",): StoreConfig,
    ("added_experts",): AddedExpertsConfig,
}
