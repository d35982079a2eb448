"""Judges how the map and the direct estimate choose: in domain, out of domain, and at a price.

python -m router_models.expert_map_vs_direct_estimate --data DIR [--part routerdc|mmlu-pro]

`DIR` holds `routerdc_train.jsonl.gz` and `routerdc_costs.json`, `mmlu_pro_dev.jsonl.gz` and
`active_params_b.json`. Nothing that is fitted here is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from router_models.fit_settings import Settings
from router_models.frontier_evaluation import comparison, gains, singles, sweep
from router_models.linear_models import design, featurize
from router_models.outcome_reader import Table, costs_of, read_outcomes
from router_models.ridge_regression import TextKernel
from router_models.two_stage_fit import Fitted, Predicted, Problem
from service.classifier.expert_map import DirectEstimate
from service.classifier.hashed_ngrams import FeatureSpec

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Say = Callable[[str], None]
Splits = Sequence[tuple[Rows, Rows]]

FOLDS = 5
DRAWS = 2000
POOLS = {
    "A": (
        "Phi-3-mini-4k-instruct",
        "mathstral-7B",
        "Meta-Llama-3.1-8B-Instruct",
        "Mixtral-8x7B-Instruct-v0.1",
        "Yi-34B",
        "Meta-Llama-3.1-70B-Instruct",
    ),
    "B": (
        "Phi-3-mini-4k-instruct",
        "mathstral-7B",
        "Meta-Llama-3.1-8B-Instruct",
        "Mixtral-8x7B-Instruct-v0.1",
        "Meta-Llama-3.1-70B",
        "Qwen1.5-72B-Chat",
    ),
}
BUDGETS = {"A": (7.5, 20.0, 31.0, 65.0), "B": (20.0, 31.0, 49.4, 56.8, 70.6)}
CHOSEN = "power chosen by the rows"
BEFORE = "map alone, novel means average"
PLAIN = "plain kernel ridge"
_PLAIN_SPEC = FeatureSpec(char_orders=(3, 4), word_orders=(1,), bits=18)
_PLAIN_PENALTIES = (1.0, 4.0, 16.0)
_OLD_MAX_NOVELTY = 0.5


def variants(fitted: Fitted, powers: Iterable[float]) -> dict[str, Fitted]:
    """The fitted router, and the same with another trust in categories."""
    found, old = fitted.map, fitted.map
    average = DirectEstimate(
        old.prior @ old.score,
        old.prior @ old.cost,
        np.asarray(np.tensordot(old.prior, old.reach, axes=1), dtype=np.float64),
        np.zeros_like(old.direct.score_slope),
        np.zeros_like(old.direct.cost_slope),
    )
    alone = replace(old, trust_power=0.0, direct=average)
    return {
        BEFORE: replace(fitted, map=alone, max_novelty=_OLD_MAX_NOVELTY),
        CHOSEN: fitted,
    } | {
        f"power {power:g}": replace(fitted, map=replace(found, trust_power=power))
        for power in powers
    }


@dataclass(frozen=True, slots=True)
class Judged:
    """Predictions of each variant for every row, and the powers that the splits chose."""

    predicted: dict[str, Predicted]
    powers: list[float]


def judge(problem: Problem, splits: Splits) -> Judged:
    """Fit on the first rows of each split, and predict the others by every variant."""
    found: dict[str, Predicted] = {}
    powers = []
    shape = (len(problem.table), len(problem.played.recipes))
    for train, test in splits:
        fitted = problem.fit(train)
        powers.append(fitted.map.trust_power)
        for name, variant in variants(fitted, problem.settings.trust_powers).items():
            whole = found.setdefault(
                name,
                Predicted(
                    np.zeros((shape[0], len(problem.labels))),
                    np.full(shape, -np.inf),
                    np.zeros(shape),
                ),
            )
            part = problem.predict(variant, test)
            whole.posterior[test], whole.quality[test] = part.posterior, part.quality
            whole.cost[test] = part.cost
    return Judged(found, powers)


def plain_ridge(table: Table, splits: Splits, seed: int) -> Rows:
    """The choice of kernel ridge on 3- and 4-grams and words, (N,); rows train its penalty."""
    spec = _PLAIN_SPEC
    counts = featurize(table.prompts, spec).counts
    kernel = TextKernel(design(counts, np.ones(spec.buckets, dtype=np.float32)))
    score = table.score
    choice = np.zeros(len(table), dtype=np.int64)
    for train, test in splits:
        held = np.random.default_rng(seed).random(len(train)) < 1 / FOLDS
        inside, outside = train[~held], train[held]
        reached = []
        for penalty in _PLAIN_PENALTIES:
            alpha = kernel.solve(inside, score[inside], penalty)
            guess = kernel.predict(inside, alpha, outside) + score[inside].mean(axis=0)
            reached.append(score[outside, guess.argmax(axis=1)].mean())
        alpha = kernel.solve(train, score[train], _PLAIN_PENALTIES[int(np.argmax(reached))])
        guess = kernel.predict(train, alpha, test) + score[train].mean(axis=0)
        choice[test] = guess.argmax(axis=1)
    return choice


def interval(
    values: Floats, strata: Sequence[str] | None = None, seed: int = 0
) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean (N,), or of the mean over strata of their means."""
    rng = np.random.default_rng(seed)
    names = np.array(strata if strata is not None else [""] * len(values))
    draws = []
    for name in sorted(set(names)):
        mine = values[names == name]
        draws.append(
            np.array([mine[rng.integers(0, len(mine), len(mine))].mean() for _ in range(DRAWS)])
        )
    low, high = np.quantile(np.mean(draws, axis=0), (0.025, 0.975))
    return float(low), float(high)


def routerdc(data: Path, say: Say, settings: Settings | None = None) -> None:
    """In domain (five folds) and out of domain (each data set left out); no categories are given.

    Scores are means over the five tasks, as RouterDC's.
    """
    files = [data / "routerdc_train.jsonl.gz"]
    table, _ = read_outcomes(files, costs_of(data / "routerdc_costs.json", files))
    problem = Problem(table, settings or Settings())
    tasks = [name.split("/")[0].removesuffix("-train").removesuffix("_train") for name in table.ids]
    task = np.array(tasks)
    fold = problem.fold_of(FOLDS, "outer")
    parts: dict[str, list[tuple[Rows, Rows]]] = {
        "in domain, 5 folds": [
            (np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(FOLDS)
        ],
        "out of domain, each data set left out": [
            (np.flatnonzero(task != t), np.flatnonzero(task == t)) for t in sorted(set(tasks))
        ],
    }
    for title, splits in parts.items():
        judged = judge(problem, splits)
        best = np.zeros(len(table), dtype=np.int64)
        for train, test in splits:
            means = [
                table.score[train[task[train] == t]].mean(axis=0) for t in sorted(set(task[train]))
            ]
            best[test] = int(np.mean(means, axis=0).argmax())
        choices = {name: p.quality.argmax(axis=1) for name, p in judged.predicted.items()}
        choices = {
            "best single of the other rows": best,
            PLAIN: plain_ridge(table, splits, problem.settings.seed),
            **choices,
        }
        say(f"RouterDC's training rows, {title} ({len(table)} prompts, 7 models)")
        say(f"  chosen powers: {', '.join(f'{p:g}' for p in judged.powers)}")
        say(f"  {'':32}{'mean':>7}" + "".join(f"{t[:13]:>14}" for t in sorted(set(tasks))))
        got = {name: table.score[np.arange(len(table)), c] for name, c in choices.items()}
        for name, values in got.items():
            means = [float(values[task == t].mean()) for t in sorted(set(tasks))]
            say(
                f"  {name:32}{100 * np.mean(means):7.2f}"
                + "".join(f"{100 * mean:14.2f}" for mean in means)
            )
        for other in ("best single of the other rows", PLAIN, BEFORE):
            difference = got[CHOSEN] - got[other]
            mean = np.mean([difference[task == t].mean() for t in set(tasks)])
            low, high = interval(difference, tasks)
            say(
                f"  {CHOSEN}, less {other}: {100 * mean:+.2f} "
                f"({100 * low:+.2f} to {100 * high:+.2f})"
            )
            for t in sorted(set(tasks)):
                low, high = interval(difference[task == t])
                say(
                    f"    {t}: {100 * difference[task == t].mean():+.2f} "
                    f"({100 * low:+.2f} to {100 * high:+.2f})"
                )


def mmlu_pro(data: Path, say: Say, settings: Settings | None = None) -> None:
    """Gains of each variant over the mixture of single experts, pools A and B."""
    files = [data / "mmlu_pro_dev.jsonl.gz"]
    for pool, experts in POOLS.items():
        table, _ = read_outcomes(files, costs_of(data / "active_params_b.json", files), experts)
        problem = Problem(table, settings or Settings())
        fold = problem.fold_of(FOLDS, "outer")
        judged = judge(
            problem,
            [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(FOLDS)],
        )
        say(f"MMLU-Pro, pool {pool}, 5 folds ({len(table)} prompts): gain over the mixture")
        say(f"  chosen powers: {', '.join(f'{p:g}' for p in judged.powers)}")
        say(f"  {'budget':32}" + "".join(f"{b:8g}" for b in BUDGETS[pool]))
        rows = {}
        for name, predicted in judged.predicted.items():
            compared = comparison(table, problem.played, predicted)
            found = sweep(compared.played, compared.predicted)
            alone = singles(compared.table)
            rows[name] = [gains(compared.table, found, alone, b) for b in BUDGETS[pool]]
            say(f"  {name:32}" + "".join(f"{100 * g.mean():+8.2f}" for g in rows[name]))
        say(f"  {CHOSEN}, less {BEFORE}:")
        for budget, ours, before in zip(BUDGETS[pool], rows[CHOSEN], rows[BEFORE], strict=True):
            low, high = interval(ours - before)
            say(
                f"    {budget:g}: {100 * (ours - before).mean():+.2f} "
                f"({100 * low:+.2f} to {100 * high:+.2f})"
            )


PARTS = {"routerdc": routerdc, "mmlu-pro": mmlu_pro}


@click.command()
@click.option(
    "--data",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    required=True,
    help="Folder of the recorded outcomes.",
)
@click.option("--part", type=click.Choice(sorted(PARTS)), multiple=True, help="Default: all.")
def main(data: Path, part: tuple[str, ...]) -> None:
    """Print every figure of the trial."""
    for name in part or tuple(PARTS):
        PARTS[name](data, click.echo)


if __name__ == "__main__":
    main()
