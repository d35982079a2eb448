"""The slots of a mixture stay within their bound, and the plan counts slots instead of experts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.expert_offload.slot_plan import plan_offload, slots_for
from service.models.model_inspection import ModelInfo
from tests.unit.pool.test_memory_plan import mixture


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 9])
def test_plan_counts_slots_instead_of_experts(slots: int) -> None:
    info, expert = mixture(), 3 * 4 * 8 * 4
    bound = slots * 2 * expert + 5
    plan = plan_offload(info, bound, weight_bytes=info.weight_bytes, element_bytes=4)
    assert (plan.layers, plan.experts, plan.expert_bytes) == (2, 4, expert)
    assert plan.slots == min(slots, 4)
    assert plan.slot_bytes <= bound
    assert plan.other_bytes == info.weight_bytes - 2 * 4 * expert
    assert plan.peak_bytes == max(4 * expert, plan.slot_bytes + plan.slots * expert)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (replace(mixture(), quantization="awq"), "its weights are quantised"),
        (replace(mixture(), moe=None), "no routed experts"),
        (replace(mixture(), shapes={"model.embed_tokens.weight": (2, 2)}), "no routed experts"),
        (
            replace(mixture(), shapes={"layers.0.mlp.experts.gate_up_proj_bias": (4, 8)}),
            "have biases",
        ),
    ],
)
def test_mixture_that_can_not_be_held_in_slots_is_refused(info: ModelInfo, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_offload(info, 10**9, weight_bytes=info.weight_bytes, element_bytes=4)


@pytest.mark.parametrize(
    ("bound", "slots"), [(2 * 100, 1), (299, 1), (3 * 200, 3), (2 * 600, 6), (10**9, 6)]
)
def test_slots_stay_within_the_bound(bound: int, slots: int) -> None:
    assert slots_for(bound, 2, 6, 100) == slots
    assert slots * 2 * 100 <= bound


def test_bound_below_one_slot_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes 200; allowed is that or more"):
        slots_for(199, 2, 6, 100)
