"""Kernels compute only the kept choices of gates, with the same result."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

HIDDEN = 4


class CpuKernel:
    """Stands for vLLM's CPU kernel: it computes every place, and an id of -1 would be fatal."""

    def __init__(self, experts: int) -> None:
        draw = torch.Generator().manual_seed(experts)
        self.weights = torch.randn(experts, HIDDEN, HIDDEN, generator=draw, dtype=torch.float64)
        self.experts = experts
        self.computed: list[tuple[int, int]] = []

    def apply(
        self,
        *,
        output: Any,
        hidden_states: Any,
        topk_weights: Any,
        topk_ids: Any,
        activation: str,
        **_: Any,
    ) -> None:
        assert activation == "silu"
        assert output.is_contiguous()
        assert hidden_states.is_contiguous()
        assert topk_weights.is_contiguous()
        assert topk_ids.is_contiguous()
        assert (topk_weights.dtype, topk_ids.dtype) == (torch.float32, torch.int32)
        assert topk_weights.shape == topk_ids.shape == (len(output), topk_ids.shape[1])
        assert bool(((topk_ids >= 0) & (topk_ids < len(self.weights))).all())
        self.computed.append(tuple(topk_ids.shape))
        parts = torch.einsum("th,tkhi->tki", hidden_states.double(), self.weights[topk_ids.long()])
        output.copy_((parts * topk_weights.unsqueeze(-1)).sum(dim=1))


class TritonExperts:
    """Stands for vLLM's Triton kernel: it skips what the expert map leaves out.

    Without a map it writes zeros for an id of -1, but only where it does not sort a step's tokens.
    """

    def __init__(self, experts: int, *, unsorted: bool = False) -> None:
        self.quant_config = SimpleNamespace(use_int8_w8a16=not unsorted, use_int4_w4a16=False)
        self.experts = experts
        self.inner = CpuKernel(experts)
        self.computed = 0

    def apply(
        self,
        *,
        output: Any,
        hidden_states: Any,
        topk_weights: Any,
        topk_ids: Any,
        global_num_experts: int,
        expert_map: Any,
        **_: Any,
    ) -> None:
        if expert_map is None:
            assert not self.quant_config.use_int8_w8a16
            assert topk_ids.numel() * 4 <= self.experts == global_num_experts
            own = topk_ids
        else:
            assert expert_map.shape == (global_num_experts,)
            assert bool(((topk_ids >= 0) & (topk_ids < global_num_experts)).all())
            own = expert_map[topk_ids.long()]
        self.computed = int((own >= 0).sum())
        rows = torch.einsum(
            "th,tkhi->tki", hidden_states.double(), self.inner.weights[own.clamp(min=0).long()]
        )
        # The rows that were skipped were never written.
        rows[own < 0] = float("nan")
        parts = torch.where((own >= 0).unsqueeze(-1), rows * topk_weights.unsqueeze(-1), 0.0)
        output.copy_(parts.sum(dim=1))


def choices(tokens: int, experts: int, places: int, seed: int, widths: list[int]) -> Any:
    """Inputs, weights and ids of tokens; `widths` has the numbers of kept places to draw from."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=draw)
    weights, ids = torch.sort(
        torch.randn(tokens, experts, generator=draw).softmax(dim=-1), descending=True
    )
    weights, ids = weights[:, :places].clone(), ids[:, :places].to(torch.int32)
    kept = torch.tensor(widths)[torch.randint(len(widths), (tokens, 1), generator=draw)]
    dropped = torch.arange(places) >= kept
    weights[dropped] = 0
    return hidden, weights, torch.where(dropped, ids[:, :1], ids).contiguous()


def computed(apply: Any, hidden: Any, weights: Any, ids: Any, **rest: Any) -> Any:
    output = torch.full(hidden.shape, float("nan"), dtype=hidden.dtype)
    apply(
        output=output,
        hidden_states=hidden,
        topk_weights=weights,
        topk_ids=ids,
        activation="silu",
        **rest,
    )
    return output


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 120),
    experts=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_kept_choices_on_a_cpu_equal_the_kernel_s_own_result(
    tokens: int, experts: int, seed: int, data: st.DataObject
) -> None:
    from service.engine.vllm.worker.kept_choices import CpuKeptChoices

    places = data.draw(st.integers(1, experts))
    widths = data.draw(st.lists(st.integers(0, places), min_size=1, max_size=4))
    hidden, weights, ids = choices(tokens, experts, places, seed, widths)
    kernel = CpuKernel(experts)
    expected = computed(kernel.apply, hidden, weights, ids)
    kernel.computed.clear()
    result = computed(CpuKeptChoices(kernel.apply, kernel.experts), hidden, weights, ids)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    small = weights.numel() < 64
    widest, kept = int((weights != 0).any(dim=0).sum()), int((weights != 0).sum())
    work = sum(rows * width for rows, width in kernel.computed)
    all_places = tokens * (places if small else widest)
    assert kept <= work <= all_places
    least = 1 / 8 if all_places >= 32 * experts else 3 / 8
    if all_places >= 128 and all_places - kept >= all_places * least:
        assert work == kept
    else:
        assert work == all_places
        assert torch.equal(result, expected)
    assert len(kernel.computed) == (kept > 0 or small)


@pytest.mark.parametrize("width", [0, 1, 2, 3])
@pytest.mark.parametrize("tokens", [21, 22])
def test_kept_choices_of_one_width_are_computed_with_that_width(width: int, tokens: int) -> None:
    from service.engine.vllm.worker.kept_choices import CpuKeptChoices

    kernel = CpuKernel(6)
    hidden, weights, ids = choices(tokens, 6, 3, 0, [width])
    expected = computed(kernel.apply, hidden, weights, ids)
    kernel.computed.clear()
    assert torch.equal(
        computed(CpuKeptChoices(kernel.apply, kernel.experts), hidden, weights, ids), expected
    )
    # In a small step there is nothing to win.
    width = 3 if tokens == 21 else width
    assert kernel.computed == ([(tokens, width)] if width else [])


def test_kept_choices_with_a_silent_expert_among_the_first_are_equal() -> None:
    from service.engine.vllm.worker.kept_choices import CpuKeptChoices

    kernel = CpuKernel(6)
    hidden, weights, ids = choices(64, 6, 3, 0, [3])
    weights = torch.where(ids == 2, 0.0, weights)
    expected = computed(kernel.apply, hidden, weights, ids)
    result = computed(CpuKeptChoices(kernel.apply, kernel.experts), hidden, weights, ids)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert kernel.computed[-1] == (int((weights != 0).sum()), 1)


@pytest.mark.parametrize("rest", [{"apply_router_weight_on_input": True}, {"a1q_scale": "rows"}])
def test_kept_choices_leave_other_contracts_of_a_kernel_alone(rest: dict[str, Any]) -> None:
    from service.engine.vllm.worker.kept_choices import CpuKeptChoices

    kernel = CpuKernel(6)
    hidden, weights, ids = choices(64, 6, 3, 0, [1])
    computed(CpuKeptChoices(kernel.apply, kernel.experts), hidden, weights, ids, **rest)
    assert kernel.computed == [(64, 3)]


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 12),
    experts=st.integers(2, 16),
    seed=st.integers(0, 10**6),
    ranks=st.integers(1, 2),
    unsorted=st.booleans(),
    data=st.data(),
)
def test_kept_choices_on_a_gpu_are_those_that_the_expert_map_has(
    tokens: int, experts: int, seed: int, ranks: int, unsorted: bool, data: st.DataObject
) -> None:
    from service.engine.vllm.worker.kept_choices import mapped_kept_choices

    places = data.draw(st.integers(1, min(experts, 4)))
    widths = data.draw(st.lists(st.integers(0, places), min_size=1, max_size=4))
    hidden, weights, ids = choices(tokens, experts, places, seed, widths)
    expected = computed(CpuKernel(experts).apply, hidden, weights, ids)
    padding = data.draw(st.integers(0, tokens))
    ids[tokens - padding :] = -1
    expected[tokens - padding :] = 0
    kernel = TritonExperts(experts, unsorted=unsorted)
    kept = mapped_kept_choices(kernel, experts, torch.device("cpu"))
    total, work = torch.zeros_like(expected), 0
    for rank in range(ranks):
        own = torch.arange(experts, dtype=torch.int32)
        expert_map = torch.where(own % ranks == rank, own, -1) if ranks > 1 else None
        total += computed(
            kept, hidden, weights, ids, global_num_experts=experts, expert_map=expert_map
        )
        work += kernel.computed
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    assert work == int(((weights != 0) & (ids >= 0)).sum())


def test_kept_choices_on_a_gpu_have_fixed_shapes_and_wait_for_nothing() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    from service.engine.vllm.worker.kept_choices import MappedKeptChoices

    given_ids: list[Any] = []
    kept = MappedKeptChoices(
        lambda **arguments: given_ids.append(arguments["topk_ids"]), 6, torch.device("cpu")
    )

    def call(weights: Any, ids: Any) -> Any:
        kept(topk_weights=weights, topk_ids=ids, global_num_experts=6, expert_map=None)
        return given_ids[-1]

    _, weights, ids = choices(5, 6, 3, 0, [1, 3])
    recorded = make_fx(call)(weights, ids)
    operations = {str(node.target) for node in recorded.graph.nodes}
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
    assert not [operation for operation in operations if any(word in operation for word in waits)]
    _, weights, ids = choices(5, 6, 3, 1, [2])
    assert recorded(weights, ids).tolist() == torch.where(weights == 0, 6, ids).tolist()


@pytest.mark.parametrize(("places", "experts", "mapped"), [(4, 16, False), (5, 16, True)])
def test_kept_choices_leave_the_kernel_its_way_with_small_steps(
    places: int, experts: int, mapped: bool
) -> None:
    from service.engine.vllm.worker.kept_choices import MappedKeptChoices

    given_maps: list[Any] = []
    kept = MappedKeptChoices(
        lambda **arguments: given_maps.append(arguments["expert_map"]),
        experts,
        torch.device("cpu"),
        unsorted_steps=True,
    )
    _, weights, ids = choices(1, experts, places, 0, [1])
    kept(topk_weights=weights, topk_ids=ids, global_num_experts=experts, expert_map=None)
    assert (given_maps[0] is not None) is mapped


def test_kernel_gets_the_function_of_its_device_and_its_own_back() -> None:
    from service.engine.vllm.worker import kept_choices as module

    cpu, gpu = torch.device("cpu"), torch.device("meta")
    triton, other = TritonExperts(4), CpuKernel(4)
    assert isinstance(module.kept_choices(other, 4, cpu), module.CpuKeptChoices)
    assert isinstance(module.kept_choices(triton, 4, gpu), module.MappedKeptChoices)
    assert module.kept_choices(other, 4, gpu) is None
    assert module.kept_choices(None, 4, cpu) is None
    assert module.mapped_kept_choices(None, 4, gpu) is None
    kept = module.kept_choices(other, 4, cpu)
    assert kept is not None
    before = dict(other.__dict__)
    module.replace_apply(other, kept)
    assert module.computes_by(other, kept)
    assert other.apply is kept
    module.restore_apply(other)
    module.restore_apply(other)
    assert not module.computes_by(other, kept)
    assert other.__dict__ == before
