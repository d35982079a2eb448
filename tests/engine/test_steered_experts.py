"""Steered experts in vLLM answer as transformers does with its gates steered alike.

One engine for all: a tiny random Mixtral, another of its family, and profiles for the first.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from service.errors import ExpertFailedError
from tests.support.engine.real_engines import ENVIRONMENT, ON_ONE_ENGINE, Swapping, greedy
from tests.support.engine.steered_tiny_mixtral import PROMPT, RULES, TOKENS, Steering
from tests.support.engine.tiny_mixtral import EXPERTS, LAYERS
from tests.support.polling import until

pytestmark = ON_ONE_ENGINE


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def steering(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Steering]:
    os.environ.update(ENVIRONMENT)
    made = await asyncio.to_thread(Steering, tmp_path_factory.mktemp("steer"), Swapping)
    try:
        await made.engine.start()
        made.first = await made.say("plain", 4)
        for name in made.profiles:
            filled = await made.engine.load_to_host(name)
            assert filled.host_bytes < 1024
        yield made
    finally:
        await made.engine.stop()


@pytest.mark.parametrize("name", ["plain", *RULES, "half"])
async def test_steered_engine_equals_transformers_with_steered_gates(
    steering: Steering, name: str
) -> None:
    method = await steering.go_to(name)
    assert method == ("" if name == "plain" else "steer")
    # The canary may have left its prompt's blocks, but not of this one.
    await steering.engine.worker_rpc("coe_see")
    answers, _ = await steering.say(name)
    seen = await steering.engine.worker_rpc("coe_seen")
    profile = steering.profiles.get(name)
    expected, chosen = await asyncio.to_thread(steering.reference.say, PROMPT, TOKENS, profile)
    assert answers == expected
    for layer in range(LAYERS):
        # What top-p leaves out has no part in it: its place names the first choice again.
        rows = [sorted(set(row)) for row in seen[layer]]
        assert rows == [sorted(row) for row in chosen[layer]], f"layer {layer}"
        if "mask" in RULES.get(name, {}):
            barred = {e for e in range(EXPERTS) if RULES[name]["mask"][e]}
            assert not barred & {e for row in rows for e in row}
    width = {"one": 1, "three": 3, "sure": 4, "null": 4}.get(name, 2)
    assert {len(row) for row in seen[0]} == {width}


@pytest.mark.parametrize("name", ["sure", "null"])
async def test_steered_engine_with_dropped_choices_equals_transformers_in_a_large_step(
    steering: Steering, name: str
) -> None:
    """So many places that only the kept choices are computed, each of them once."""
    await steering.go_to(name)
    prompt = [token + shift for shift in range(8) for token in PROMPT]
    choice = await greedy(steering.engine, name, prompt, 4, logprobs=1)
    profile = steering.profiles[name]
    logprobs, chosen = await asyncio.to_thread(
        steering.reference.weigh, prompt, choice["token_ids"], profile
    )
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-4)
    kept = sum(len(row) for rows in chosen.values() for row in rows)
    assert kept < 7 / 8 * 4 * LAYERS * (len(prompt) + 3), "nothing was dropped"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("experts", [8, 64])
async def test_kept_choices_equal_vllm_s_own_kernel(experts: int, dtype: str) -> None:
    """Random mixtures, each token with its own number of experts."""
    import torch
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    from service.engine.vllm.worker.kept_choices import CpuKeptChoices

    draw = torch.Generator().manual_seed(experts)
    kind = getattr(torch, dtype)
    up = torch.randn(experts, 128, 96, generator=draw) * 96**-0.5
    down = torch.randn(experts, 96, 64, generator=draw) * 64**-0.5
    packed = [cpu_prepack_moe_weight(weight.to(kind), "vec") for weight in (up, down)]

    def own(*, output: Any, hidden_states: Any, topk_weights: Any, topk_ids: Any) -> None:
        cpu_fused_moe(
            output, hidden_states, *packed, None, None, topk_weights, topk_ids, "silu", "vec"
        )

    for tokens, widths in ((1, [2]), (3, [1, 3]), (40, [0]), (70, [0, 1, 4]), (200, [1, 2, 4])):
        hidden = torch.randn(tokens, 96, generator=draw).to(kind)
        odds = torch.randn(tokens, experts, generator=draw).softmax(dim=-1)
        weights, ids = torch.topk(odds, 4)
        kept = torch.tensor(widths)[torch.randint(len(widths), (tokens, 1), generator=draw)]
        weights = torch.where(torch.arange(4) < kept, weights / weights.sum(-1, keepdim=True), 0.0)
        expected, found = torch.empty_like(hidden), torch.empty_like(hidden)
        places = {"topk_weights": weights, "topk_ids": ids.to(torch.int32)}
        own(output=expected, hidden_states=hidden, **places)
        CpuKeptChoices(own, experts)(output=found, hidden_states=hidden, **places)
        if len(widths) == 1:
            assert torch.equal(found, expected)
        rounding = 2**-22 if dtype == "float32" else 2**-7
        largest = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding * largest + 1e-30)


async def test_steering_fifty_swaps_leave_no_trace(steering: Steering) -> None:
    first = steering.first
    own = {name: await _of(steering, name, 4) for name in steering.profiles}
    assert len({repr(text) for text in (first, *own.values())}) == len(own) + 1
    before = (await steering.engine.memory())["resident_bytes"]
    assert await _of(steering, "plain", 4) == first, "not bit for bit what it was"
    names = itertools.cycle([*steering.profiles, "plain"])
    for name in itertools.islice(names, 50):
        await steering.go_to(name)
        assert await steering.say(name, 4) == (first if name == "plain" else own[name])
    await steering.go_to("plain")
    assert await steering.say("plain", 4) == first, "not bit for bit what it was"
    grown = (await steering.engine.memory())["resident_bytes"] - before
    assert grown < 8 * 1024**2, f"{grown} bytes leaked"


async def _of(steering: Steering, name: str, tokens: int = TOKENS) -> tuple[list[int], list[float]]:
    await steering.go_to(name)
    return await steering.say(name, tokens)


async def test_steering_swap_during_a_request_keeps_the_old_expert_until_its_end(
    steering: Steering,
) -> None:
    await steering.go_to("masked")
    alone = await steering.say("masked", 60)
    running = [asyncio.create_task(steering.say("masked", 60)) for _ in range(2)]
    known = steering.engine.vllm._llm.output_processor.request_states

    def begun() -> bool:
        return len(known) == 2 and all(
            item.detokenizer.num_output_tokens() for item in known.values()
        )

    await until(begun, "both run")
    assert await steering.go_to("biased") == "steer"
    ended = await asyncio.gather(*running)
    assert [tokens for tokens, _ in ended] == [alone[0]] * 2
    assert (await steering.say("biased", 60))[0] != alone[0]


async def test_steered_expert_has_its_own_canary(steering: Steering) -> None:
    for name in ("plain", "masked", "biased"):
        await steering.go_to(name)
    assert {"plain", "masked", "biased"} <= steering.canaries.keys()
    assert len({steering.canaries[name] for name in ("plain", "masked", "biased")}) == 3


async def test_steered_expert_and_full_model_of_the_family_take_turns(steering: Steering) -> None:
    own = await _of(steering, "masked")
    await steering.engine.load_to_host("other")
    assert await steering.go_to("other") == "inplace"
    foreign = await steering.say("other")
    assert foreign != own
    # The weights are its base's, and it has rules for these only.
    assert await steering.go_to("masked") == "inplace"
    assert await steering.say("masked") == own
    assert await steering.go_to("other") == "inplace"
    assert await steering.say("other") == foreign
    assert await steering.go_to("plain") == "inplace"
    await steering.engine.evict("other")


async def test_steering_profile_that_does_not_fit_the_gates_raises(steering: Steering) -> None:
    with pytest.raises(ExpertFailedError, match=r"layer 0 has 4 experts, of which 2 are .* 4, 3"):
        await steering.engine.load_to_host("odd")
    with pytest.raises(ExpertFailedError, match=r"experts\.lost\.profile: can't be read"):
        await steering.engine.load_to_host("lost")
    assert steering.engine.failure() is None
