"""An estimate of the memory that each pool of a config will take. Pure.

The headers of the weight files give the sizes of weights. On CPU vLLM packs linear layers beside
the parameters while it loads, so that weights count twice at the peak. The memory of a process
without a model is a measured constant.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from service.config import Config, ExpertConfig, PoolConfig
from service.engine.gpu_share import GpuShare
from service.errors import ConfigError, ModelStoreError
from service.expert_offload.slot_plan import OffloadPlan, plan_offload
from service.models import AdapterInfo, ModelInfo, inspect_model
from service.models.lora_adapters import FOLLOWED, find_misfit, name_another_base
from service.moe.option_check import check_kernels
from service.moe.virtual_expert_profiles import profile_of
from service.pool.gpu_memory_plan import ENGINE_BYTES as GPU_ENGINE_BYTES
from service.pool.gpu_memory_plan import LAYER_COPIES, share_gpus, unknown_memory
from service.pool.same_weight_experts import WeightSharing, share_weights
from service.pool.vllm_argument_effects import (
    argument_warnings,
    check_arguments,
    draft_bytes,
    kv_element_bytes,
    kv_offload_bytes,
    loaded_bytes,
    offloaded_bytes,
    share_bytes,
)

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MIB = 1024**2
# Resident memory in bytes, measured on the CPU build: a pool's process that has imported vLLM, and
# an engine core without a model.
REPLICA_BYTES = 900 * _MIB
ENGINE_BYTES = 1000 * _MIB
# A pool's process that needs no vLLM, with the keepers of its servers.
SERVERS_REPLICA_BYTES = 200 * _MIB
PACKING = 2


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """The planned memory of one engine.

    Attributes:
        base: The expert with the weights.
        adapters: The other experts of the engine.
        weight_bytes: Bytes of the weights.
        adapter_bytes: Bytes of the adapters.
        kv_bytes: Bytes of the KV caches of all workers; 0 where vLLM decides.
        kv_tokens: Tokens that the KV cache holds; 0 where vLLM decides.
        overhead_bytes: Bytes of the engine's process without a model.
        draft_bytes: Bytes of the model that drafts tokens.
        offloaded_bytes: On a GPU, bytes of weights and KV cache that vLLM keeps in host memory.
        by_command: Whether a command starts it. Its weights are then all that it takes, as the
            config says.
        asleep_bytes: Bytes of host memory that it keeps while it sleeps.
    """

    base: str
    adapters: tuple[str, ...]
    weight_bytes: int
    adapter_bytes: int
    kv_bytes: int
    kv_tokens: int
    overhead_bytes: int
    draft_bytes: int = 0
    offloaded_bytes: int = 0
    by_command: bool = False
    asleep_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The sum of the engine's bytes, without those in host memory beside a GPU."""
        weights = self.weight_bytes + self.adapter_bytes + self.draft_bytes
        return weights + self.kv_bytes + self.overhead_bytes


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The planned memory of one replica of a pool.

    Attributes:
        kind: The pool's name.
        engines: The plans of its engines.
        replica_bytes: Bytes of the pool's process without engines.
        bound_bytes: The config's bound in bytes, or None where there is no bound.
        on_gpu: Whether the engines run on GPUs.
        moe: A line for each setting for mixtures of experts.
        host_bytes: On a GPU, bytes of the weights that the engines together keep in host memory.
            They are in /dev/shm where units are swapped in place.
        warnings: A line for each setting that may not work as expected.
        notes: A line for each adapter with unusual settings that are supported, and for the swap
            method.
        shared: The experts that take no memory, each with the expert whose weights answer for it.
        gpu_shares: On a GPU, the part of the replica's GPUs that each engine takes.
    """

    kind: str
    engines: tuple[EnginePlan, ...]
    replica_bytes: int
    bound_bytes: int | None
    on_gpu: bool
    moe: tuple[str, ...] = ()
    host_bytes: int = 0
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    gpu_shares: tuple[GpuShare, ...] = ()

    @property
    def total_bytes(self) -> int:
        """The peak bytes of a replica: GPU memory on a GPU, host memory on a CPU."""
        return self.replica_bytes + sum(engine.total_bytes for engine in self.engines)

    @property
    def fits(self) -> bool:
        """Whether the replica is within its bound."""
        return self.bound_bytes is None or self.total_bytes <= self.bound_bytes


def plan_pool(
    config: Config,
    kind: str,
    inspect: Callable[[str], ModelInfo | AdapterInfo],
    inspect_folder: Callable[[Path], ModelInfo | AdapterInfo] = inspect_model,
    gpu_bytes: int | None = None,
) -> PoolPlan:
    """Plan the memory of one replica of a pool.

    Args:
        config: The config.
        kind: The pool's name in the config.
        inspect: A function that reads an expert's folder.
        inspect_folder: A function that reads the folder of a model that drafts tokens.
        gpu_bytes: The memory of one GPU in bytes, or None if it is unknown.

    Raises:
        ConfigError: An expert's folder does not match the config, or the config asks for
            something that can't be served.
        ModelStoreError: A folder could not be read.
    """
    pool = config.pools[kind]
    if pool.engine == "simulated":
        weights = share_weights(config, kind)
        return PoolPlan(kind, (), 0, pool.memory_bytes, on_gpu=False, shared=weights.shared)
    inspect = functools.cache(inspect)  # a large model has hundreds of files to read
    weights = share_weights(config, kind, None, lambda _, name: str(inspect(name).path.resolve()))
    config, named = weights.config, config
    moe = (*check_kernels(config, kind, inspect), *_offload_lines(config, kind, inspect))
    check_arguments(config, kind)
    draft = draft_bytes(
        pool, kind, inspect_folder, lambda info: weights_bytes(info, pool.vllm.dtype)
    )
    groups = config.groups(kind)
    slots = slots_of(config, kind)
    _check_offload(config, kind, config.units(kind), inspect)
    for unit in config.units(kind):
        if config.experts[unit[0]].command is None:
            _check_unit(config, unit, pool, inspect)
    grouped = [
        [_plan_unit(config, unit, pool, inspect, draft) for unit in group] for group in groups
    ]
    _check_capture(config, kind, config.units(kind), inspect)
    on_gpu = pool.gpus > 0
    shared = [group for group in grouped if slots < len(groups) or len(group) > 1]
    turns = [plan for group in shared for plan in group]
    sharing = min(slots, len(shared))
    bound = pool.swap.host_bytes
    _check_bound(config, bound, turns, sharing)
    held = sum(plan.weight_bytes for plan in turns if not plan.by_command)
    held = held if bound is None else min(bound, held)
    engines = []
    for i in range(slots):
        engine = _share([plan for group in grouped[i::slots] for plan in group])
        if slots < len(groups):
            # A unit is in one slot at a time, although it may move. A GPU holds only the weights
            # of the running unit.
            largest = max(plan.weight_bytes for plan in turns)
            own = held // slots + (held % slots if i == 0 else 0)
            engine = replace(engine, weight_bytes=largest if on_gpu else own)
            if not on_gpu:
                engine = _with_room(engine, turns, is_first=i == 0)
        engines.append(engine)
    caches = pool.swap.method == "inplace" or (
        pool.swap.method == "sleep" and pool.swap.sleep_level == 1
    )
    replica_bytes = 0
    if not on_gpu:
        by_command = all(plan.by_command for group in grouped for plan in group)
        replica_bytes = SERVERS_REPLICA_BYTES if by_command else REPLICA_BYTES
    warnings = [*_warnings(config, kind, inspect, _chatting(named, weights))]
    gpu_shares: tuple[GpuShare, ...] = ()
    if on_gpu:
        gpu_bytes = gpu_memory(pool, gpu_bytes)
        if gpu_bytes is None:
            warnings.append(f"pools.{kind}: {unknown_memory(pool)}")
        needs = [_gpu_need(engine, pool) for engine in engines]
        try:
            layer_bytes = layer_room_bytes(config, kind, inspect)
            gpu_shares = share_gpus(pool, needs, sleepers_of(config, kind), gpu_bytes, layer_bytes)
        except ValueError as error:
            raise ConfigError(f"pools.{kind}.{error}") from None
    return PoolPlan(
        kind,
        tuple(engines),
        replica_bytes,
        pool.memory_bytes,
        on_gpu,
        moe,
        (held if on_gpu and caches else 0)
        + sum(engine.offloaded_bytes for engine in engines)
        + (sum(plan.asleep_bytes for plan in turns) if on_gpu else 0),
        tuple(warnings),
        tuple(_notes(config, kind, inspect)),
        weights.shared,
        gpu_shares,
    )


def _with_room(engine: EnginePlan, turns: Sequence[EnginePlan], *, is_first: bool) -> EnginePlan:
    """Return a slot's plan on CPU with room for any server that may run there instead.

    vLLM's engine ends before a server starts in its slot. Servers that sleep are beside the one
    that runs; each is in one slot, so that the first slot counts them.
    """
    servers = [plan for plan in turns if plan.by_command]
    if not servers:
        return engine
    asleep = sum(plan.asleep_bytes for plan in servers) if is_first else 0
    needed = max(plan.weight_bytes - plan.asleep_bytes * is_first for plan in servers) + asleep
    lacking = max(0, needed - engine.total_bytes)
    return replace(engine, weight_bytes=engine.weight_bytes + lacking)


def _gpu_need(engine: EnginePlan, pool: PoolConfig) -> int:
    """Return the bytes of an engine's weights on each of its GPUs."""
    if engine.by_command:
        # It has no KV cache beside them, which the division of the GPUs adds to each engine.
        beside = GPU_ENGINE_BYTES + (pool.vllm.kv_cache_bytes or 0)
        return max(0, math.ceil(engine.weight_bytes / pool.vllm.engine_gpus) - beside)
    weights = engine.weight_bytes + engine.adapter_bytes + engine.draft_bytes
    return math.ceil(weights / pool.vllm.engine_gpus)


def gpu_memory(pool: PoolConfig, found_bytes: int | None) -> int | None:
    """Return the memory of one GPU: as it was found, or else by the config's `memory_bytes`.

    The GPUs of a replica have `memory_bytes` together.
    """
    if found_bytes is not None or pool.memory_bytes is None:
        return found_bytes
    return int(pool.memory_bytes / pool.gpus)


def sleepers_of(config: Config, kind: str) -> int:
    """Return the number of engines of a replica that sleep beside those that are awake."""
    pool = config.pools[kind]
    beside = len(config.groups(kind)) - slots_of(config, kind)
    if pool.swap.method == "sleep" or beside <= 0:
        return max(0, beside)
    commands = (config.experts[unit[0]].command for unit in config.units(kind))
    asleep = sum(command is not None and command.sleep is not None for command in commands)
    return min(beside, max(0, asleep - 1))


def slots_of(config: Config, kind: str) -> int:
    """Return the number of engines of a replica that are awake."""
    slots, groups = config.pools[kind].slots, len(config.groups(kind))
    return groups if slots is None else min(slots, groups)


def gpu_need_bytes(
    config: Config,
    kind: str,
    unit: tuple[str, ...],
    inspect: Callable[[str], ModelInfo | AdapterInfo],
) -> int:
    """Compute the bytes of a unit's weights on each GPU of its engine.

    Raises:
        ConfigError: vLLM's share of the GPUs can't hold the weights.
        ModelStoreError: A folder could not be read.
    """
    pool = config.pools[kind]
    draft = draft_bytes(
        pool, kind, inspect_model, lambda info: weights_bytes(info, pool.vllm.dtype)
    )
    return _gpu_need(_plan_unit(config, unit, pool, inspect, draft), pool)


def layer_room_bytes(
    config: Config, kind: str, inspect: Callable[[str], ModelInfo | AdapterInfo | None]
) -> int:
    """Compute the bytes of each GPU in which an engine makes a layer of another expert ready.

    An expert with quantised weights, or a mixture, is loaded beside the running one and made ready
    for its kernels layer by layer on the GPU (`SecondModel.process`). Such a load needs an engine
    of the same family.

    Args:
        config: The config.
        kind: The pool's name in the config.
        inspect: A function that reads an expert's folder. It returns None where it can't.

    Returns:
        The bytes; 0 where nothing is swapped in place, or where weights are used as they are
        stored.

    Raises:
        ModelStoreError: A folder could not be read.
    """
    pool = config.pools[kind]
    if pool.swap.method != "inplace" or slots_of(config, kind) >= len(config.groups(kind)):
        return 0
    by_family: dict[str, list[ModelInfo]] = {}
    for unit in config.units(kind):
        expert = config.experts[unit[0]]
        # A virtual expert has no weights, and adapters have an engine of their own.
        if expert.command is not None or expert.form == "steered" or len(unit) > 1:
            continue
        info = inspect(unit[0])
        if isinstance(info, ModelInfo):
            by_family.setdefault(info.family, []).append(info)
    largest = max(
        (
            math.ceil(
                info.changed_layer_bytes
                * weights_bytes(info, pool.vllm.dtype)
                / max(1, info.weight_bytes)
            )
            for infos in by_family.values()
            if len(infos) > 1
            for info in infos
        ),
        default=0,
    )
    return LAYER_COPIES * math.ceil(largest / pool.vllm.engine_gpus)


def _notes(
    config: Config, kind: str, inspect: Callable[[str], ModelInfo | AdapterInfo]
) -> Iterator[str]:
    for name in config.local_experts(kind):
        if config.experts[name].adapter is None:
            continue
        info = inspect(name)
        if not isinstance(info, AdapterInfo):
            continue
        if followed := [key for key in info.not_merged if key in FOLLOWED]:
            keys = ", ".join(followed)
            yield f"{name}: {keys} of its adapter is followed, with ranks of up to {info.rank}"


def _chatting(config: Config, weights: WeightSharing) -> dict[str, list[str]]:
    """Return the experts that chat, by the full weights that they run on."""
    found: dict[str, list[str]] = {}
    for name, held in weights.held.items():
        if "chat" in config.experts[name].capabilities:
            found.setdefault(weights.config.experts[held].base or held, []).append(name)
    return found


def _warnings(
    config: Config,
    kind: str,
    inspect: Callable[[str], ModelInfo | AdapterInfo],
    chatting: Mapping[str, Sequence[str]],
) -> Iterator[str]:
    yield from argument_warnings(config, kind)
    for name in config.local_experts(kind):
        expert = config.experts[name]
        if config.experts[config.owner_of(name)].command is not None:
            continue
        info = inspect(name if expert.adapter is not None else expert.base or name)
        if isinstance(info, AdapterInfo):
            assert expert.base is not None
            source = config.experts[expert.base].model or ""
            if (other := name_another_base(info, source)) is not None:
                yield f"experts.{name}.adapter: it was trained on {other}, and its base is {source}"
            if unknown := [key for key in info.not_merged if key not in FOLLOWED]:
                yield (
                    f"experts.{name}.adapter: {', '.join(unknown)} of its adapter_config.json is "
                    "not known here, and the engine may leave it out of account"
                )
            continue
        if expert.model is None:
            continue
        if info.second_copies:
            yield (
                f"experts.{name}.model: {info.second_copies[0]} holds the same weights once more, "
                "and an engine will read it, too; move it away, or get a copy without it: "
                f"coe models pull {expert.model}"
            )
        chats = chatting.get(name, ())
        if not info.has_chat_template and chats:
            yield (
                f"experts.{name}.model: no chat template in its folder, so that requests to chat "
                "may be refused; put a chat_template.jinja there, or set capabilities: "
                f"[completions] for {', '.join(chats)}"
            )


def _check_adapter(
    name: str, expert: ExpertConfig, adapter: ModelInfo | AdapterInfo, base: ModelInfo
) -> AdapterInfo:
    """Return the adapter of an expert.

    Raises:
        ConfigError: The engine can't serve the adapter on this base.
    """
    where = f"experts.{name}.adapter"
    if not isinstance(adapter, AdapterInfo):
        raise ConfigError(f"{where}: this folder holds a model, not an adapter")
    if expert.form == "merged" and adapter.not_merged:
        raise ConfigError(
            f"{where}: {adapter.not_merged[0]} of its adapter_config.json can't be merged; "
            "use form: adapter"
        )
    # Quantised weights are packed under other names and shapes, so they can't be compared.
    if base.quantization is None and (why := find_misfit(adapter, base.shapes)) is not None:
        raise ConfigError(f"{where}: it is of another base than {expert.base!r}: {why}")
    return adapter


def _check_bound(
    config: Config, bound: int | None, units: Sequence[EnginePlan], slots: int
) -> None:
    """Check that the pool's bound can hold the weights that must be in host memory at once.

    Raises:
        ConfigError: The weights exceed the bound.
    """
    if bound is None or not units:
        return
    # A pinned virtual expert pins the weights that it runs on.
    names = {config.needs(n) or n for n, expert in config.experts.items() if expert.pinned}
    pinned = sum(plan.weight_bytes for plan in units if plan.base in names)
    loose = sorted((plan.weight_bytes for plan in units if plan.base not in names), reverse=True)
    most = pinned + sum(loose[:slots])
    if most <= bound:
        return
    what = "the largest expert" if slots == 1 else f"the largest experts of its {slots} slots"
    raise ConfigError(
        f"pools: swap.host_bytes is {_gib(bound)} for a pool's slots together, and "
        f"{_gib(most, up=True)} are needed for {what}" + (" and the pinned ones" if pinned else "")
    )


def _check_capture(
    config: Config,
    kind: str,
    units: Sequence[tuple[str, ...]],
    inspect: Callable[[str], ModelInfo | AdapterInfo],
) -> None:
    if config.pools[kind].vllm.moe_capture is None:
        return
    names = [config.experts[unit[0]].base or unit[0] for unit in units]
    infos = [inspect(name) for name in names if config.experts[name].command is None]
    if not any(isinstance(info, ModelInfo) and info.is_moe for info in infos):
        raise ConfigError(
            f"pools.{kind}.vllm.moe_capture: none of its experts is a mixture of experts, so "
            "there are no routers to look at"
        )


def _check_offload(
    config: Config,
    kind: str,
    units: Sequence[tuple[str, ...]],
    inspect: Callable[[str], ModelInfo | AdapterInfo],
) -> None:
    """Check that the experts of a pool with `expert_offload` run on engines of their own.

    Raises:
        ConfigError: None of them is a mixture, or one runs on an engine whose weights are swapped.
    """
    pool = config.pools[kind]
    if pool.vllm.expert_offload is None:
        return
    where = f"pools.{kind}.vllm.expert_offload"
    own = [unit[0] for unit in units if config.experts[unit[0]].command is None]
    infos = [inspect(config.experts[name].base or name) for name in own]
    if not any(isinstance(info, ModelInfo) and info.is_moe for info in infos):
        raise ConfigError(f"{where}: none of its experts is a mixture of experts")
    for name in own:
        if config.experts[name].form in ("merged", "steered"):
            raise ConfigError(
                f"{where}: {name!r} is {config.experts[name].form}, and changes the weights or "
                "gates of a running engine; allowed are experts with weights of their own"
            )
    if slots_of(config, kind) < len(config.groups(kind)) and pool.swap.method != "respawn":
        raise ConfigError(
            f"{where}: its experts share slots, and a running engine can't take over the weights "
            "of another mixture; allowed are a slot for each expert, and swap.method: respawn"
        )


def _offload_plan(pool: PoolConfig, name: str, info: ModelInfo) -> OffloadPlan | None:
    """Return the plan of a mixture's slots; None where all experts are in memory.

    Raises:
        ConfigError: The experts can't be held in slots.
    """
    if (offload := pool.vllm.expert_offload) is None or not info.is_moe:
        return None
    weights = weights_bytes(info, pool.vllm.dtype)
    element = _element_bytes(info, pool.vllm.dtype)
    try:
        return plan_offload(info, offload.bytes, weight_bytes=weights, element_bytes=element)
    except ValueError as error:
        raise ConfigError(f"experts.{name}.model: vllm.expert_offload: {error}") from None


def _offload_lines(
    config: Config, kind: str, inspect: Callable[[str], ModelInfo | AdapterInfo]
) -> Iterator[str]:
    pool = config.pools[kind]
    if (offload := pool.vllm.expert_offload) is None:
        return
    for name in config.local_experts(kind):
        if config.experts[name].model is None or not isinstance(info := inspect(name), ModelInfo):
            continue
        if (plan := _offload_plan(pool, name, info)) is not None:
            yield (
                f"{name}: {plan.slots} of {plan.experts} routed experts of each of {plan.layers} "
                f"layers in memory, {_gib(plan.slot_bytes)}; policy {offload.policy}, prefetch "
                f"{offload.prefetch}"
            )


def _share(plans: list[EnginePlan]) -> EnginePlan:
    """Plan one engine for several units: one runs, and the others are in host memory."""
    # Only vLLM's engines have what the first one stands for, such as a KV cache.
    first, *others = sorted(plans, key=lambda plan: plan.by_command)
    if not others:
        return first
    kv_tokens = [plan.kv_tokens for plan in plans if not plan.by_command]
    return EnginePlan(
        base=first.base,
        adapters=(*first.adapters, *(n for plan in others for n in (plan.base, *plan.adapters))),
        weight_bytes=sum(plan.weight_bytes for plan in plans),
        adapter_bytes=max(plan.adapter_bytes for plan in plans),
        kv_bytes=first.kv_bytes,
        kv_tokens=min(kv_tokens, default=0),
        overhead_bytes=first.overhead_bytes,
        draft_bytes=first.draft_bytes,
        offloaded_bytes=max(plan.offloaded_bytes for plan in plans),
        by_command=first.by_command,
    )


def _model_of(
    config: Config, expert: str, inspect: Callable[[str], ModelInfo | AdapterInfo]
) -> ModelInfo:
    """Return the model whose weights an expert runs on.

    Raises:
        ConfigError: The expert's folder has no model.
    """
    info = inspect(config.experts[expert].base or expert)
    if not isinstance(info, ModelInfo):
        raise ConfigError(f"experts.{expert}.model: this folder holds an adapter, not a model")
    return info


def _check_unit(
    config: Config,
    unit: tuple[str, ...],
    pool: PoolConfig,
    inspect: Callable[[str], ModelInfo | AdapterInfo],
) -> None:
    """Check that an engine of this pool can run a unit.

    Raises:
        ConfigError: The engine can't run the unit.
    """
    base, *adapters = unit
    expert, options = config.experts[base], pool.vllm
    where = f"experts.{base}.model"
    info = _model_of(config, base, inspect)
    if not info.has_tokenizer:
        raise ConfigError(
            f"{where}: no tokenizer in its folder (tokenizer.json, tokenizer.model or the like); "
            "put that of its base model there"
        )
    if expert.form == "merged":
        _check_adapter(base, expert, inspect(base), info)
    if expert.form == "steered":
        _check_steered(config, base, pool, info)
    if expert.form == "merged" and info.quantization:
        raise ConfigError(
            f"experts.{base}.form: its base is quantised ({info.quantization}), and nothing can be "
            "merged into such weights; use form: adapter"
        )
    if expert.form == "merged" and pool.gpus > 0:
        raise ConfigError(f"experts.{base}.form: merged is for pools on CPU; on a GPU use adapter")
    is_swapped = pool.slots is not None or expert.form == "merged"
    if is_swapped and pool.gpus == 0 and not options.enforce_eager:
        raise ConfigError(
            "pools: merged experts, and experts that share a slot, need vllm.enforce_eager: true "
            "on CPU; compiled code would go on using the first expert's weights"
        )
    if info.needs_custom_code and not options.trust_remote_code:
        raise ConfigError(
            f"{where}: this model brings its own code, which is not run; "
            "set vllm.trust_remote_code to allow it"
        )
    longest = options.max_model_len
    if longest is not None and longest > info.max_context_tokens:
        raise ConfigError(
            f"pools: vllm.max_model_len is {longest}, but {base!r} was made for at most "
            f"{info.max_context_tokens} tokens"
        )
    if adapters and info.is_moe and pool.gpus == 0:
        raise ConfigError(f"{where}: LoRA on a mixture-of-experts model needs a GPU")
    for name in adapters:
        adapter = _check_adapter(name, config.experts[name], inspect(name), info)
        if adapter.rank > options.max_lora_rank:
            raise ConfigError(
                f"experts.{name}.adapter: its rank is {adapter.rank}, "
                f"and vllm.max_lora_rank is {options.max_lora_rank}"
            )
    _check_kv_cache(base, pool, info)


def _check_kv_cache(base: str, pool: PoolConfig, info: ModelInfo) -> None:
    """Check that the KV cache can hold one request of the longest context.

    Raises:
        ConfigError: The KV cache is too small.
    """
    kv_bytes = pool.vllm.kv_cache_bytes or 0
    element = kv_element_bytes(pool, _element_bytes(info, pool.vllm.dtype))
    context = pool.vllm.max_model_len or info.max_context_tokens
    parts = _kv_parts(pool, info)
    least = math.ceil(info.least_kv_bytes(context, element) / parts)
    if kv_bytes and kv_bytes < least:
        fits = _longest(info, kv_bytes * parts, element, context)
        raise ConfigError(
            f"pools: vllm.kv_cache_bytes holds {fits} tokens of {base!r}, fewer than one "
            f"request of max_model_len {context} may need; give it at least "
            f"{least} bytes, or set vllm.max_model_len to at most {fits}"
        )


def _kv_parts(pool: PoolConfig, info: ModelInfo) -> int:
    """Return the number of workers among which the keys and values of one token are divided.

    `vllm.kv_cache_bytes` is that of one worker. Tensor parallel workers divide the heads, and have
    copies where there are fewer heads than workers; pipeline parallel ones divide the layers.
    """
    workers = pool.vllm.tensor_parallel_size
    return min(workers, info.kv_heads) * pool.vllm.parallel("pipeline_parallel_size")


def _plan_unit(
    config: Config,
    unit: tuple[str, ...],
    pool: PoolConfig,
    inspect: Callable[[str], ModelInfo | AdapterInfo],
    draft: int,
) -> EnginePlan:
    """Plan an engine that runs one unit. The unit has passed `_check_unit`.

    Raises:
        ConfigError: vLLM's share of the GPUs can't hold the weights.
    """
    base, *adapters = unit
    if (command := config.experts[base].command) is not None:
        size, asleep = command.memory_bytes, command.sleep_bytes
        return EnginePlan(base, (), size, 0, 0, 0, 0, by_command=True, asleep_bytes=asleep)
    info = _model_of(config, base, inspect)
    on_gpu = pool.gpus > 0
    element = _element_bytes(info, pool.vllm.dtype)
    # A virtual expert runs on its base's weights, which count for the base.
    is_virtual = config.experts[base].form == "steered"
    weights = 0 if is_virtual else weights_bytes(info, pool.vllm.dtype)
    weights = loaded_bytes(pool, info, weights)
    infos = [inspect(name) for name in adapters]
    parameters = sum(info.parameters for info in infos if isinstance(info, AdapterInfo))
    ranks = pool.vllm.parallel("data_parallel_size")  # each has its own weights and KV cache
    kv_bytes = (pool.vllm.kv_cache_bytes or 0) * pool.vllm.engine_gpus
    offloaded = offloaded_bytes(pool, weights * ranks)
    # vLLM packs all other weights beside the parameters.
    slots = _offload_plan(pool, base, info)
    on_cpu = weights * PACKING if slots is None else slots.other_bytes * PACKING + slots.peak_bytes
    plan = EnginePlan(
        base=base,
        adapters=tuple(adapters),
        weight_bytes=weights * ranks - offloaded if on_gpu else on_cpu,
        adapter_bytes=parameters * element * ranks,
        kv_bytes=kv_bytes,
        kv_tokens=0,
        overhead_bytes=0 if on_gpu else ENGINE_BYTES,
        draft_bytes=draft * ranks if on_gpu else draft * PACKING,
        offloaded_bytes=offloaded + kv_offload_bytes(pool),
    )
    if (share := share_bytes(pool)) is not None:
        if share <= plan.total_bytes:
            raise ConfigError(
                f"pools: vllm.args.gpu_memory_utilization leaves {_gib(share)} of memory_bytes to "
                f"{base!r}, whose weights take {_gib(plan.total_bytes, up=True)}"
            )
        kv_bytes = share - plan.total_bytes
    per_token = info.kv_bytes_per_token(kv_element_bytes(pool, element))
    # Each data parallel rank holds tokens of its own.
    tokens = kv_bytes * _kv_parts(pool, info) * ranks // (pool.vllm.engine_gpus * per_token)
    return replace(plan, kv_bytes=kv_bytes, kv_tokens=tokens)


def _longest(info: ModelInfo, kv_bytes: int, element: int, context: int) -> int:
    """Compute the tokens of the longest request that a KV cache may hold, below `context`."""
    low, high = 0, context
    while high - low > 1:
        middle = (low + high) // 2
        fits = info.least_kv_bytes(middle, element) <= kv_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low


def _check_steered(config: Config, name: str, pool: PoolConfig, info: ModelInfo) -> None:
    """Check that a virtual expert can be served.

    Raises:
        ConfigError: The pool or the base doesn't allow it.
        InvalidProfileError: Its profile does not fit this model.
    """
    where = f"experts.{name}"
    if pool.gpus > 0 and pool.swap.method == "sleep":
        raise ConfigError(
            f"{where}.profile: swap.method sleep has an engine for each expert, and a virtual one "
            "runs in its base's; use auto, inplace or respawn"
        )
    if pool.vllm.eplb_config.num_redundant_experts:
        raise ConfigError(
            f"{where}.profile: vllm.eplb_config.num_redundant_experts: copies of experts would be "
            "chosen among, and a profile is for the model's own; set it to 0"
        )
    if pool.gpus == 0 and not pool.vllm.enforce_eager:
        raise ConfigError(
            f"{where}.profile: virtual experts need vllm.enforce_eager: true on CPU; compiled code "
            "would go on with the gates as they were compiled"
        )
    base = config.experts[name].base
    if any(e.base == base and e.form == "adapter" for e in config.experts.values()):
        raise ConfigError(
            f"{where}.base: {base!r} has adapters beside it; an engine made for these can't be "
            "steered"
        )
    profile_of(config, name, info.path)


def weights_bytes(info: ModelInfo, dtype: str) -> int:
    """Compute the bytes of a model's weights in memory.

    Args:
        info: The model.
        dtype: The dtype of the weights in memory; `auto` keeps the dtype of the files.
    """
    element = _element_bytes(info, dtype)
    stored = _ELEMENT_BYTES.get(info.dtype, element)
    return info.weight_bytes if info.quantization else info.weight_bytes * element // stored


def _element_bytes(info: ModelInfo, dtype: str) -> int:
    return _ELEMENT_BYTES.get(info.dtype if dtype == "auto" else dtype, 2)


def check_plan(plan: PoolPlan, machine_bytes: int | None) -> None:
    """Check a plan against its bound, and on CPU against the machine's memory.

    Raises:
        ConfigError: The plan exceeds the bound or the machine's memory.
    """
    if not plan.fits:
        assert plan.bound_bytes is not None
        raise ConfigError(
            f"pools.{plan.kind}.memory_bytes: the experts need {_gib(plan.total_bytes)}, "
            f"and only {_gib(plan.bound_bytes)} are allowed"
        )
    if machine_bytes is not None and not plan.on_gpu and plan.total_bytes > machine_bytes:
        raise ConfigError(
            f"pools.{plan.kind}: the experts need {_gib(plan.total_bytes)}, "
            f"and this machine has {_gib(machine_bytes)}"
        )


def _gib(size: int, *, up: bool = False) -> str:
    shown = size / 1024**3
    return f"{math.ceil(shown * 100) / 100 if up else shown:.2f} GiB"


def folders_of(config: Config, found: Mapping[str, Path]) -> dict[str, Path]:
    """Return each local expert's folder.

    Args:
        config: The config.
        found: The folders of models by their source.

    Returns:
        The folder of each expert's adapter or else of its model, by the expert's name.

    Raises:
        ModelStoreError: A model is not on this machine yet.
    """
    folders: dict[str, Path] = {}
    for name, expert in config.experts.items():
        if expert.adapter is not None:
            folders[name] = Path(expert.adapter)
        elif expert.model is not None and expert.model in found:
            folders[name] = found[expert.model]
        elif expert.model is not None:
            raise ModelStoreError(
                f"experts.{name}.model: {expert.model!r} is not here yet; "
                f"get it with: coe models pull {expert.model}"
            )
    return folders
