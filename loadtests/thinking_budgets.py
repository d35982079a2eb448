"""`python -m loadtests.thinking_budgets`: Simulates learned budgets on recorded lengths.

`--outcomes` is a file of recorded outcomes with `output_chars` or `reasoning_tokens`. Each answer
is one thinking of its recorded length, at four characters a token, and the prompts come one after
another in a drawn order. A thinking that its budget cuts loses its score whole, which no model that
is made to answer at the cut does: the quality is a lower bound. Without a file, lengths are drawn.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.lib.command_line import parser, tell
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from service.broker.thinking_lengths import ThinkingLengths, ThinkingWorth
from service.config.router_presets import PresetsConfig
from service.http.token_usage import estimate_tokens

_SEED = 20261130
# The least share of thinking that is left whole, and the prices of a token: those of the presets
# auto:best, auto and auto:fast by their waiting alone, at 20 ms a token.
_LEAST_SHARE = 0.8
_TOKEN_S = 0.02
# Plain quantiles, for comparison: a price without end leaves no more whole than must be.
_QUANTILES = (0.9, 0.95)
_MOST_LOST = 0.015
# Prices of a token that are tried for the most savings at equal quality.
_PRICES = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
_BOOTSTRAPS = 400
# Models whose answers are rarely longer than others' have nothing to save.
_LONG_TAIL = 4.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One recorded answer."""

    category: str
    tokens: int
    score: float


@dataclass(slots=True)
class Spent:
    """What a stream of prompts took and scored.

    Attributes:
        tokens: Tokens of thinking.
        score: Sum of the scores.
        cut: Answers whose thinking was cut.
        answers: All answers.
        scores: The score of each answer, in order.
    """

    tokens: int = 0
    score: float = 0.0
    cut: int = 0
    answers: int = 0
    scores: list[float] = field(default_factory=list)

    @property
    def quality(self) -> float:
        """The mean score."""
        return self.score / self.answers


def simulate(
    answers: Sequence[Answer], share: float, price: float, *, by_category: bool = True
) -> Spent:
    """Let one expert answer prompts one after another, and learn from each.

    Args:
        answers: What it would answer without a budget, in order.
        share: The least share of its thinking that is left whole.
        price: The price of a token, in quality; 0 for no budget.
        by_category: Whether each category has a budget of its own.
    """
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for answer in answers:
        scores[answer.category if by_category else ""].append(answer.score)
    quality = {category: sum(found) / len(found) for category, found in scores.items()}
    lengths, spent = ThinkingLengths(), Spent()
    for answer in answers:
        category = answer.category if by_category else ""
        worth = ThinkingWorth(quality[category], price)
        budget = lengths.budget("e", category, share, worth) if price else None
        tokens = answer.tokens if budget is None else min(budget, answer.tokens)
        cut = tokens < answer.tokens
        lengths.observe("e", category, tokens, cut=cut)
        spent.tokens += tokens
        spent.score += 0.0 if cut else answer.score
        spent.scores.append(0.0 if cut else answer.score)
        spent.cut += cut
        spent.answers += 1
    return spent


def lost_interval(free: Spent, spent: Spent) -> tuple[float, float]:
    """The lost quality's interval of 95 %: answers are drawn again, in pairs (bootstrap)."""
    lost = np.array(free.scores) - np.array(spent.scores)
    draws = np.random.default_rng(_SEED).integers(0, len(lost), (_BOOTSTRAPS, len(lost)))
    low, high = np.percentile(lost[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def equal_quality(answers: Sequence[Answer], free: Spent) -> tuple[float, float, Spent]:
    """The price of a token whose budgets save most, of those that lose nothing that is seen.

    Returns:
        The price, the share of tokens that is saved, and the run.
    """
    best = (0.0, 0.0, free)
    for price in _PRICES:
        spent = simulate(answers, _LEAST_SHARE, price)
        saved = 1 - spent.tokens / free.tokens
        if lost_interval(free, spent)[0] <= 0 and saved > best[1]:
            best = (price, saved, spent)
    return best


def recorded(path: Path) -> dict[str, list[Answer]]:
    """Read outcomes: by model, those with a length.

    Raises:
        ValueError: No outcome has one.
    """
    found: defaultdict[str, list[Answer]] = defaultdict(list)
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            row: dict[str, Any] = json.loads(line)
            for model, outcome in row["outcomes"].items():
                if (tokens := _tokens(outcome)) is not None:
                    found[model].append(Answer(row["category"], tokens, outcome["score"]))
    if not found:
        raise ValueError(f"{path}: no outcome has output_chars or reasoning_tokens")
    return dict(found)


def _tokens(outcome: Mapping[str, Any]) -> int | None:
    if outcome.get("reasoning_tokens") is not None:
        return int(outcome["reasoning_tokens"])
    chars = outcome.get("output_chars")
    return None if chars is None else estimate_tokens(chars)


def drawn(count: int) -> dict[str, list[Answer]]:
    """Draw answers: categories of different lengths, some that go on for long, and are wrong."""
    draw = random.Random(_SEED)
    answers = []
    for _ in range(count):
        category = draw.randrange(8)
        lost = draw.random() < 0.04
        tokens = math.ceil(draw.lognormvariate(4 + 0.4 * category, 0.5)) * (20 if lost else 1)
        answers.append(Answer(str(category), tokens, float(not lost and draw.random() < 0.7)))
    return {"drawn": answers}


def long_thinkers(models: Mapping[str, list[Answer]]) -> dict[str, list[Answer]]:
    """The models whose longest answers are many times as long as their usual ones."""
    found = {}
    for model, answers in models.items():
        sizes = sorted(answer.tokens for answer in answers)
        if sizes[int(0.95 * len(sizes))] >= _LONG_TAIL * max(1, sizes[len(sizes) // 2]):
            found[model] = answers
    return found or dict(models)


def measure(outcomes: Path | None, count: int) -> Report:
    """Compare budgets by worth and by quantiles with none, for every model with long answers."""
    report = Report("thinking_budgets")
    models = long_thinkers(drawn(count) if outcomes is None else recorded(outcomes))
    presets = PresetsConfig()
    prices = {
        f"worth, {name or 'auto'}": _TOKEN_S * presets.of(suffix).time_price
        for name, suffix in (("auto:best", "best"), ("", ""), ("auto:fast", "fast"))
    }
    ways = [(name, _LEAST_SHARE, price) for name, price in prices.items()]
    ways += [(f"quantile {share:g}", share, math.inf) for share in _QUANTILES]
    table = Table(
        "Tokens and quality with learned budgets; a cut answer counts as wrong",
        ("model", "budgets", "of", "tokens", "saved, %", "quality, %", "lost, points", "cut, %"),
    )
    best: dict[str, list[tuple[float, float]]] = {}
    equal = Table(
        "The most tokens saved at equal quality: the interval of what is lost reaches 0",
        (
            "model",
            "price of a token",
            "saved, %",
            "lost, points",
            "answers cut",
            "right among them",
        ),
    )
    for model, answers in sorted(models.items()):
        random.Random(_SEED).shuffle(answers)
        free = simulate(answers, _LEAST_SHARE, 0.0)
        usual = f"{free.tokens / free.answers:.0f}"
        table.rows.append((model, "none", "", usual, "", _percent(free.quality), "", ""))
        price, less, spent = equal_quality(answers, free)
        low, high = lost_interval(free, spent)
        wrong = int(sum(free.scores) - sum(spent.scores))
        equal.rows.append(
            (
                model,
                f"{price:g}",
                _percent(less),
                f"{_percent(free.quality - spent.quality)} ({_percent(low)} to {_percent(high)})",
                str(spent.cut),
                str(wrong),
            )
        )
        report.facts[f"equal quality, {model}"] = {"saved": less, "high": high}
        for name, share, price in ways:
            for by_category in (True, False):
                spent = simulate(answers, share, min(price, 1.0), by_category=by_category)
                less = 1 - spent.tokens / free.tokens
                worse = free.quality - spent.quality
                table.rows.append(
                    (
                        model,
                        name,
                        "category" if by_category else "expert",
                        f"{spent.tokens / spent.answers:.0f}",
                        _percent(less),
                        _percent(spent.quality),
                        _percent(worse),
                        _percent(spent.cut / spent.answers),
                    )
                )
                if by_category and price < 1:
                    best.setdefault(name, []).append((less, worse))
    report.tables += [table, equal]
    for name, found in best.items():
        lost = max(worse for _, worse in found)
        mean = sum(less for less, _ in found) / len(found)
        report.facts[name] = {"saved": mean, "most_lost": lost}
        report.notes.append(
            f"{name}: {_percent(mean)} % of the tokens saved on average of the models, and at most "
            f"{_percent(lost)} points lost"
        )
    lost = max(worse for _, worse in best["worth, auto:best"])
    report.reach.append(
        TargetCheck(
            "points of quality lost at the prices of auto:best, at most",
            100 * _MOST_LOST,
            round(100 * lost, 2),
            lost <= _MOST_LOST,
        )
    )
    return report


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def main(given: Sequence[str] | None = None) -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("thinking_budgets", __doc__)
    words.add_argument("--outcomes", type=Path, help="recorded outcomes, .jsonl or .jsonl.gz")
    words.add_argument("--answers", type=int, default=6000, help="answers to draw without a file")
    options = words.parse_args(given)
    return tell(lambda _: measure(options.outcomes, options.answers), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
