"""The config file: its schema, and reading it into it.

One YAML file describes a composition. Unknown keys are refused, and every error
names the file, the path in it, what is wrong and what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from service.errors import ConfigError

GIB = 1024**3
_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b?|b)?\s*$", re.IGNORECASE)
_BYTE_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for base, suffixes in ((1000, ("b", "")), (1024, ("ib", "i")))
    for suffix in suffixes
}


def parse_bytes(value: object) -> object:
    """Turn `"512MiB"`, `"2 GB"` or a plain number into bytes; leave the rest to pydantic."""
    if isinstance(value, str):
        match = _BYTES.match(value)
        if match is None:
            raise ValueError(
                'input should be a number of bytes, or one with a unit such as "512MiB" or "2GB", '
                f"not {_shown(value)}"
            )
        return int(float(match[1]) * _BYTE_UNITS[(match[2] or "").lower()])
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]


class ServerConfig(_Section):
    """The HTTP side: where it listens and what it accepts."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    gateways: int = Field(1, ge=1, le=64, description="Gateway replicas (processes without a GPU).")
    max_body_bytes: Bytes = Field(
        8 * 1024**2, description="Largest request body accepted, in bytes; more gets 413."
    )
    deadline_ms: int = Field(
        120_000,
        ge=1,
        description="Default deadline of a request in ms: to the first token when streaming, "
        "else to the end. A request may set its own with the header x-coe-deadline-ms.",
    )
    drain_s: float = Field(
        30.0, ge=0, description="Longest time to let running requests finish at a stop, in s."
    )
    access_log: bool = Field(
        False, description="Log one line per request: id, path, status, expert, ms. Never prompts."
    )


class RouterConfig(_Section):
    """Stage 1 (the classifier) and what to do where it is unsure."""

    artifact: str | None = Field(
        None,
        description="Folder of a router artifact, relative to this file. Without one, `auto` "
        "always means `fallback`.",
    )
    fallback: str | None = Field(
        None,
        description="Expert for prompts of category `general` or of a category that no expert "
        "names. Default: the first expert that names category `general`, else the first expert.",
    )


class RemoteConfig(_Section):
    """A model behind somebody else's OpenAI-compatible API."""

    url: str = Field(
        pattern=r"^https?://[^\s]+$", description="Base URL, with the /v1 where it has one."
    )
    model: str = Field(description="The model's name there.")
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Z_][A-Z0-9_]{0,63}$",
        description="Environment variable that holds the key. Never the key itself.",
    )
    max_in_flight: int = Field(64, ge=1, description="Requests under way at once; more wait.")
    max_queue: int = Field(256, ge=0, description="Requests that may wait; more get 503.")
    connect_timeout_s: float = Field(5.0, gt=0, description="Time to connect, in s.")


class ExpertConfig(_Section):
    """One named model: full weights (`model`), LoRA (`base` + `adapter`), or `remote`."""

    model: str | None = Field(
        None, description="Full weights: a name from `coe models list`, a folder, or a hub id."
    )
    base: str | None = Field(None, description="LoRA: the expert that has the base's full weights.")
    adapter: str | None = Field(None, description="LoRA: folder of the adapter.")
    remote: RemoteConfig | None = Field(None, description="A remote endpoint.")
    form: Literal["adapter", "merged"] = Field(
        "adapter",
        description="How an adapter is served. adapter: beside its base, in one batch with it. "
        "merged: added to the base's weights once, as full weights of the base's family; "
        "faster on CPU, and a swap away.",
    )
    strength: float = Field(
        1.0, gt=0, le=4, description="merged: how much of the adapter is added."
    )
    pinned: bool = Field(
        False, description="Keep its weights in host memory, whatever else wants the room."
    )
    categories: tuple[str, ...] = Field(
        (), description="Categories that `auto` sends to this expert."
    )
    quality: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict,
        description="Expected quality by category, in [0, 1]. Default: 1 on categories that it "
        "is the first to name, 0.5 elsewhere for the fallback, 0 elsewhere for others.",
    )
    description: str = Field("", description="One line for people, shown in /v1/models.")
    capabilities: tuple[Literal["chat", "completions", "embeddings", "tools", "json"], ...] = Field(
        ("chat", "completions", "tools", "json"), description="What it can be asked for."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> ExpertConfig:
        kinds = [self.model is not None, self.base is not None, self.remote is not None]
        if sum(kinds) != 1:
            raise ValueError("exactly one of model, base (with adapter), remote")
        if (self.base is None) != (self.adapter is None):
            raise ValueError("base and adapter go together")
        if self.adapter is None and self.form == "merged":
            raise ValueError("form merged needs base and adapter")
        if self.form == "adapter" and self.strength != 1.0:
            raise ValueError("strength needs form merged")
        return self


class VllmOptions(_Section):
    """How vLLM runs in a pool. Names follow vLLM's own where it has one."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "auto", description="Weights and activations. On CPU float32 is often the fastest."
    )
    max_model_len: int | None = Field(
        None, ge=16, description="Context in tokens, prompt and answer. Default: the model's own."
    )
    kv_cache_bytes: Bytes | None = Field(
        None,
        description="KV cache of each engine, in bytes. Needed on CPU; on a GPU the default is "
        "vLLM's own share of the free memory.",
    )
    max_num_seqs: int = Field(32, ge=1, description="Sequences in one batch.")
    threads: int = Field(
        1, ge=1, description="OMP threads of each engine on CPU. Too many make it crawl."
    )
    enforce_eager: bool = Field(False, description="No compilation: starts minutes sooner on CPU.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one engine.")
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = Field(8, description="Largest adapter rank.")
    moe_backend: str = Field(
        "auto", description="Kernels for mixture-of-experts layers, as vLLM names them."
    )
    tool_call_parser: str | None = Field(
        None, description="vLLM's parser for tool calls; needed for tool_choice auto."
    )
    reasoning_parser: str | None = Field(None, description="vLLM's parser for reasoning text.")
    media_domains: tuple[str, ...] = Field(
        (),
        description="Hosts that images, audio and video in a request may be fetched from. "
        "Default: none; data URLs are always allowed.",
    )
    trust_remote_code: bool = Field(
        False, description="Run code from model folders. Off: a model folder is data."
    )


class SwapOptions(_Section):
    """How the experts of a pool that share a slot take turns."""

    min_stay_s: float = Field(
        1.0, ge=0, description="Shortest time an expert with work keeps the slot, in s."
    )
    max_wait_s: float = Field(
        30.0, gt=0, description="Bound on waiting for a swap that the slot aims at, in s."
    )
    host_bytes: Bytes | None = Field(
        None,
        description="Memory for experts' weights in a slot, the running one's included, in bytes. "
        "Default: no bound.",
    )
    prefetch: bool = Field(
        True, description="Bring the experts most in demand to host memory before they are asked."
    )
    canary_every: int = Field(
        50,
        ge=1,
        description="Every how many swaps of an expert its first greedy tokens are compared with "
        "those of its first load.",
    )


class SimulatedOptions(_Section):
    """The simulated engine: deterministic text at set speeds, for tests and load tests only."""

    load_s: float = Field(0.0, ge=0, description="Time to start an engine, in s.")
    fill_s: float = Field(0.0, ge=0, description="Time to bring an expert to host memory, in s.")
    swap_s: float = Field(0.0, ge=0, description="Time of a swap in place, in s.")
    prefill_tokens_per_s: float = Field(
        0.0, ge=0, description="Prompt tokens per second; 0: at once."
    )
    decode_ms: float = Field(0.0, ge=0, description="Time per chunk of one token, in ms.")
    tokens: int = Field(16, ge=1, description="Tokens in an answer that sets no max_tokens.")
    max_model_len: int = Field(2048, ge=16, description="Context in tokens.")
    max_num_seqs: int = Field(256, ge=1, description="Requests that run at once.")
    fail: Literal["none", "load", "first_byte", "mid_stream"] = Field(
        "none", description="Where it breaks on purpose."
    )


class PoolConfig(_Section):
    """One kind of pool: a Ray Serve deployment `pool-<kind>`, one replica per accelerator group."""

    engine: Literal["vllm", "simulated"] = Field("vllm", description="What runs the experts.")
    experts: tuple[str, ...] | None = Field(
        None,
        description="Experts that this kind may hold. Default: every expert that is not remote.",
    )
    slots: int | None = Field(
        None,
        ge=1,
        description="Engines of a replica. Default: one for each expert with full weights. With "
        "fewer, experts share them and are swapped in when asked for.",
    )
    min_replicas: int = Field(1, ge=0, le=1024, description="Replicas kept running.")
    max_replicas: int | None = Field(
        None, ge=1, le=1024, description="Replicas under load. Default: min_replicas (at least 1)."
    )
    target_queued: float = Field(
        16.0, gt=0, description="Requests running or waiting per replica that autoscaling aims at."
    )
    gpus: float = Field(0, ge=0, description="GPUs a replica asks Ray for.")
    cpus: float = Field(0.5, ge=0, description="CPUs a replica asks Ray for (placement only).")
    memory_bytes: Bytes | None = Field(
        None, description="Memory a replica may use, in bytes; the memory plan is held against it."
    )
    max_queue: int = Field(
        256, ge=0, description="Requests that may wait per expert; more get 503."
    )
    vllm: VllmOptions = Field(default_factory=lambda: VllmOptions())
    swap: SwapOptions = Field(default_factory=lambda: SwapOptions())
    simulated: SimulatedOptions = Field(default_factory=lambda: SimulatedOptions())

    @model_validator(mode="after")
    def _replicas(self) -> PoolConfig:
        if self.max_replicas is not None and self.max_replicas < max(1, self.min_replicas):
            raise ValueError("max_replicas is at least min_replicas, and at least 1")
        return self

    @property
    def most_replicas(self) -> int:
        """`max_replicas`, or its default."""
        return self.max_replicas if self.max_replicas is not None else max(1, self.min_replicas)

    @property
    def max_running(self) -> int:
        """Requests that one engine runs at once; the rest wait in the pool's queues."""
        if self.engine == "simulated":
            return self.simulated.max_num_seqs
        return self.vllm.max_num_seqs


class Config(_Section):
    """A whole composition."""

    server: ServerConfig = Field(default_factory=lambda: ServerConfig())
    router: RouterConfig = Field(default_factory=lambda: RouterConfig())
    models_dir: str | None = Field(
        None, description="Where models are kept. Default: $COE_MODELS or ~/.cache/coe/models."
    )
    experts: dict[Name, ExpertConfig] = Field(description="The experts, by name.", min_length=1)
    pools: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")], PoolConfig] = Field(
        default_factory=dict, description="The pools, by kind."
    )

    @model_validator(mode="after")
    def _names_meet(self) -> Config:
        _check_names(self)
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
        """Names of the experts that pools of this kind hold, bases before their adapters."""
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
        goes on with the adapters of it.
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
            if self.experts[name].model is not None or self.experts[name].form == "merged"
        )

    def model_sources(self) -> dict[str, str]:
        """Where the weights come from that pools with real engines need: expert → source."""
        return {
            name: source
            for kind, pool in self.pools.items()
            if pool.engine == "vllm"
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
                raise ValueError(
                    f"pools.{kind}.experts: {name!r} is an adapter of {base_name!r}, which is "
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


def _unknown(name: str, allowed: set[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"no expert {name!r};{hint} experts: {', '.join(sorted(allowed))}"


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, that refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_config(text: str, source: str) -> Config:
    """Parse and validate a config; `source` is named in errors.

    Raises ConfigError with one line per fault.
    """
    try:
        data = yaml.load(text, _Loader)  # a safe loader, made stricter
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        at = f" line {where.line + 1}, column {where.column + 1}" if where else ""
        problem = getattr(error, "problem", None) or "can't be read"
        raise ConfigError(f"{source}:{at} not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a mapping with the key `experts` is needed at the top")
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(error, source))) from None


def _faults(error: ValidationError, source: str) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        path = ".".join(str(part) for part in fault["loc"] if part != "[key]")
        said = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            allowed = sorted(_keys_at(fault["loc"][:-1]))
            close = difflib.get_close_matches(str(fault["loc"][-1]), allowed, n=1)
            hint = f" did you mean {close[0]!r}?" if close else ""
            said = f"unknown key;{hint} allowed: {', '.join(allowed)}"
        elif fault["type"] == "missing":
            said = "missing, and it has no default"
        elif fault["loc"][-1:] == ("api_key_env",):
            # Not shown: somebody may have put the key itself here.
            said = "the name of an environment variable is needed, in capitals"
        elif fault["type"] != "value_error":
            said = f"{said[0].lower()}{said[1:]}, not {_shown(fault['input'])}"
        yield f"{source}: {path + ': ' if path else ''}{said}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(path: tuple[int | str, ...]) -> set[str]:
    # By kind of place, not by name: an expert or a pool may well be called "vllm".
    sections: dict[tuple[str, ...], type[BaseModel]] = {
        (): Config,
        ("server",): ServerConfig,
        ("router",): RouterConfig,
        ("experts", "*"): ExpertConfig,
        ("experts", "*", "remote"): RemoteConfig,
        ("pools", "*"): PoolConfig,
        ("pools", "*", "vllm"): VllmOptions,
        ("pools", "*", "swap"): SwapOptions,
        ("pools", "*", "simulated"): SimulatedOptions,
    }
    place = tuple("*" if i == 1 else str(part) for i, part in enumerate(path))
    return set(sections[place].model_fields)


def load_config(path: Path) -> Config:
    """Read a config file. Paths in it are taken relative to it. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    return _anchored(parse_config(text, str(path)), path.resolve().parent)


def _anchored(config: Config, folder: Path) -> Config:
    """Make the relative paths in a config absolute, so that every process reads them alike."""

    def at(value: str) -> str:
        return str((folder / Path(value).expanduser()).resolve())

    def looks_like_path(value: str) -> bool:
        return value.startswith(("./", "../", "/", "~"))

    experts = {
        name: expert.model_copy(
            update={
                "adapter": at(expert.adapter) if expert.adapter is not None else None,
                "model": at(expert.model)
                if expert.model is not None and looks_like_path(expert.model)
                else expert.model,
            }
        )
        for name, expert in config.experts.items()
    }
    artifact = config.router.artifact
    return config.model_copy(
        update={
            "experts": experts,
            "router": config.router.model_copy(
                update={"artifact": at(artifact) if artifact is not None else None}
            ),
            "models_dir": at(config.models_dir) if config.models_dir is not None else None,
        }
    )
