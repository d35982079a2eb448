"""Compares policies of expert slots on recorded and random choices of gates. No engine runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from loadtests.lib.targets_and_report import Report, Table
from loadtests.lib.varied_prompts import prompts
from loadtests.moe.gate_traces import model_trace, random_trace
from service.expert_offload.slot_policies import POLICY_NAMES
from service.expert_offload.slot_simulation import (
    PREFETCH_NAMES,
    GateTrace,
    belady,
    gap_closed,
    prefetch_accuracy,
    simulate,
)

BOUNDS = (0.1, 0.25, 0.5, 0.75)
_SEED = 1
_LAYERS, _TEXTS, _TOKENS = 8, 16, 128


def traces(model: Path | None) -> dict[str, GateTrace]:
    """Return the traces by name: a random one alone and in a batch, and a model's where given."""
    found = {
        f"random, {at_once} at once": random_trace(
            layers=_LAYERS,
            texts=_TEXTS,
            tokens=_TOKENS,
            at_once=at_once,
            chance=np.random.default_rng(_SEED),
        )
        for at_once in (1, 4)
    }
    if model is not None:
        for at_once in (1, 4):
            name = f"{model.name}, {at_once} at once"
            texts = prompts(_TEXTS, seed=_SEED, characters=4 * _TOKENS)
            found[name] = model_trace(model, texts, at_once=at_once, tokens=_TOKENS)
    return found


def report(found: Mapping[str, GateTrace]) -> Report:
    """Return tables of hit rates by policy, and of prefetching."""
    made = Report("moe_offload_simulated")
    for name, trace in found.items():
        slots = sorted({max(1, int(trace.experts * bound)) for bound in BOUNDS})
        table = Table(
            f"{name}: hit rate of {trace.experts} experts in {trace.layers} layers, and the share "
            "of LRU's gap to Belady that is closed",
            ("policy", *(f"{count} slots" for count in slots)),
        )
        best = {count: belady(trace, count) for count in slots}
        lru = {count: simulate(trace, count, "lru") for count in slots}
        facts: dict[str, dict[str, float]] = {}
        for policy in POLICY_NAMES:
            row: list[str] = [policy]
            for count in slots:
                outcome = simulate(trace, count, policy)
                closed = gap_closed(outcome, lru[count], best[count])
                row.append(
                    f"{outcome.hit_rate:.3f}" + ("" if closed is None else f" ({closed:+.0%})")
                )
                facts.setdefault(policy, {})[str(count)] = round(outcome.hit_rate, 4)
            table.rows.append(row)
        table.rows.append(["Belady", *(f"{best[count].hit_rate:.3f}" for count in slots)])
        facts["belady"] = {str(count): round(best[count].hit_rate, 4) for count in slots}
        made.tables.append(table)
        made.facts[name] = facts
        made.tables.append(_prefetching(name, trace, slots))
        if trace.predicted is not None:
            right = prefetch_accuracy(trace)
            made.notes.append(
                f"{name}: the gate of the next layer, fed with this layer's input, predicts "
                f"{np.mean(right):.1%} of the experts (by layer {min(right):.1%} to "
                f"{max(right):.1%})."
            )
            made.facts[f"{name}, predicted"] = [round(share, 4) for share in right]
    return made


def _prefetching(name: str, trace: GateTrace, slots: list[int]) -> Table:
    table = Table(
        f"{name}: with policy cacheable, the share of uses that find their expert, and loads per "
        "token and layer",
        ("prefetch", *(f"{count} slots" for count in slots)),
    )
    for prefetch in PREFETCH_NAMES:
        if prefetch == "next_gate" and trace.predicted is None:
            continue
        row: list[str] = [prefetch]
        for count in slots:
            outcome = simulate(trace, count, "cacheable", prefetch)
            loads = outcome.loads / trace.tokens / trace.layers
            row.append(f"{outcome.hit_rate:.3f}, {loads:.2f}")
        table.rows.append(row)
    return table
