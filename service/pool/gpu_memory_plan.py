"""The division of a replica's GPUs among its engines. Pure.

vLLM's `request_memory` lets an engine start only where `gpu_memory_utilization` times the whole
memory of each of its GPUs is free, whatever the engine will take. So engines that share a GPU need
shares that fit beside each other, in whichever order they start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from service.config import PoolConfig
from service.engine.gpu_share import GpuShare

_GIB = 1024**3
# vLLM's own default. The rest is for the driver and for fragments.
VLLM_SHARE = 0.92
# Not measured: the context, workspace and captured graphs of an engine, and of one that sleeps.
ENGINE_BYTES = 2 * _GIB
SLEEPER_BYTES = 1 * _GIB
# Not measured: a layer as it is stored, as its kernels want it, and what making it takes, such as
# the routed experts that Marlin packs one after another before it joins them.
LAYER_COPIES = 3
_STEPS = 10_000


def share_gpus(
    pool: PoolConfig,
    needs: Sequence[int],
    sleepers: int,
    gpu_bytes: int | None,
    layer_bytes: int = 0,
) -> tuple[GpuShare, ...]:
    """Compute each slot's GPUs and its share of their memory.

    Args:
        pool: A pool on GPUs.
        needs: Bytes of each slot's weights on each of its GPUs, without the KV cache.
        sleepers: Engines that may sleep on one GPU beside those that are awake.
        gpu_bytes: The memory of one GPU in bytes, or None if it is unknown.
        layer_bytes: Bytes of each of its GPUs that an engine needs beside its share, to make a
            layer of another expert ready.

    Returns:
        The share of each slot, in the order of `needs`.

    Raises:
        ValueError: Some engine could not start, or some GPU would have none.
    """
    groups = gpu_groups(pool, len(needs))
    here = [list(needs[i :: len(groups)]) for i in range(len(groups))]
    most = max(map(len, here))
    given = pool.vllm.args.get("gpu_memory_utilization")
    if given is not None:
        _check_given(pool, float(given), here, sleepers, gpu_bytes, layer_bytes)
        shares = [float(given)] * len(needs)
    else:
        shares = [utilization(pool, need, most, sleepers, gpu_bytes, layer_bytes) for need in needs]
        if gpu_bytes is not None:
            _check_room(pool, here, shares[0], sleepers, gpu_bytes, layer_bytes)
    return tuple(
        GpuShare(share, groups[i % len(groups)] if len(groups) > 1 else (), layer_bytes)
        for i, share in enumerate(shares)
    )


def gpu_groups(pool: PoolConfig, slots: int) -> list[tuple[int, ...]]:
    """Return the groups of GPUs that engines take. Slots take them in turn.

    Raises:
        ValueError: GPUs would be left over.
    """
    size = pool.vllm.engine_gpus
    if pool.gpus < 1:
        return [(0,)]
    whole = int(pool.gpus)
    if whole % size:
        raise ValueError(
            f"gpus: an engine takes {size} GPUs, so that {whole % size} of {whole} would be left "
            f"over; set it to a multiple of {size}"
        )
    count = whole // size
    if slots < count:
        raise ValueError(
            f"gpus: engines of this replica: {slots}, GPUs of an engine: {size}, so that "
            f"{whole - slots * size} of {whole} GPUs would be left over; set it to {slots * size}, "
            "or raise vllm.tensor_parallel_size or slots"
        )
    return [tuple(range(i * size, (i + 1) * size)) for i in range(count)]


def utilization(
    pool: PoolConfig,
    need: int,
    engines: int,
    sleepers: int,
    gpu_bytes: int | None,
    layer_bytes: int = 0,
) -> float:
    """Compute an engine's `gpu_memory_utilization` where the operator gave none.

    Args:
        pool: A pool on GPUs.
        need: Bytes of the engine's weights on each of its GPUs, without the KV cache.
        engines: Engines that share a GPU of this replica, without those that sleep.
        sleepers: Engines that may sleep on one GPU beside those.
        gpu_bytes: The memory of one GPU in bytes, or None if it is unknown.
        layer_bytes: Bytes that the engine needs beside its share, for a layer of another expert.

    Returns:
        A share of the GPU's whole memory. Where the KV cache has a size, the share is that of the
        engine's memory, and otherwise an equal part without those bytes.
    """
    share = VLLM_SHARE * min(1.0, pool.gpus)
    if gpu_bytes is None:
        part = share / engines
    elif pool.vllm.kv_cache_bytes is not None:
        part = min(share, (need + pool.vllm.kv_cache_bytes + ENGINE_BYTES) / gpu_bytes)
    else:
        beside = sleepers * SLEEPER_BYTES + engines * layer_bytes
        part = (share - beside / gpu_bytes) / engines
    return max(1, math.floor(part * _STEPS)) / _STEPS


def _check_room(
    pool: PoolConfig,
    here: Sequence[Sequence[int]],
    part: float,
    sleepers: int,
    gpu_bytes: int,
    layer_bytes: int,
) -> None:
    """Check that the engines of each GPU fit beside each other and beside the sleepers."""
    share = VLLM_SHARE * min(1.0, pool.gpus)
    kv_bytes = pool.vllm.kv_cache_bytes
    for needs in here:
        room = share * gpu_bytes - sleepers * SLEEPER_BYTES - len(needs) * layer_bytes
        beside = _beside(sleepers, layer_bytes)
        if kv_bytes is not None:
            needed = sum(needs) + len(needs) * (kv_bytes + ENGINE_BYTES)
            if needed > room:
                raise ValueError(
                    f"gpus: engines that share a GPU: {len(needs)}; they need {_gib(needed)} of it "
                    f"(weights, KV cache and {_gib(ENGINE_BYTES)} each), and {_gib(max(0.0, room))}"
                    f" of {_gib(gpu_bytes)} are for them{beside}; set fewer slots, more gpus, or a "
                    "smaller vllm.kv_cache_bytes"
                )
        elif (needed := max(needs) + ENGINE_BYTES) >= part * gpu_bytes or room <= 0:
            raise ValueError(
                f"gpus: engines that share a GPU: {len(needs)}; each has {_gib(max(0.0, room))} / "
                f"{len(needs)} of {_gib(gpu_bytes)}{beside}, which leaves no KV cache to one that "
                f"needs {_gib(needed)} without it; set fewer slots or more gpus"
            )


def _beside(sleepers: int, layer_bytes: int) -> str:
    """Return what else takes memory of a GPU, for an error."""
    others = [f"{sleepers} sleeping engines"] if sleepers else []
    if layer_bytes:
        others.append(
            f"{_gib(layer_bytes)} for each of them, in which a layer of another expert is made "
            "ready"
        )
    return f" beside {' and '.join(others)}" if others else ""


def _check_given(
    pool: PoolConfig,
    given: float,
    here: Sequence[Sequence[int]],
    sleepers: int,
    gpu_bytes: int | None,
    layer_bytes: int,
) -> None:
    """Check that each engine can start last with the operator's share."""
    kv_bytes = pool.vllm.kv_cache_bytes
    most = max(map(len, here))
    whole = min(1.0, pool.gpus)
    where = "vllm.args.gpu_memory_utilization"
    if kv_bytes is None and given * most > whole + 1e-9:
        allowed = math.floor(100 * whole / most) / 100
        raise ValueError(
            f"{where}: {most} engines of a replica share its GPUs, and each would take {given:g} "
            f"of their memory; set it to at most {allowed}, or set vllm.kv_cache_bytes"
        )
    if gpu_bytes is None:
        return
    # The operator may know better what an engine takes beside its weights.
    if kv_bytes is None and (largest := max(map(max, here))) >= given * gpu_bytes:
        raise ValueError(
            f"{where}: {given:g} of {_gib(gpu_bytes)} leaves no KV cache to an engine with "
            f"{_gib(largest)} of weights; raise it"
        )
    for needs in here:
        room = whole * gpu_bytes - sleepers * SLEEPER_BYTES - len(needs) * layer_bytes
        taken = [
            given * gpu_bytes if kv_bytes is None else need + kv_bytes + ENGINE_BYTES
            for need in needs
        ]
        free = room - (sum(taken) - min(taken))
        if free < max(given * gpu_bytes, min(taken)):
            raise ValueError(
                f"{where}: an engine starts only where {given:g} of a GPU's memory is free, and "
                f"beside the other engines only {_gib(max(0.0, free))} of {_gib(gpu_bytes)} are"
                f"{_beside(sleepers, layer_bytes)}; lower it, or leave it out"
            )


def unknown_memory(pool: PoolConfig) -> str:
    """Return a warning for a pool whose GPUs' memory is unknown."""
    return (
        "the GPUs' memory is unknown (no nvidia-smi here, and no memory_bytes), so that nothing "
        f"tells whether this pool's engines fit {pool.gpus:g} GPUs"
    )


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"
