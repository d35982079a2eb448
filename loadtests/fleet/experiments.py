"""The experiments of `python -m loadtests.fleet`: which scenarios are played, and their figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from loadtests.fleet.baselines import FirstComeRun, LeastLoadedRun, StaticBestRun
from loadtests.fleet.market_traffic import PER_MODEL_S, Pattern, viral_expert
from loadtests.fleet.simulated_fleet import (
    SECTIONS,
    Answer,
    FleetRun,
    Outcome,
    Scenario,
    play,
)
from loadtests.lib.child_processes import say
from loadtests.lib.targets_and_report import Report, Table, TargetCheck

OURS = "coe"
SYSTEMS: dict[str, Callable[[Scenario, int], FleetRun]] = {
    OURS: FleetRun,
    "first come, LRU": FirstComeRun,
    "least loaded, random": LeastLoadedRun,
    "static best": StaticBestRun,
}
WANTED = 0.9
_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is played.

    Attributes:
        seeds: The repetitions.
        for_s: Seconds of a scenario; a third of it, at most 60 s, is warm-up.
        loads: Multiples of the market's rate.
        even: Experts that are all asked alike, on ten accelerators.
        market: Experts with the market's shares, on ten accelerators.
        fleets: Sizes of fleets, in accelerators.
        fleet_s: Seconds of their scenarios.
        gateways: Numbers of gateways.
    """

    seeds: tuple[int, ...] = (1, 2, 3)
    for_s: float = 240.0
    loads: tuple[float, ...] = (1, 4, 8, 12)
    even: tuple[int, ...] = (20, 40, 60, 80, 120)
    market: tuple[int, ...] = (150, 300, 600)
    fleets: tuple[int, ...] = (10, 100, 1000)
    fleet_s: float = 60.0
    gateways: tuple[int, ...] = (1, 2, 4, 8, 16, 32)


QUICK = Extent(
    seeds=(1,),
    for_s=10.0,
    loads=(1,),
    even=(10,),
    market=(10,),
    fleets=(2, 4),
    fleet_s=4.0,
    gateways=(1, 2),
)


@dataclass(slots=True)
class Curves:
    """What is drawn: by system, points of (x, low, median, high); and attainment over time."""

    by_load: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)
    by_models: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)
    cost: list[tuple[float, float]] = field(default_factory=list)
    over_time: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def market(experts: int, for_s: float, load: float = 1.0) -> Pattern:
    """The market's rate and shares for so many experts, with ups and downs and bursts."""
    return Pattern(
        experts,
        per_s=experts * PER_MODEL_S * load,
        for_s=for_s,
        daily=0.3,
        day_s=for_s / 1.5,
        bursts_per_s=0.02,
        auto=0.0,
    )


def even(experts: int, for_s: float) -> Pattern:
    """The market's rate, the same for every expert."""
    return Pattern(experts, experts * PER_MODEL_S, for_s, skewed=False, auto=0.0)


def _warm_s(for_s: float) -> float:
    return min(60.0, for_s / 3)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def _text(values: Sequence[float], digits: int = 3) -> str:
    low, middle, high = _spread(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _all(scenario: Scenario, system: str, seeds: Sequence[int]) -> list[Outcome]:
    return [play(scenario, seed, SYSTEMS[system]) for seed in seeds]


def by_load(report: Report, extent: Extent, curves: Curves, accelerators: int = 10) -> None:
    """Goodput of 150 experts on ten accelerators at growing load, for each system."""
    accelerators = 3 if extent is QUICK else accelerators
    experts = 10 if extent is QUICK else 15 * accelerators
    table = Table(
        f"{experts} experts on {accelerators} accelerators, by multiples of the market's rate",
        (
            "system",
            "requests/s",
            "met",
            "good requests/s/accelerator",
            "good tokens/s/accelerator",
            "first token p50, p99, s",
            "switches/min/accelerator",
        ),
    )
    best: dict[str, float] = {}
    for load in extent.loads:
        pattern = market(experts, extent.for_s, load)
        scenario = Scenario(pattern, accelerators, warm_s=_warm_s(extent.for_s))
        for system in SYSTEMS:
            say(f"{system}, {load:g} times the market's rate")
            outcomes = _all(scenario, system, extent.seeds)
            met = [one.attainment for one in outcomes]
            goodput = [one.goodput for one in outcomes]
            firsts = [
                statistics.median(one.first_percentile_s(p) for one in outcomes) for p in (50, 99)
            ]
            table.rows.append(
                (
                    system,
                    f"{pattern.per_s:.1f}",
                    _text(met),
                    _text(goodput),
                    f"{statistics.median(one.good_tokens for one in outcomes):.0f}",
                    f"{firsts[0]:.2f}, {firsts[1]:.1f}",
                    f"{statistics.median(one.switches_per_min for one in outcomes):.2f}",
                )
            )
            curves.by_load.setdefault(system, []).append((pattern.per_s, *_spread(met)))
            if statistics.median(met) >= WANTED:
                best[system] = max(best.get(system, 0.0), statistics.median(goodput))
    report.tables.append(table)
    report.facts["goodput_at_90"] = best
    report.notes.append(
        "Greatest goodput, requests/s and accelerator, with the objective met by 90 %: "
        + "; ".join(f"{name} {best.get(name, 0.0):.2f}" for name in SYSTEMS)
        + "."
    )


def by_models(report: Report, extent: Extent, curves: Curves, accelerators: int = 10) -> None:
    """How many experts an accelerator can have while 90 % of the requests meet the objective."""
    accelerators = 3 if extent is QUICK else accelerators
    most: dict[str, dict[str, float]] = {}
    table = Table(
        f"Experts on {accelerators} accelerators, {PER_MODEL_S:g} requests/s for each",
        ("traffic", "experts/accelerator", *SYSTEMS),
    )
    for name, counts in (("even", extent.even), ("market", extent.market)):
        for experts in counts:
            pattern = (even if name == "even" else market)(experts, extent.for_s)
            scenario = Scenario(pattern, accelerators, warm_s=_warm_s(extent.for_s))
            row = [name, f"{experts / accelerators:g}"]
            for system in SYSTEMS:
                say(f"{system}, {experts} experts, {name}")
                met = [one.attainment for one in _all(scenario, system, extent.seeds)]
                row.append(_text(met))
                point = (experts / accelerators, *_spread(met))
                curves.by_models.setdefault(f"{system}, {name}", []).append(point)
                if statistics.median(met) >= WANTED:
                    most.setdefault(name, {})[system] = experts / accelerators
            table.rows.append(row)
    report.tables.append(table)
    report.facts["experts_per_accelerator_at_90"] = most


def by_size(report: Report, extent: Extent, curves: Curves) -> None:
    """What a request costs the control plane, from ten accelerators to a thousand."""
    table = Table(
        "Processor time of the service's decisions for each request, ms",
        ("accelerators", "experts", "gateways", "requests", "met", *SECTIONS, "all"),
    )
    totals = []
    for size in extent.fleets:
        say(f"{size} accelerators")
        kinds = max(1, size // 100)
        experts = 150 * kinds if extent is not QUICK else 10
        per_s = 1.0 * size
        pattern = replace(market(experts, extent.fleet_s), per_s=per_s, auto=0.1)
        scenario = Scenario(
            pattern,
            size,
            kinds,
            gateways=max(1, size // 100),
            warm_s=_warm_s(extent.fleet_s),
        )
        outcome = play(scenario, extent.seeds[0])
        each = [outcome.cpu_ms(section) for section in SECTIONS]
        totals.append(sum(each))
        table.rows.append(
            (
                str(size),
                str(experts),
                str(scenario.gateways),
                str(len(outcome.answers)),
                f"{outcome.attainment:.3f}",
                *(f"{one:.3f}" for one in each),
                f"{sum(each):.3f}",
            )
        )
        curves.cost.append((size, sum(each)))
    report.tables.append(table)
    grown = totals[-1] / totals[0]
    report.facts["control_plane_ms"] = dict(zip(map(str, extent.fleets), totals, strict=True))
    report.reach.append(
        TargetCheck(
            f"cost of a request, {extent.fleets[-1]} accelerators over {extent.fleets[0]}, at most",
            1.2,
            round(grown, 3),
            grown <= 1.2,
        )
    )


def attainment_over_time(answers: Sequence[Answer], width_s: float) -> list[tuple[float, float]]:
    """The share of the requests that met the objective, by the time of their arrival."""
    windows: dict[int, list[bool]] = {}
    for one in answers:
        windows.setdefault(int(one.arrival.at_s // width_s), []).append(one.good)
    return [(at * width_s, sum(good) / len(good)) for at, good in sorted(windows.items())]


def settled_after_s(answers: Sequence[Answer], began_s: float, width_s: float) -> float:
    """Seconds from an event until no window of requests meets the objective less than wanted."""
    low = [
        at_s + width_s - began_s
        for at_s, met in attainment_over_time(answers, width_s)
        if at_s + width_s > began_s and met < WANTED
    ]
    return max(low, default=0.0)


def by_event(report: Report, extent: Extent, curves: Curves, accelerators: int = 20) -> None:
    """What users see when nodes die, when an expert goes viral, and during a rolling reload."""
    small = extent is QUICK
    accelerators = 4 if small else accelerators
    experts = 10 if small else 150
    for_s = extent.for_s
    at_s = for_s / 2
    base = Scenario(
        replace(market(experts, for_s, 2.0), daily=0.0, bursts_per_s=0.0, auto=0.1),
        accelerators,
        gateways=2,
        warm_s=_warm_s(for_s),
    )
    viral = replace(base, pattern=replace(base.pattern, viral_s=at_s))
    events = {
        "10 % of the nodes die": replace(base, kill_s=at_s),
        "an expert goes viral": viral,
        "rolling reload": replace(base, reload_s=at_s),
    }
    table = Table(
        f"{experts} experts on {accelerators} accelerators, an event in the middle",
        ("event", "met before", "met after", "lowest 5 s", "settled after, s", "failed", "again"),
    )
    for name, scenario in events.items():
        say(name)
        outcomes = _all(scenario, OURS, extent.seeds)
        after = [[a for a in one.answers if a.arrival.at_s >= at_s] for one in outcomes]
        before = [[a for a in one.answers if a.arrival.at_s < at_s] for one in outcomes]
        lows = [
            min((met for _, met in attainment_over_time(one, _WINDOW_S)), default=1.0)
            for one in after
        ]
        settled = [settled_after_s(one.answers, at_s, _WINDOW_S) for one in outcomes]
        table.rows.append(
            (
                name,
                _text([_met(one) for one in before]),
                _text([_met(one) for one in after]),
                _text(lows),
                _text(settled, 0),
                str(sum(not a.expert for one in outcomes for a in one.answers)),
                str(sum(a.attempts > 1 for one in outcomes for a in one.answers)),
            )
        )
        curves.over_time[name] = attainment_over_time(outcomes[0].answers, _WINDOW_S)
        report.facts[name] = {"settled_s": settled, "lowest": lows}
        if scenario is viral:
            its = [
                _viral(one, scenario, seed)
                for one, seed in zip(outcomes, extent.seeds, strict=True)
            ]
            report.notes.append(
                f"Of the requests for the viral expert itself {_text([_met(one) for one in its])} "
                "met the objective."
            )
    report.tables.append(table)


def _met(answers: Sequence[Answer]) -> float:
    return sum(one.good for one in answers) / max(1, len(answers))


def _viral(outcome: Outcome, scenario: Scenario, seed: int) -> list[Answer]:
    expert = viral_expert(scenario.pattern, seed)
    began_s = scenario.pattern.viral_s or 0.0
    return [a for a in outcome.answers if a.arrival.expert == expert and a.arrival.at_s >= began_s]


def by_gateways(report: Report, extent: Extent, accelerators: int = 20) -> None:
    """Whether more gateways, which do not talk, decide worse than one."""
    small = extent is QUICK
    accelerators = 4 if small else accelerators
    table = Table(
        f"The same traffic through gateways that do not talk, {accelerators} accelerators",
        ("gateways", "met", "switches/min/accelerator", "same pool for an expert"),
    )
    pattern = market(10 if small else 150, extent.for_s, 4.0)
    found: dict[int, list[Outcome]] = {}
    for count in extent.gateways:
        say(f"{count} gateways")
        scenario = Scenario(pattern, accelerators, gateways=count, warm_s=_warm_s(extent.for_s))
        found[count] = _all(scenario, OURS, extent.seeds[: 1 if count > 4 else None])
        table.rows.append(
            (
                str(count),
                _text([one.attainment for one in found[count]]),
                _text([one.switches_per_min for one in found[count]], 2),
                _text([one.agreement for one in found[count]]),
            )
        )
    report.tables.append(table)
    least = min(statistics.median(o.attainment for o in one) for one in found.values())
    alone = statistics.median(one.attainment for one in found[extent.gateways[0]])
    report.reach.append(
        TargetCheck(
            "met with many gateways over met with one, at least",
            0.98,
            round(least / max(alone, 1e-9), 4),
            least >= 0.98 * alone,
        )
    )
