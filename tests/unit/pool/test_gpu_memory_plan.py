"""The division of GPUs: what is accepted starts in vLLM, and what is refused would not."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from service.config import PoolConfig
from service.engine.gpu_share import GpuShare
from service.pool.gpu_memory_plan import (
    ENGINE_BYTES,
    SLEEPER_BYTES,
    VLLM_SHARE,
    share_gpus,
)

GIB = 1024**3


def pool(gpus: float, size: int, kv_gib: float | None, given: float | None = None) -> PoolConfig:
    vllm: dict[str, Any] = {"tensor_parallel_size": size}
    if kv_gib is not None:
        vllm["kv_cache_bytes"] = int(kv_gib * GIB)
    if given is not None:
        vllm["args"] = {"gpu_memory_utilization": given}
    return PoolConfig.model_validate({"gpus": gpus, "vllm": vllm})


def division(
    settings: PoolConfig, needs: Sequence[int], sleepers: int, gpu_bytes: int, layer: int = 0
) -> tuple[Sequence[GpuShare], str]:
    """The shares of slots, or why there are none."""
    try:
        return share_gpus(settings, needs, sleepers, gpu_bytes, layer), ""
    except ValueError as error:
        return (), str(error)


def starts(
    settings: PoolConfig,
    shares: Sequence[GpuShare],
    needs: Sequence[int],
    sleepers: int,
    gpu_bytes: int,
    usable: float,
    layer: int = 0,
) -> bool:
    """Start engines as vLLM does: `request_memory` at each start, in order, on every GPU.

    Then restart each of them while the others run and make layers of other experts ready, which is
    the harder case.
    """
    kv_bytes = settings.vllm.kv_cache_bytes
    size = settings.vllm.engine_gpus
    used: Counter[int] = Counter()
    taken = []

    def enters(share: GpuShare, need: int) -> bool:
        requested = math.ceil(gpu_bytes * share.utilization)
        for device in share.device_ids or range(size):
            free = usable * gpu_bytes - sleepers * SLEEPER_BYTES - used[device] - layer
            if free + len(needs) < requested:  # each start rounds a byte up
                return False
            # An operator's share tells what an engine takes beside its weights.
            given = "gpu_memory_utilization" in settings.vllm.args and kv_bytes is None
            least = need + (0 if given else ENGINE_BYTES) + (kv_bytes or 1)
            if free + len(needs) < least or (kv_bytes is None and requested < least):
                return False
        return True

    for share, need in zip(shares, needs, strict=True):
        if not enters(share, need):
            return False
        full = math.ceil(gpu_bytes * share.utilization)
        takes = layer + (full if kv_bytes is None else need + kv_bytes + ENGINE_BYTES)
        taken.append(takes)
        for device in share.device_ids or range(size):
            used[device] += takes
    for share, need, takes in zip(shares, needs, taken, strict=True):
        devices = share.device_ids or range(size)
        for device in devices:
            used[device] -= takes
        if not enters(share, need):
            return False
        for device in devices:
            used[device] += takes
    return True


def naive(
    settings: PoolConfig, needs: Sequence[int], sleepers: int, gpu_bytes: int, layer: int
) -> list[GpuShare]:
    """The best division that an operator could write by hand, computed another way."""
    size, slots = settings.vllm.engine_gpus, len(needs)
    groups = max(1, int(settings.gpus) // size)
    kv_bytes = settings.vllm.kv_cache_bytes
    room = VLLM_SHARE * min(1, settings.gpus) * gpu_bytes - sleepers * SLEEPER_BYTES
    shares = []
    for i, need in enumerate(needs):
        group = i % groups
        beside = math.ceil(slots / groups)
        own = room / beside - layer
        bytes_ = own if kv_bytes is None else need + kv_bytes + ENGINE_BYTES
        devices = tuple(range(group * size, (group + 1) * size))
        shares.append(GpuShare(max(bytes_, 1) / gpu_bytes, devices))
    return shares


CASES = list(
    itertools.product(
        (0.25, 0.5, 1, 2, 3, 4, 8),  # GPUs
        (1, 2, 4),  # tensor parallel
        (1, 2, 3, 4, 8),  # slots
        # Experts beyond the slots that sleep, and GiB to make a layer of one ready in place.
        ((0, 0), (2, 0), (0, 3)),
        (24, 80, 141),  # GiB of a GPU
        (1, 7, 15),  # GiB of the first engine's weights
        (None, 1, 4),  # GiB of KV cache
    )
)


def test_every_accepted_division_starts_and_every_refused_one_would_not() -> None:
    accepted: Counter[bool] = Counter()
    for gpus, size, slots, (sleepers, layer_gib), gib, weights, kv in CASES:
        case = (gpus, size, slots, sleepers, layer_gib, gib, weights, kv)
        layer = layer_gib * GIB
        if gpus < size and size > 1:
            with pytest.raises(ValueError, match="GPUs"):
                pool(gpus, size, kv)
            continue
        settings = pool(gpus, size, kv)
        # Weights of several sizes share a GPU.
        needs = [math.ceil((weights + i % 3) * GIB / size) for i in range(slots)]
        shares, refusal = division(settings, needs, sleepers, gib * GIB, layer)
        accepted[not refusal] += 1
        usable = VLLM_SHARE * min(1, gpus)
        if "left over" in refusal:
            assert int(gpus) % size or slots * size < int(gpus), case
        elif refusal:
            best = naive(settings, needs, sleepers, gib * GIB, layer)
            assert not starts(settings, best, needs, sleepers, gib * GIB, usable, layer), (
                case,
                refusal,
            )
        else:
            assert starts(settings, shares, needs, sleepers, gib * GIB, usable, layer), case
            used = {d for s in shares for d in s.device_ids or range(size)}
            assert used == set(range(math.ceil(gpus))), case
    assert min(accepted.values()) > 500, accepted


@pytest.mark.parametrize("kv", [None, 1, 4])
def test_given_share_is_accepted_only_where_each_engine_can_start_last(kv: float | None) -> None:
    accepted: Counter[bool] = Counter()
    for given, slots, (sleepers, layer_gib), gib in itertools.product(
        (0.1, 0.2, 0.3, 0.5, 0.8, 1.0), (1, 2, 3), ((0, 0), (2, 0), (0, 3)), (24, 80)
    ):
        settings = pool(1, 1, kv, given)
        needs = [GIB] * slots
        hands = [GpuShare(given, (), layer_gib * GIB)] * slots
        runs = starts(settings, hands, needs, sleepers, gib * GIB, 1.0, layer_gib * GIB)
        shares, refusal = division(settings, needs, sleepers, gib * GIB, layer_gib * GIB)
        accepted[not refusal] += 1
        assert runs == (not refusal), (given, slots, sleepers, layer_gib, gib, refusal)
        assert refusal or list(shares) == hands
    assert len(accepted) == 2


@pytest.mark.parametrize(
    ("gpus", "size", "slots", "devices"),
    [
        (1, 1, 2, [(), ()]),
        (2, 1, 2, [(0,), (1,)]),
        (2, 1, 3, [(0,), (1,), (0,)]),
        (8, 4, 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (2, 2, 3, [(), (), ()]),
    ],
)
def test_slots_take_the_groups_of_gpus_in_turn(
    gpus: float, size: int, slots: int, devices: list[tuple[int, ...]]
) -> None:
    shares = share_gpus(pool(gpus, size, None), [GIB] * slots, 0, 80 * GIB)
    assert [share.device_ids for share in shares] == devices


def test_unknown_memory_divides_the_gpu_evenly() -> None:
    shares = share_gpus(pool(0.5, 1, 1), [GIB] * 2, 0, None)
    assert [share.utilization for share in shares] == [0.23, 0.23]


@pytest.mark.parametrize(
    ("gpus", "size", "words"),
    [(0.5, 2, "an engine needs 2 GPUs"), (1.5, 1, "a whole number, or a share below 1")],
)
def test_gpus_of_a_replica_hold_an_engine(gpus: float, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pool(gpus, size, None)
