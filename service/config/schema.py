"""The whole composition, and whether its names meet."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from service.config.base import Name, Section
from service.config.breaker import BreakerConfig
from service.config.cache import CacheConfig
from service.config.experts import ExpertConfig, MediaConfig, PriceConfig, RemoteConfig
from service.config.feedback import FeedbackConfig
from service.config.guard import GuardConfig, InjectionConfig, PiiConfig
from service.config.limits import RequestLimits
from service.config.moe_kernels import ON_CPU, EplbOptions, ExpertKernels
from service.config.pools import MoeCapture, PoolConfig, SimulatedOptions, SwapOptions, VllmOptions
from service.config.recipes import RecipeConfig
from service.config.server import RouterConfig, ServerConfig
from service.config.telemetry import TelemetryConfig
from service.config.tenants import (
    BudgetConfig,
    KeyConfig,
    SpendConfig,
    StoreConfig,
    TenantConfig,
    known_tenant,
)
from service.types import Recipe


class Config(Section):
    """A whole composition."""

    server: ServerConfig = Field(default_factory=lambda: ServerConfig())
    router: RouterConfig = Field(default_factory=lambda: RouterConfig())
    telemetry: TelemetryConfig = Field(default_factory=lambda: TelemetryConfig())
    models_dir: str | None = Field(
        None, description="Where models are kept. Default: $COE_MODELS or ~/.cache/coe/models."
    )
    experts: dict[Name, ExpertConfig] = Field(description="The experts, by name.", min_length=1)
    recipes: dict[Name, RecipeConfig] = Field(
        default_factory=dict, description="Ways to answer that ask several experts, by name."
    )
    pools: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")], PoolConfig] = Field(
        default_factory=dict, description="The pools, by kind."
    )
    tenants: dict[Name, TenantConfig] = Field(
        default_factory=dict,
        description="The tenants, by name. Where none is given, a key may be of any tenant; else "
        "of these, or of `default`, which has no limits unless it is among them.",
    )
    keys: dict[Name, KeyConfig] = Field(
        default_factory=dict, description="API keys that the config names, by name."
    )
    budgets: dict[Name, BudgetConfig] = Field(default_factory=dict, description="Budgets, by name.")
    feedback: FeedbackConfig = Field(default_factory=lambda: FeedbackConfig())
    store: StoreConfig = Field(default_factory=lambda: StoreConfig())

    @model_validator(mode="after")
    def _names_meet(self) -> Config:
        _check_names(self)
        _check_kernels(self)
        _check_tenants(self)
        return self

    @property
    def fallback(self) -> str:
        """The expert for prompts that no category claims."""
        if self.router.fallback is not None:
            return self.router.fallback
        for name, expert in self.experts.items():
            if "general" in expert.categories:
                return name
        return next(iter(self.experts))

    def local_experts(self, kind: str) -> tuple[str, ...]:
        """Names of the experts that pools of this kind hold, bases before what is made of them."""
        named = self.pools[kind].experts
        names = [
            name
            for name, expert in self.experts.items()
            if expert.remote is None and (named is None or name in named)
        ]
        return tuple(sorted(names, key=lambda name: self.experts[name].base is not None))

    def units(self, kind: str) -> tuple[tuple[str, ...], ...]:
        """The experts of a pool by the weights they run on.

        Each tuple begins with an expert that has full weights (or merged ones), and
        goes on with the adapters of it. A virtual expert runs on its base's weights, and not
        beside it: it is a unit of its own.
        """
        held = self.local_experts(kind)
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
            if self.experts[name].model is not None or self.experts[name].form != "adapter"
        )

    def vllm_of(self, kind: str, expert: str) -> VllmOptions:
        """How vLLM runs in a pool for the weights of an expert: its base's own settings first."""
        settings = self.experts[expert]
        own = (settings if settings.base is None else self.experts[settings.base]).vllm
        given = {name: value for name, value in own if value is not None}
        return self.pools[kind].vllm.model_copy(update=given)

    def groups(self, kind: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """The units of a pool by the slot they have to share: virtual experts after their base."""
        units = self.units(kind)
        return tuple(
            (unit, *(other for other in units if self.needs(other[0]) == unit[0]))
            for unit in units
            if not self.needs(unit[0])
        )

    def needs(self, expert: str) -> str:
        """The expert on whose weights a virtual expert runs; empty for any other."""
        settings = self.experts[expert]
        return settings.base or "" if settings.form == "steered" else ""

    @property
    def key_variables(self) -> frozenset[str]:
        """The environment variables that hold keys: clients', remote endpoints' and the stores'.

        They are gateways' to know. Not the hub's token, with which pools fetch models.
        """
        named = [key.key_env for key in self.keys.values()]
        named += [one.remote.api_key_env for one in self.experts.values() if one.remote is not None]
        named += [self.store.url_env, self.store.cache_url_env]
        return frozenset(name for name in named if name is not None) - {"HF_TOKEN"}

    def embeds(self, expert: str) -> bool:
        """Whether an expert makes vectors and no text, so that its engine runs for that alone."""
        able = self.experts[expert].capabilities
        return "embeddings" in able and not {"chat", "completions"} & {*able}

    def model_sources(self, only: str | None = None) -> dict[str, str]:
        """Where the weights come from that pools with real engines need: expert → source.

        `only`: pools of that kind.
        """
        return {
            name: source
            for kind, pool in self.pools.items()
            if pool.engine == "vllm" and only in (None, kind)
            for name in self.local_experts(kind)
            if (source := self.experts[name].model) is not None
        }

    def category_map(self) -> dict[str, str]:
        """Stage 2: category → expert. The first expert that names a category has it."""
        mapping: dict[str, str] = {}
        for name, expert in self.experts.items():
            for category in expert.categories:
                mapping.setdefault(category, name)
        mapping.setdefault("general", self.fallback)
        return mapping


def _check_tenants(config: Config) -> None:
    names = set(config.experts)
    limits = [(f"tenants.{n}", t) for n, t in config.tenants.items()]
    for place, one in [*limits, *((f"keys.{n}", k) for n, k in config.keys.items())]:
        for name in one.experts or ():
            if name not in names:
                raise ValueError(f"{place}.experts: {_unknown(name, names)}")
    of_tenants = [(f"keys.{n}", k.tenant) for n, k in config.keys.items()]
    of_tenants += [(f"budgets.{n}", b.tenant) for n, b in config.budgets.items() if b.tenant]
    for place, tenant in of_tenants:
        if not known_tenant(tenant, config.tenants):
            raise ValueError(f"{place}.tenant: {unknown_tenant(tenant, config.tenants)}")
    if config.store.kind == "memory" and config.server.gateways > 1:
        raise ValueError(
            "server.gateways: several gateways need a store that they share; "
            "set store.kind to redis"
        )


def _check_names(config: Config) -> None:
    names = set(config.experts)
    for name, expert in config.experts.items():
        if name == "auto" or name.startswith(("auto/", "auto:")):
            raise ValueError(f"experts.{name}: a name must not be or begin with 'auto'")
        if expert.base is not None:
            base = config.experts.get(expert.base)
            if base is None:
                raise ValueError(f"experts.{name}.base: {_unknown(expert.base, names)}")
            if base.model is None:
                raise ValueError(
                    f"experts.{name}.base: {expert.base!r} has no full weights of its own; "
                    "a base is an expert with `model`"
                )
    _check_recipes(config, names)
    _check_spaces(config)
    if config.router.fallback is not None and config.router.fallback not in names:
        raise ValueError(f"router.fallback: {_unknown(config.router.fallback, names)}")
    placed: set[str] = set()
    for kind, pool in config.pools.items():
        for name in pool.experts or ():
            if name not in names:
                raise ValueError(f"pools.{kind}.experts: {_unknown(name, names)}")
            if config.experts[name].remote is not None:
                raise ValueError(f"pools.{kind}.experts: {name!r} is remote and needs no pool")
        held = config.local_experts(kind)
        for name in held:
            base_name = config.experts[name].base
            if base_name is not None and base_name not in held:
                what = "a virtual expert" if config.needs(name) else "an adapter"
                raise ValueError(
                    f"pools.{kind}.experts: {name!r} is {what} of {base_name!r}, which is "
                    "not in this pool; list it too"
                )
        if not held:
            raise ValueError(f"pools.{kind}: it holds no expert; give it one or remove it")
        placed.update(held)
    homeless = [n for n, e in config.experts.items() if e.remote is None and n not in placed]
    if homeless:
        raise ValueError(
            f"experts {', '.join(map(repr, homeless))} are in no pool; add a pool under `pools`"
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


def _check_recipes(config: Config, names: set[str]) -> None:
    for name, recipe in config.recipes.items():
        if name in names or name == "auto" or name.startswith(("auto/", "auto:")):
            raise ValueError(f"recipes.{name}: an expert is called so, or it begins with 'auto'")
        for expert in (*recipe.members, *recipe.later):
            if expert not in names:
                raise ValueError(f"recipes.{name}: {_unknown(expert, names)}")
            if "chat" not in config.experts[expert].capabilities:
                raise ValueError(f"recipes.{name}: {expert!r} can't chat")
        if (silent := silent_member(config, recipe.recipe())) is not None:
            raise ValueError(
                f"recipes.{name}.sure: {silent!r} is remote and not known to tell log "
                f"probabilities; set experts.{silent}.remote.logprobs to true where it does, "
                "or `sure` to 0"
            )


def _check_spaces(config: Config) -> None:
    """Several experts that embed have to say whose vectors may stand in one index."""
    embedding = [name for name, e in config.experts.items() if "embeddings" in e.capabilities]
    unnamed = [name for name in embedding if config.experts[name].space is None]
    if len(embedding) > 1 and unnamed:
        raise ValueError(
            f"experts.{unnamed[0]}.space: {len(embedding)} experts embed "
            f"({', '.join(embedding)}); name the vector space of each, the same where their "
            "vectors may stand in one index"
        )


def silent_member(config: Config, recipe: Recipe) -> str | None:
    """The member of whose tokens' probabilities a recipe needs to hear, but will not."""
    if recipe.sure <= 0:
        return None
    remote = config.experts[recipe.members[0]].remote
    return recipe.members[0] if remote is not None and not remote.logprobs else None


def unknown_tenant(name: str, tenants: Collection[str]) -> str:
    """What is wrong with a tenant's name that is none of these."""
    close = difflib.get_close_matches(name, tenants, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"no tenant {name[:128]!r};{hint} tenants: {', '.join(sorted({*tenants, 'default'}))}"


def _unknown(name: str, allowed: set[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"no expert {name!r};{hint} experts: {', '.join(sorted(allowed))}"


# Every section by its place; `*` stands for a name that the user gives.
SECTIONS: dict[tuple[str, ...], type[BaseModel]] = {
    (): Config,
    ("server",): ServerConfig,
    ("server", "limits"): RequestLimits,
    ("server", "breaker"): BreakerConfig,
    ("router",): RouterConfig,
    ("telemetry",): TelemetryConfig,
    ("experts", "*"): ExpertConfig,
    ("experts", "*", "remote"): RemoteConfig,
    ("experts", "*", "price"): PriceConfig,
    ("experts", "*", "vllm"): ExpertKernels,
    ("experts", "*", "media"): MediaConfig,
    ("recipes", "*"): RecipeConfig,
    ("feedback",): FeedbackConfig,
    ("pools", "*"): PoolConfig,
    ("pools", "*", "vllm"): VllmOptions,
    ("pools", "*", "vllm", "moe_capture"): MoeCapture,
    ("pools", "*", "vllm", "eplb_config"): EplbOptions,
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
}
