"""How far a batch is, by the experts and recipes of its plan. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from service.batches.batch_types import LineChoice

OTHER_MODELS = "other models"
"""Stands for the models beyond those that are counted apart."""
# Lines that nothing can answer keep the model that they name, and there may be as many names as
# lines.
_MOST_MODELS = 64
_LONGEST_NAME = 128


@dataclass(frozen=True, slots=True)
class PlannedShare:
    """A model's share of a plan.

    Attributes:
        lines: The lines that it gets.
        tokens: Expected tokens of their prompts and answers.
    """

    lines: int
    tokens: float


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """What the lines that a plan gave to one model came to so far.

    Attributes:
        completed: Lines with an answer.
        failed: Lines with an error.
        prompt_tokens: Tokens of their prompts.
        completion_tokens: Tokens of their answers.
        cost: Their units of cost.
    """

    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    @property
    def lines(self) -> int:
        """The number of lines with a result."""
        return self.completed + self.failed

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class ModelProgress:
    """How far the lines of one model are.

    Attributes:
        total: Its lines.
        counts: What they came to so far.
        seconds_left: The expected time until its last line, by the batch's speed so far and without
            those of other models, in s; None where it can't be told.
    """

    total: int
    counts: ModelCounts
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """How far a batch is.

    Attributes:
        models: By model.
        seconds_left: The expected time until the last line, in s; None where it can't be told.
    """

    models: Mapping[str, ModelProgress]
    seconds_left: float | None

    def to_json(self) -> dict[str, Any]:
        """Return it as a client sees it."""
        return {
            "seconds_left": _rounded(self.seconds_left),
            "models": {
                name: {
                    "total": model.total,
                    "completed": model.counts.completed,
                    "failed": model.counts.failed,
                    "input_tokens": model.counts.prompt_tokens,
                    "output_tokens": model.counts.completion_tokens,
                    "cost": round(model.counts.cost, 9),
                    "seconds_left": _rounded(model.seconds_left),
                }
                for name, model in self.models.items()
            },
        }


def shares_of(choices: Iterable[LineChoice]) -> dict[str, PlannedShare]:
    """Return each model's share of a plan, the greatest first.

    Args:
        choices: The choices of all lines.
    """
    lines: Counter[str] = Counter()
    tokens: defaultdict[str, float] = defaultdict(float)
    for choice in choices:
        lines[choice.model] += 1
        tokens[choice.model] += choice.tokens
    known = [name for name, _ in lines.most_common() if len(name) <= _LONGEST_NAME]
    shown = known[:_MOST_MODELS]
    shares = {name: PlannedShare(lines[name], tokens[name]) for name in shown}
    if rest := lines.keys() - shares.keys():
        shares[OTHER_MODELS] = PlannedShare(
            sum(lines[name] for name in rest), sum(tokens[name] for name in rest)
        )
    return shares


def counted_as(model: str, shares: Mapping[str, PlannedShare]) -> str:
    """The name under which a line of a model counts.

    Args:
        model: The expert or recipe that the line is sent to.
        shares: By model, its share of the plan.
    """
    known = model in shares or (len(model) <= _LONGEST_NAME and len(shares) < _MOST_MODELS)
    return model if known else OTHER_MODELS


def progress_of(
    shares: Mapping[str, PlannedShare], counts: Mapping[str, ModelCounts], elapsed_s: float | None
) -> BatchProgress:
    """Tell how far a batch is.

    The time to go is what the tokens that are left take at the speed so far. A line that is left
    has as many tokens as those of its model had; before there are any, as many as the plan
    expects, corrected by what it expected of the lines so far and what they had.

    Args:
        shares: By model, its share of the plan.
        counts: By model, what its lines came to.
        elapsed_s: The time since the batch's lines began, in s; None where they don't run.
    """
    none = ModelCounts()
    names = [*shares, *(name for name in counts if name not in shares)]
    done = {name: counts.get(name, none) for name in names}
    totals = {
        name: max(done[name].lines, shares[name].lines if name in shares else 0) for name in names
    }
    tokens = sum(one.tokens for one in done.values())
    lines = sum(one.lines for one in done.values())
    expected = sum(_per_line(shares.get(name)) * done[name].completed for name in names)
    correction = tokens / expected if expected >= 1 and tokens else 1.0
    left_s: dict[str, float | None] = dict.fromkeys(names)
    if elapsed_s is not None and lines:
        for name in names:
            left = totals[name] - done[name].lines
            if tokens:
                each = correction * _per_line(shares.get(name))
                if done[name].completed:
                    each = done[name].tokens / done[name].completed
                left_s[name] = max(0.0, elapsed_s) * left * each / tokens
            else:
                left_s[name] = max(0.0, elapsed_s) * left / lines
    known = [one for one in left_s.values() if one is not None]
    return BatchProgress(
        {name: ModelProgress(totals[name], done[name], left_s[name]) for name in names},
        sum(known) if known else None,
    )


def _per_line(share: PlannedShare | None) -> float:
    """Expected tokens of one of a model's lines."""
    return share.tokens / share.lines if share is not None and share.lines else 0.0


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
