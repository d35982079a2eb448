"""What a point of quality may cost in a preset, by recorded outcomes. Pure.

A preset gives up κ of quality to save the whole cost of an answer by the best. So its price of cost
is λ = κ / reference cost, whatever the unit and the level of prices
(`service.broker.reference_cost`).

`choose` finds one κ for several compositions. `choose_own` finds the κ of one composition: it
begins with the general one, and moves only where the composition's own outcomes say that quality
suffers, or that equal quality leaves more to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_models.frontier_evaluation import Comparison, standard_error
from service.config.router_presets import PresetsConfig

Floats = NDArray[np.float64]
Rows = NDArray[np.bool_]

FOLDS = 5
# Candidates for κ: 0, and twelve a decade.
MAX_POINT_COST = 1000.0
KAPPAS = np.concatenate(([0.0], np.geomspace(0.001, 1.0, 37)))
# The presets, and their names in `PresetsConfig.of`.
PRESETS = {"fast": "fast", "auto": "", "best": "best"}
# Points that count as equal quality.
EQUAL_POINTS = 1.0
DRAWS = 2000
_SWEEP = np.concatenate(([0.0], np.geomspace(1e-3, 1e3, 400)))


@dataclass(frozen=True, slots=True)
class Rule:
    """The κ of a preset is the greatest that loses at most so many points on every data set.

    Attributes:
        points: Points that may be lost.
        of_peak: Whether they are lost against the best that the router can do, else against always
            asking the best single expert.
        target_cost: In a composition's own κ: cost as a share of always asking the best single
            expert, down to which quality is given up within the rule.
    """

    points: float
    of_peak: bool = False
    target_cost: float = math.inf


RULES = {"fast": Rule(5.0), "auto": Rule(EQUAL_POINTS, target_cost=0.76), "best": Rule(0.25, True)}


@dataclass(frozen=True, slots=True)
class Played:
    """Results at each of K values of κ on N prompts that have every expert.

    Attributes:
        name: The data set.
        best: The expert with the best mean score.
        chosen_on: (N,), whether κ may be chosen by the prompt.
        prompts: (N,), the number of each row's prompt, for standard errors.
        score: (K, N) in [0, 1].
        cost: (K, N).
        best_score: (N,), the score of the best single expert.
        best_cost: (N,), its cost.
    """

    name: str
    best: str
    chosen_on: Rows
    prompts: NDArray[np.intp]
    score: Floats
    cost: Floats
    best_score: Floats
    best_cost: Floats

    def lead(self, rows: Rows) -> Floats:
        """(K,), mean score less that of the best single expert, in points."""
        lead = self.score[:, rows].mean(axis=1) - self.best_score[rows].mean()
        return np.asarray(100 * lead)

    def lead_errors(self, rows: Rows) -> Floats:
        """(K,), the standard errors of `lead`, in points."""
        clusters = np.unique(self.prompts[rows], return_inverse=True)[1]
        gains = 100 * (self.score[:, rows] - self.best_score[rows])
        return np.array([standard_error(gain, clusters) for gain in gains])

    def share(self, rows: Rows) -> Floats:
        """(K,), mean cost as a share of that of the best single expert."""
        best = self.best_cost[rows].mean()
        return np.asarray(self.cost[:, rows].mean(axis=1) / (best if best > 0 else np.inf))


def play_choices(
    name: str,
    experts: Sequence[str],
    single: tuple[Floats, Floats],
    quality: Floats,
    played: tuple[Floats, Floats, Floats],
    reference: Floats,
    prompts: Sequence[str],
    chosen_on: Rows,
) -> Played:
    """Decide about every prompt at every κ.

    Args:
        name: For the report.
        experts: The E experts.
        single: Score and cost of each expert alone, both (N, E).
        quality: (N, R), expected quality; -inf where a recipe is no candidate.
        played: Expected cost, score and cost of each recipe, each (N, R).
        reference: (N,), the reference cost.
        prompts: The N prompts.
        chosen_on: (N,), whether κ may be chosen by the prompt.
    """
    expected, score, cost = played
    level = np.where(reference > 0, reference, np.inf)[:, None]
    rows = np.arange(len(quality))
    choices = [(quality - kappa / level * expected).argmax(axis=1) for kappa in KAPPAS]
    known = ~np.isnan(single[0]).any(axis=0)
    best = int(np.where(known, np.where(known, single[0], 0).mean(axis=0), -np.inf).argmax())
    return Played(
        name=name,
        best=experts[best],
        chosen_on=chosen_on,
        prompts=np.unique(np.array(prompts, dtype=object), return_inverse=True)[1],
        score=np.stack([score[rows, choice] for choice in choices]),
        cost=np.stack([cost[rows, choice] for choice in choices]),
        best_score=single[0][:, best],
        best_cost=single[1][:, best],
    )


def play_compared(name: str, compared: Comparison, reference: Floats, chosen_on: Rows) -> Played:
    """Decide about the compared prompts at every κ; `reference` (N,) is of these prompts."""
    table, results = compared.table, compared.played
    quality = np.where(np.isnan(results.score), -np.inf, compared.predicted.quality)
    outcomes = compared.predicted.cost, results.score, results.cost
    single = table.score, table.cost
    return play_choices(
        name, table.experts, single, quality, outcomes, reference, table.prompts, chosen_on
    )


def choose(played: Sequence[Played], rule: Rule) -> int:
    """The position of a rule's κ, on the rows to choose on; 0, which is κ = 0, if none passes."""
    passes = np.ones(len(KAPPAS), dtype=bool)
    for one in played:
        lead = one.lead(one.chosen_on)
        passes &= lead >= (lead.max() if rule.of_peak else 0.0) - rule.points
    return int(np.flatnonzero(passes)[-1]) if passes.any() else 0


def general_choice(preset: str) -> int:
    """The position of the κ nearest to that of the presets' defaults."""
    weight = PresetsConfig().of(PRESETS[preset]).cost_weight
    return 1 + int(np.abs(np.log(KAPPAS[1:] / weight)).argmin())


def choose_own(played: Played, rows: Rows) -> dict[str, int]:
    """The positions of the presets' κ in one composition, by some of its prompts.

    Each preset begins with its general κ. Where that breaks the preset's rule, κ is the greatest
    smaller one that keeps it. Otherwise `auto` goes on to the first κ at which its cost is the
    rule's target, if the rule is kept on the way, and if that is below the κ of `auto:fast`. A lead
    counts less its standard error, so that the rule holds on other prompts, too.
    """
    lead, errors, share = played.lead(rows), played.lead_errors(rows), played.share(rows)
    found: dict[str, int] = {}
    for preset, rule in RULES.items():
        sure = lead if rule.of_peak else lead - errors
        passes = sure >= (lead.max() if rule.of_peak else 0.0) - rule.points
        at = general_choice(preset)
        if not passes[at]:
            kept = np.flatnonzero(passes[:at])
            at = int(kept[-1]) if len(kept) else 0
        elif share[at] > rule.target_cost:
            # As far as the target, or not at all: what does not reach it is given up for little.
            end = at
            while end < found["fast"] and passes[end + 1] and share[end] > rule.target_cost:
                end += 1
            at = end if share[end] <= rule.target_cost else at
        found[preset] = at
    found["auto"] = min(found["auto"], found["fast"])
    found["best"] = min(found["best"], found["auto"])
    return found


@dataclass(frozen=True, slots=True)
class OwnPreset:
    """A preset whose κ a composition's own outcomes chose.

    Attributes:
        kappa: The κ that all prompts chose.
        lead: Points beside the best single expert, on prompts that did not choose κ.
        lead_interval: Its 95 % interval.
        cost: Cost there as a share of always asking the best single expert.
        cost_interval: Its 95 % interval.
    """

    kappa: float
    lead: float
    lead_interval: tuple[float, float]
    cost: float
    cost_interval: tuple[float, float]


def judge_own(played: Played, seed: int = 0) -> dict[str, OwnPreset]:
    """Choose the presets' κ by all prompts, and judge the way of choosing them by folds.

    The κ of a fold is chosen by the other folds. Intervals are bootstrap percentiles over prompts.
    """
    numbers = int(played.prompts.max()) + 1
    fold = (np.random.default_rng(seed).permutation(numbers) % FOLDS)[played.prompts]
    score = {name: np.zeros(len(fold)) for name in RULES}
    cost = {name: np.zeros(len(fold)) for name in RULES}
    for k in range(FOLDS):
        inside, outside = fold != k, fold == k
        if not inside.any() or not outside.any():
            inside = outside = np.ones(len(fold), dtype=bool)
        for name, at in choose_own(played, inside).items():
            score[name][outside] = played.score[at, outside]
            cost[name][outside] = played.cost[at, outside]
    chosen = choose_own(played, np.ones(len(fold), dtype=bool))
    return {
        name: _judged(played, KAPPAS[at], score[name], cost[name], seed)
        for name, at in chosen.items()
    }


def _judged(played: Played, kappa: float, score: Floats, cost: Floats, seed: int) -> OwnPreset:
    numbers = int(played.prompts.max()) + 1
    sums = [
        np.bincount(played.prompts, weights=values, minlength=numbers)
        for values in (100 * (score - played.best_score), np.ones(len(score)), cost)
    ]
    sums.append(np.bincount(played.prompts, weights=played.best_cost, minlength=numbers))
    draw = np.random.default_rng(seed + 1)
    leads, costs = np.zeros(DRAWS), np.zeros(DRAWS)
    for i in range(DRAWS):
        taken = draw.integers(0, numbers, numbers)
        gain, count, spent, usual = (float(one[taken].sum()) for one in sums)
        leads[i], costs[i] = gain / count, spent / usual if usual > 0 else 0.0
    low, high = np.percentile(leads, (2.5, 97.5))
    least, most = np.percentile(costs, (2.5, 97.5))
    usual = float(played.best_cost.sum())
    return OwnPreset(
        float(kappa),
        float(100 * (score - played.best_score).mean()),
        (float(low), float(high)),
        float(cost.sum()) / usual if usual > 0 else 0.0,
        (float(least), float(most)),
    )


def point_cost(kappa: float) -> float:
    """What one point may cost, as a share of the best's answer: 0.01 / κ to two digits.

    It is rounded up, so that no more quality is given up than was chosen.
    """
    if kappa <= 0:
        return MAX_POINT_COST
    share = 0.01 / kappa
    digit = 10.0 ** (math.floor(math.log10(share)) - 1)
    return min(MAX_POINT_COST, float(f"{math.ceil(share / digit - 1e-9) * digit:.6g}"))


def least_costs(compared: Comparison, points: float = EQUAL_POINTS) -> dict[str, float | None]:
    """The least cost at equal quality that choices among the recipes could reach at all.

    Recorded outcomes are known here, so that no router that sees as much of a prompt costs less:
    one mixture of recipes for all prompts, a mixture for each category, or a recipe for each
    prompt. Each is a linear program, solved by its dual over a sweep of prices.

    Args:
        compared: The prompts and what each recipe did on them.
        points: Points that may be lost against always asking the best single expert.

    Returns:
        Shares of the best single expert's cost; None where the recipes don't reach its quality.
        Without given categories there is no share by category.
    """
    table, results = compared.table, compared.played
    whole = ~np.isnan(results.score).any(axis=0)
    score, cost = results.score[:, whole], results.cost[:, whole]
    known = np.where(np.isnan(table.score).any(axis=0), -1.0, np.nan_to_num(table.score))
    best = int(known.mean(axis=0).argmax())
    target = float(table.score[:, best].sum()) - points / 100 * len(table)
    usual = float(table.cost[:, best].sum())
    groups = {"always alike": np.zeros(len(table), dtype=np.intp)}
    if all(category is not None for category in table.categories):
        groups["by category"] = np.unique(
            np.array(table.categories, dtype=object), return_inverse=True
        )[1]
    groups["prompt by prompt"] = np.arange(len(table))
    found: dict[str, float | None] = {}
    for name, group in groups.items():
        member = np.zeros((int(group.max()) + 1, score.shape[1]))
        spent = np.zeros_like(member)
        np.add.at(member, group, score)
        np.add.at(spent, group, cost)
        least = _least_cost(member, spent, target, usual)
        found[name] = None if least is None or usual <= 0 else least / usual
    return found


def _least_cost(score: Floats, cost: Floats, target: float, usual: float) -> float | None:
    """The least total cost of one mixture of columns for each row whose total score is enough."""
    rows = np.arange(len(score))
    points = []
    for price in _SWEEP / max(usual / len(score), 1e-300):
        at = (score - price * cost).argmax(axis=1)
        points.append((float(cost[rows, at].sum()), float(score[rows, at].sum())))
    points.sort()
    enough = [i for i, (_, reached) in enumerate(points) if reached >= target - 1e-9]
    if not enough:
        return None
    at = enough[0]
    if at == 0:
        return points[0][0]
    (low, below), (high, above) = points[at - 1], points[at]
    return low + (high - low) * (target - below) / (above - below)


def own_to_json(own: Mapping[str, OwnPreset]) -> dict[str, dict[str, Any]]:
    """The presets of a composition, as they stand in a manifest and in reports."""
    return {
        name: {
            "point_cost": point_cost(one.kappa),
            "kappa": one.kappa,
            "lead": one.lead,
            "lead_interval": [*one.lead_interval],
            "cost": one.cost,
            "cost_interval": [*one.cost_interval],
        }
        for name, one in own.items()
    }


def presets_section(own: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """The part of a manifest by which the service prices the presets; empty without any."""
    if own is None:
        return {}
    return {"presets": {name: {"point_cost": one["point_cost"]} for name, one in own.items()}}


def _share(point_cost: float) -> str:
    return "anything" if point_cost >= MAX_POINT_COST else f"{100 * point_cost:.3g} %"


def preset_text(
    own: Mapping[str, Mapping[str, Any]], bounds: Mapping[str, float | None] | None
) -> str:
    """What a card says of a composition's presets: a table, and what no price could reach."""
    names = {"fast": "auto:fast", "auto": "auto", "best": "auto:best"}
    lines = [
        "What a point may cost is chosen by these outcomes, and judged on folds that did not",
        "choose it. In brackets are 95 % intervals (bootstrap over prompts).",
        "",
        "| preset | a point may cost | points beside the best | cost of always the best |",
        "| --- | --- | --- | --- |",
    ]
    for name, one in own.items():
        (low, high), (least, most) = one["lead_interval"], one["cost_interval"]
        lines.append(
            f"| `{names[name]}` | {_share(one['point_cost'])} | {one['lead']:+.2f} "
            f"({low:+.2f} to {high:+.2f}) | {100 * one['cost']:.0f} % "
            f"({100 * least:.0f} to {100 * most:.0f} %) |"
        )
    if bounds:
        told = ", ".join(
            f"{how} {'out of reach' if share is None else f'{100 * share:.0f} %'}"
            for how, share in bounds.items()
        )
        lines += [
            "",
            f"Within {EQUAL_POINTS:g} point of always the best, and with the outcomes known,",
            f"choices cost at least: {told}.",
        ]
    return "\n".join(lines)
