"""Measures steering in one running engine whose profiles are swapped in turn."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.lib.child_processes import say
from loadtests.lib.median_intervals import median, ratios
from loadtests.lib.targets_and_report import Report, Table, at_most
from loadtests.moe.random_mixtral import engine_options, given_or_random
from loadtests.swap.real_shared_slot_engine import SharedEngine, ask
from service.config import Config, VllmOptions
from service.engine.vllm.swapping_engine import Weights
from service.moe.steering_profile import LayerSteering, SteeringProfile, moe_shape, write_profile
from service.moe.virtual_expert_profiles import steering_of

EXCHANGE_MS = 30.0
BASE = "base"
# The demo's layers, fewer of them: what steering costs and saves is of each layer, as its work.
_LAYERS, _EXPERTS, _TOP_K = 12, 4, 2


@dataclass(frozen=True, slots=True)
class Work:
    """The requests of a turn: how many at once, and the tokens of their prompts and answers."""

    in_flight: int
    prompt: int
    answer: int


_WORK = Work(in_flight=8, prompt=48, answer=24)


@dataclass(slots=True)
class Found:
    """Exchanges in s, and tokens per s by name."""

    exchange_s: list[float] = field(default_factory=list)
    tokens_per_s: dict[str, list[float]] = field(default_factory=dict)


def _profiles(folder: Path) -> dict[str, SteeringProfile]:
    shape = moe_shape(folder)
    if shape is None:
        raise RuntimeError(f"{folder} is no mixture of experts")
    half = [e >= max(shape.top_k, shape.experts // 2) for e in range(shape.experts)]
    rules = {
        "one": LayerSteering.of(shape.experts, top_k=1),
        "half": LayerSteering.of(shape.experts, mask=half),
    }
    return {
        name: SteeringProfile(shape, dict.fromkeys(shape.layers, rule))
        for name, rule in rules.items()
    }


def sources(
    folder: Path, root: Path, profiles: Mapping[str, SteeringProfile]
) -> dict[str, Weights]:
    """What an engine needs of a base in `folder` and its profiles, which are written to `root`."""
    experts: dict[str, Mapping[str, str]] = {BASE: {"model": str(folder)}}
    for name, profile in profiles.items():
        write_profile(profile, root / name)
        experts[name] = {"base": BASE, "profile": str(root / name)}
    config = Config.model_validate({"experts": experts, "pools": {"p": {"engine": "simulated"}}})
    return {
        BASE: Weights(str(folder)),
        **{
            name: Weights(str(folder), steering=steering_of(config, name, folder))
            for name in profiles
        },
    }


async def _turn(engine: SharedEngine, name: str, work: Work, rounds: int) -> float:
    began_s = time.perf_counter()
    tokens = 0
    for _ in range(rounds):
        requests = (ask(engine, name, work.prompt, work.answer) for _ in range(work.in_flight))
        tokens += sum(await asyncio.gather(*requests)) + work.in_flight * work.prompt
    return tokens / (time.perf_counter() - began_s)


async def measure(
    weights: dict[str, Weights],
    options: VllmOptions,
    work: Work,
    *,
    turns: int,
    rounds: int,
    times: int = 0,
) -> Found:
    """Measure exchanges of profiles, `times` of them, and turns of the same work with each profile.

    Raises RuntimeError where an exchange fails.
    """
    engine = SharedEngine(weights, options)
    found = Found()
    names = list(weights)
    try:
        say("an engine with a mixture of experts")
        await engine.start()
        for name in names[1:]:
            await engine.load_to_host(name)
        for name in [*names[1:], *names]:  # each one's canary, and code that is new
            await engine.swap_in(name)
            await _turn(engine, name, work, 1)
        if times:
            say(f"{times} exchanges")
        for i in range(times):
            done = await engine.swap_in(names[(i + 1) % len(names)])
            if not done.ok or done.method != "steer":
                raise RuntimeError(f"an exchange went wrong: {done}")
            found.exchange_s.append(done.swap_s)
        for i in range(turns):
            say(f"turn {i + 1} of {turns}")
            for name in names if i % 2 else reversed(names):
                await engine.swap_in(name)
                rate = await _turn(engine, name, work, rounds)
                found.tokens_per_s.setdefault(name, []).append(rate)
    finally:
        await engine.close()
    return found


def report(model: Path | None, *, times: int = 200, turns: int = 8, rounds: int = 3) -> Report:
    """Tables and target. `model`: a folder; None: a random one with layers of the demo's size.

    Raises RuntimeError where the folder is no mixture of experts.
    """
    options = engine_options(_WORK.in_flight)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given_or_random(
            model, Path(scratch), layers=_LAYERS, experts=_EXPERTS, top_k=_TOP_K
        )
        root = Path(scratch) / "profiles"
        root.mkdir()
        weights = sources(folder, root, _profiles(folder))
        shape = moe_shape(folder)
        assert shape is not None
        kept = max(shape.top_k, shape.experts // 2)
        found = asyncio.run(
            measure(weights, options, _WORK, turns=turns, rounds=rounds, times=times)
        )
    return _told(found, shape.experts, shape.top_k, kept)


def _told(found: Found, experts: int, top_k: int, kept: int) -> Report:
    made = Report("moe_steer")
    exchange = median([1000 * s for s in found.exchange_s])
    made.reach.append(
        at_most("exchange of a profile, pause and resume included, ms", EXCHANGE_MS, exchange)
    )
    made.facts["exchange_ms"] = exchange.as_json()
    made.tables.append(
        Table(
            "Exchanges of a profile, the engine idle; median with its 95 % interval",
            ("exchanges", "ms"),
            [(str(len(found.exchange_s)), exchange.text(1))],
        )
    )
    words = {
        BASE: f"top {top_k} of {experts}, vLLM's own choice",
        "one": f"top 1 of {experts}",
        "half": f"top {top_k} of {kept}, the others masked",
    }
    table = Table(
        f"Throughput, {_WORK.in_flight} in flight, prompts of {_WORK.prompt} and answers of "
        f"{_WORK.answer} tokens; medians with 95 % intervals",
        ("routed experts", "turns", "tokens/s", "times the base's"),
    )
    base: Sequence[float] = found.tokens_per_s[BASE]
    for name, rates in found.tokens_per_s.items():
        rate, times = median(rates), ratios(rates, base)
        made.facts[name] = {"tokens_per_s": rate.as_json(), "times_base": times.as_json()}
        table.rows.append((words[name], str(len(rates)), rate.text(1), times.text()))
    table.rows.sort(key=lambda row: list(words.values()).index(row[0]))
    made.tables.append(table)
    return made
