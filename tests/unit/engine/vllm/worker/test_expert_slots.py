"""Slots of routed experts compute what all experts together compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.engine.vllm.worker.expert_slots import SlotLayer
from service.expert_offload.expert_file import (
    ExpertFile,
    ExpertFileError,
    ExpertFileWriter,
    ExpertSizes,
)
from service.expert_offload.slot_policies import POLICY_NAMES, PolicyName

LAYERS, EXPERTS, HIDDEN, INNER = 2, 6, 8, 5


def _reference(
    first: torch.Tensor, second: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A kernel that refuses what vLLM's CPU kernel would crash on."""

    def kernel(tokens: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        assert weights.shape == ids.shape
        assert weights.is_contiguous()
        assert ids.is_contiguous()
        assert ids.dtype == torch.int32
        assert int(ids.min()) >= 0
        assert int(ids.max()) < first.shape[0]
        inner = torch.relu(torch.einsum("tkih,th->tki", first[ids], tokens))
        found = torch.einsum("tkhi,tki->tkh", second[ids], inner) * weights[..., None]
        return found.sum(dim=1).to(tokens.dtype)

    return kernel


@pytest.fixture(scope="module")
def weights() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((EXPERTS, INNER, HIDDEN), (EXPERTS, HIDDEN, INNER))
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(LAYERS)]


@pytest.fixture(scope="module")
def path(weights: list[list[torch.Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "a.experts"
    with ExpertFileWriter(path, {}, SIZES) as writer:
        for layer, parts in enumerate(weights):
            for expert in range(EXPERTS):
                own = [memoryview(part[expert].numpy()) for part in parts]
                writer.write(layer, expert, own)
    return path


SIZES = ExpertSizes(LAYERS, EXPERTS, (4 * INNER * HIDDEN,) * 2)


@pytest.fixture(scope="module")
def file(path: Path) -> Iterator[ExpertFile]:
    file = ExpertFile(path, {}, SIZES, verify=True)
    yield file
    file.close()


@pytest.fixture(scope="module")
def readers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as readers:
        yield readers


class _Layers:
    """The layers with slots, and kernels over all experts beside them."""

    def __init__(
        self,
        weights: list[list[torch.Tensor]],
        file: ExpertFile,
        readers: ThreadPoolExecutor,
        slots: int,
        policy: PolicyName,
        prefetch: str,
    ) -> None:
        self.resident = [_reference(*parts) for parts in weights]
        held = [[torch.full((slots, *part.shape[1:]), torch.nan) for part in w] for w in weights]
        self.kernels = [_reference(*parts) for parts in held]
        self.slots = [
            SlotLayer(place, EXPERTS, parts, policy, file, readers)
            for place, parts in enumerate(held)
        ]
        if prefetch == "frequency":
            for layer in self.slots:
                layer.prefetch_hottest()
        elif prefetch == "next_gate":
            self.slots[0].prefetch_for(self.slots[1], lambda tokens: tokens[:, :2].long() % EXPERTS)


def _step(chance: np.random.Generator, tokens: int, k: int) -> tuple[torch.Tensor, ...]:
    rows = torch.from_numpy(chance.standard_normal((tokens, HIDDEN), np.float32))
    weights = torch.from_numpy(chance.random((tokens, k), np.float32))
    # The last place may repeat the first one, as a steered gate does, with weight 0.
    ids = np.argsort(chance.random((tokens, EXPERTS)), axis=1)[:, :k].astype(np.int32)
    if k > 1:
        repeats = chance.random(tokens) < 0.3
        ids[repeats, -1] = ids[repeats, 0]
        weights[torch.from_numpy(repeats), -1] = 0
    return rows, weights, torch.from_numpy(ids)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    slots=st.integers(1, EXPERTS),
    policy=st.sampled_from(POLICY_NAMES),
    prefetch=st.sampled_from(["none", "frequency", "next_gate"]),
    k=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_slots_compute_what_all_experts_compute(
    weights: list[list[torch.Tensor]],
    file: ExpertFile,
    readers: ThreadPoolExecutor,
    slots: int,
    policy: PolicyName,
    prefetch: str,
    k: int,
    sizes: list[int],
    seed: int,
) -> None:
    made = _Layers(weights, file, readers, slots, policy, prefetch)
    chance = np.random.default_rng(seed)
    for tokens in sizes:
        for resident, kernel, layer in zip(made.resident, made.kernels, made.slots, strict=True):
            step = _step(chance, tokens, k)
            found, expected = layer.compute(kernel, *step), resident(*step)
            assert found.dtype == expected.dtype
            if len(step[2].unique()) <= slots:
                assert torch.equal(found, expected)
            else:
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for layer in made.slots:
        counted = layer.counters
        assert counted.steps == len(sizes)
        assert counted.passes >= counted.steps
        assert counted.waits <= counted.uses
        assert counted.read_bytes == (counted.waits + counted.prefetched) * SIZES.expert_bytes


def test_right_prediction_leaves_nothing_to_wait_for(
    weights: list[list[torch.Tensor]], file: ExpertFile, readers: ThreadPoolExecutor
) -> None:
    made = _Layers(weights, file, readers, 4, "lru", "none")
    step = _step(np.random.default_rng(1), 2, 2)
    made.slots[0].prefetch_for(made.slots[1], lambda _: step[2].long())
    for kernel, layer in zip(made.kernels, made.slots, strict=True):
        layer.compute(kernel, *step)
    first, second = (layer.counters for layer in made.slots)
    assert first.waits == first.uses == second.uses == second.prefetched
    assert second.waits == 0


def test_tokens_without_experts_get_zeros(
    weights: list[list[torch.Tensor]], file: ExpertFile, readers: ThreadPoolExecutor
) -> None:
    made = _Layers(weights, file, readers, 2, "lru", "none")
    rows = torch.ones(3, HIDDEN)
    ids = torch.full((3, 2), -1, dtype=torch.int32)
    assert not made.slots[0].compute(made.kernels[0], rows, torch.ones(3, 2), ids).any()


@pytest.mark.parametrize("prefetch", ["none", "frequency"])
def test_unreadable_expert_is_an_error_and_never_other_weights(
    weights: list[list[torch.Tensor]],
    path: Path,
    tmp_path: Path,
    readers: ThreadPoolExecutor,
    prefetch: str,
) -> None:
    copy = tmp_path / "a.experts"
    copy.write_bytes(path.read_bytes())
    file = ExpertFile(copy, {}, SIZES, verify=True)
    made = _Layers(weights, file, readers, 3, "lru", prefetch)
    chance = np.random.default_rng(1)
    rows, scales, _ = _step(chance, 1, 1)
    held = torch.tensor([[0]], dtype=torch.int32)
    layer, kernel = made.slots[0], made.kernels[0]
    expected = layer.compute(kernel, rows, scales, held)
    copy.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ExpertFileError, match="delete the file"):
            layer.compute(kernel, rows, scales, torch.tensor([[1]], dtype=torch.int32))
    # What was read before is still right.
    assert torch.equal(layer.compute(kernel, rows, scales, held), expected)
    file.close()
