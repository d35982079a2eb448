"""Measures what choices that a profile drops for single tokens save.

First vLLM's CPU kernel alone, against the same kernel behind `CpuKeptChoices`, by the size of a
step: where a batch of kept choices begins to pay. Then one engine whose profiles are swapped in
turn, with long prompts and short answers.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loadtests.lib.child_processes import say
from loadtests.lib.median_intervals import Estimate, median, ratios
from loadtests.lib.targets_and_report import Report, Table, at_least, at_most
from loadtests.moe.random_mixtral import engine_options, given_or_random
from loadtests.moe.steering_cost import BASE, Work, measure, sources
from service.engine.vllm.worker.kept_choices import CpuKeptChoices
from service.moe.steering_profile import LayerSteering, MoeShape, SteeringProfile, moe_shape, steer

_SEED = 1
_LAYERS, _EXPERTS, _TOP_K = 12, 4, 2
_LONG = Work(in_flight=8, prompt=192, answer=2)
# Routed experts, places for a token, and widths of a layer: the demo's, and many small experts.
_MIXTURES = ((4, 2, 576, 1536), (32, 8, 512, 256))
_PLACES = (16, 64, 128, 256, 768)
_DROPPED = (0.125, 0.25, 0.5)
_DTYPES = (torch.float32, torch.bfloat16)
_WARM_UP = 2
# In the largest step, where half is dropped, and where nothing is.
_MOST, _MOST_LOST = 0.95, 1.05


@dataclass(frozen=True, slots=True)
class KernelCost:
    """One size of a step.

    Attributes:
        dtype: The dtype of weights and hidden states.
        experts: The number of routed experts.
        tokens: The number of tokens.
        places: The number of choices of all tokens.
        dropped: The part of them that has the weight 0.
        own_ms: The kernel's processor time for a layer, in ms.
        times: The processor time of kept choices, as a ratio of paired calls.
        difference: The largest difference of the results, relative to the largest result.
    """

    dtype: str
    experts: int
    tokens: int
    places: int
    dropped: float
    own_ms: Estimate
    times: Estimate
    difference: float


def _kernel_costs(pairs: int) -> Iterator[KernelCost]:
    from vllm._custom_ops import cpu_prepack_moe_weight

    draw = torch.Generator().manual_seed(_SEED)
    for dtype in _DTYPES:
        for experts, top_k, hidden, inner in _MIXTURES:
            up = torch.randn(experts, 2 * inner, hidden, generator=draw) * hidden**-0.5
            down = torch.randn(experts, hidden, inner, generator=draw) * inner**-0.5
            own = partial(
                _kernel,
                cpu_prepack_moe_weight(up.to(dtype), "vec"),
                cpu_prepack_moe_weight(down.to(dtype), "vec"),
            )
            for places in _PLACES:
                for dropped in (0.0, *_DROPPED):
                    rows = torch.randn(places // top_k, hidden, generator=draw).to(dtype)
                    weights, ids = _choices(draw, len(rows), experts, top_k, dropped)
                    yield _kernel_cost(own, rows, weights, ids, experts, pairs)


def _kernel(
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> None:
    from vllm._custom_ops import cpu_fused_moe

    cpu_fused_moe(
        output, hidden_states, up, down, None, None, topk_weights, topk_ids, "silu", "vec"
    )


def _choices(
    draw: torch.Generator, tokens: int, experts: int, top_k: int, dropped: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids, (tokens, top_k). Of all places, about `dropped` have the weight 0."""
    odds, ids = torch.sort(
        torch.randn(tokens, experts, generator=draw).softmax(dim=-1), descending=True
    )
    weights, ids = odds[:, :top_k].clone(), ids[:, :top_k].to(torch.int32)
    # Of a token's choices the last, and never the first.
    drops = torch.rand(tokens, top_k, generator=draw) < dropped * top_k / (top_k - 1)
    drops[:, 0] = False
    drops = drops.sort(dim=-1).values
    weights[drops] = 0
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.contiguous(), torch.where(drops, ids[:, :1], ids).contiguous()


def _kernel_cost(
    own: Any,
    rows: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    experts: int,
    pairs: int,
) -> KernelCost:
    ways = {"own": own, "kept": CpuKeptChoices(own, experts)}
    spent_ms: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, torch.Tensor] = {}
    for i in range(pairs + _WARM_UP):
        for name in sorted(ways, reverse=bool(i % 2)):
            output = torch.empty_like(rows)
            began_s = time.process_time()
            ways[name](output=output, hidden_states=rows, topk_weights=weights, topk_ids=ids)
            if i >= _WARM_UP:
                spent_ms[name].append(1000 * (time.process_time() - began_s))
            results[name] = output.float()
    difference = (results["kept"] - results["own"]).abs().max()
    return KernelCost(
        str(rows.dtype).removeprefix("torch."),
        experts,
        len(rows),
        weights.numel(),
        float((weights == 0).float().mean()),
        median(spent_ms["own"]),
        ratios(spent_ms["kept"], spent_ms["own"]),
        float(difference / results["own"].abs().max()),
    )


def _rules(shape: MoeShape) -> dict[str, LayerSteering]:
    """Rules by name. Of gates with normally distributed logits, two drop half of the last places.

    Top-p and the logit of null experts are medians over random tokens: of the probability of all
    choices but the last, and of the logit of the last.
    """
    logits = np.random.default_rng(_SEED).standard_normal((4096, shape.experts))
    odds = np.exp(logits)
    first = -np.sort(-odds / odds.sum(axis=-1, keepdims=True), axis=-1)
    before = first[:, : shape.top_k - 1].sum(axis=-1)
    last = np.sort(logits, axis=-1)[:, -shape.top_k]
    return {
        "top_p": LayerSteering.of(shape.experts, top_p=float(np.median(before))),
        "null": LayerSteering.of(shape.experts, null=float(np.median(last))),
        "one": LayerSteering.of(shape.experts, top_k=1),
    }


def _dropped(rule: LayerSteering, shape: MoeShape) -> float:
    """The part of the base's choices that a rule drops, for normally distributed logits."""
    logits = np.random.default_rng(_SEED + 1).standard_normal((4096, shape.experts))
    weights, _ = steer(logits, rule, shape)
    return 1 - float((weights > 0).sum()) / (len(logits) * shape.top_k)


def report(model: Path | None, *, pairs: int = 15, turns: int = 6, rounds: int = 3) -> Report:
    """Tables and targets. `model`: a folder; None: a random one with layers of the demo's size.

    Raises RuntimeError where the folder is no mixture of experts of which each token gets several.
    """
    made = Report("moe_drop")
    say("vLLM's CPU kernel by the size of a step")
    _tell_kernels(made, list(_kernel_costs(pairs)))
    options = engine_options(_LONG.in_flight)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given_or_random(
            model, Path(scratch), layers=_LAYERS, experts=_EXPERTS, top_k=_TOP_K
        )
        shape = moe_shape(folder)
        if shape is None or shape.top_k < 2:
            raise RuntimeError(f"{folder} is no mixture with several experts for a token")
        rules = _rules(shape)
        profiles = {
            name: SteeringProfile(shape, dict.fromkeys(shape.layers, rule))
            for name, rule in rules.items()
        }
        root = Path(scratch) / "profiles"
        root.mkdir()
        found = asyncio.run(
            measure(sources(folder, root, profiles), options, _LONG, turns=turns, rounds=rounds)
        )
    _tell_engine(made, found.tokens_per_s, rules, shape)
    return made


def _tell_kernels(made: Report, costs: list[KernelCost]) -> None:
    table = Table(
        "A layer's routed experts by vLLM's CPU kernel, and with kept choices only; processor "
        "time, medians with 95 % intervals of paired calls",
        ("dtype", "experts", "tokens", "places", "dropped", "the kernel, ms", "kept", "difference"),
    )
    for cost in costs:
        table.rows.append(
            (
                cost.dtype,
                str(cost.experts),
                str(cost.tokens),
                str(cost.places),
                f"{cost.dropped:.0%}",
                f"{cost.own_ms.value:.2f}",
                cost.times.text(2),
                f"{cost.difference:.0e}",
            )
        )
    made.tables.append(table)
    made.facts["kernels"] = [
        {
            "dtype": cost.dtype,
            "experts": cost.experts,
            "places": cost.places,
            "dropped": cost.dropped,
            "own_ms": cost.own_ms.as_json(),
            "times": cost.times.as_json(),
            "difference": cost.difference,
        }
        for cost in costs
    ]
    largest = [c for c in costs if c.places == _PLACES[-1]]
    won = max((c for c in largest if c.dropped > 0.45), key=lambda c: c.times.value)
    lost = max((c for c in largest if not c.dropped), key=lambda c: c.times.value)
    made.reach.append(
        at_most("a large step that drops half, of the kernel's time", _MOST, won.times)
    )
    made.reach.append(
        at_most("a large step that drops nothing, of the kernel's time", _MOST_LOST, lost.times)
    )


def _tell_engine(
    made: Report,
    tokens_per_s: dict[str, list[float]],
    rules: dict[str, LayerSteering],
    shape: MoeShape,
) -> None:
    words = {
        "top_p": f"top {shape.top_k}, of these by top-p",
        "null": f"top {shape.top_k} against null experts",
        "one": "top 1",
    }
    table = Table(
        f"Throughput, {_LONG.in_flight} in flight, prompts of {_LONG.prompt} and answers of "
        f"{_LONG.answer} tokens; medians with 95 % intervals",
        ("routed experts", "dropped", "turns", "tokens/s", "times the base's"),
    )
    base = tokens_per_s[BASE]
    own = f"top {shape.top_k} of {shape.experts}, vLLM's own choice"
    table.rows.append((own, "0%", str(len(base)), median(base).text(1), "1"))
    for name, rule in rules.items():
        rates = tokens_per_s[name]
        rate, times = median(rates), ratios(rates, base)
        dropped = _dropped(rule, shape)
        made.facts[name] = {
            "dropped": dropped,
            "tokens_per_s": rate.as_json(),
            "times_base": times.as_json(),
        }
        table.rows.append(
            (words[name], f"{dropped:.0%}", str(len(rates)), rate.text(1), times.text())
        )
        made.reach.append(at_least(f"{words[name]}, times the base's", 1.0, times, interval=True))
    made.tables.append(table)
    made.notes.append("Dropped: of the base's choices, if the gates' logits are normal.")
