"""`python -m loadtests.deliberate`: Simulates deliberations of models on recorded answers.

Members answer as recorded. Their reviews are simulated, because no file has any: a reviewer
recognises the right answer of a prompt with a probability that its record in the category gives,
its accuracy on the other folds; else it guesses among those that it sees. It judges a prompt once,
so that a second review adds nothing that the first one did not know. What it takes for right gets
8, all else 4, give or take 1. Three kinds of reviewers bound what real ones do:

- `independent`: its judgement does not depend on its own answer. Real reviewers make in reviews
  the errors that they make in answers, so that this is an upper bound.
- `own answer`: it takes its own answer for right, where another one has given it too. Otherwise it
  judges as above.
- `misled`: it guesses among the wrong answers, where it does not recognise the right one. A
  reviewer that is right in less than half of the cases then does harm.

In a further round, a member keeps its answer unless it takes the leading one for right. Agreement,
votes, beliefs, gains and the rule that ends a deliberation are the service's own.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.lib.command_line import parser, tell
from loadtests.lib.targets_and_report import Report, Table
from service.broker.answer_agreement import FinalAnswer
from service.broker.deliberation import (
    Review,
    RoundPrice,
    all_agree,
    leader,
    leader_belief,
    stop_reason,
    unanimous,
)
from service.broker.peer_review import ballots
from service.broker.round_gains import HeldRound, RoundGains
from service.config.recipes import RecipeConfig
from service.types import Recipe

_SEED = 20261130
_FOLDS = 5
_BOOTSTRAPS = 400
_LIKED, _DISLIKED = 8.0, 4.0
# What a further round costs in quality, where that is weighed.
_PRICE = 0.03
PANELS = {
    "five alike": (
        "Meta-Llama-3.1-8B-Instruct",
        "mathstral-7B",
        "Mixtral-8x7B-Instruct-v0.1",
        "Yi-34B",
        "Phi-3-mini-4k-instruct",
    ),
    "one strong": ("Meta-Llama-3.1-70B-Instruct", "Meta-Llama-3.1-8B-Instruct", "mathstral-7B"),
    "three strong": (
        "gemini-1.5-pro-002",
        "gemini-1.5-flash-002",
        "Meta-Llama-3.1-70B-Instruct",
    ),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt with the answers of a panel.

    Attributes:
        category: Its category.
        answers: By member the letter of its answer; None without one.
        right: By member whether it is right.
        skill: By member its accuracy in the category on the other folds.
    """

    category: str
    answers: tuple[str | None, ...]
    right: tuple[bool, ...]
    skill: tuple[float, ...]


@dataclass(slots=True)
class Outcomes:
    """What one way of answering came to.

    Attributes:
        right: By prompt whether its answer was right.
        calls: Calls of all prompts.
    """

    right: list[bool] = field(default_factory=list)
    calls: int = 0

    def interval(self, base: Outcomes) -> tuple[float, float, float]:
        """The difference to another way in points, and its interval of 95 % (bootstrap)."""
        more = np.array(self.right, dtype=float) - np.array(base.right, dtype=float)
        draws = np.random.default_rng(_SEED).integers(0, len(more), (_BOOTSTRAPS, len(more)))
        means = 100 * more[draws].mean(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        return 100 * float(more.mean()), float(low), float(high)


def read(path: Path, members: Sequence[str]) -> list[Prompt]:
    """Read the prompts that all members answered.

    Raises:
        ValueError: There are none with answers.
    """
    rows: list[dict[str, Any]] = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            row = json.loads(line)
            if all(name in row["outcomes"] for name in members):
                rows.append(row)
    if not any("answer" in row["outcomes"][name] for row in rows for name in members):
        raise ValueError(f"{path}: no prompt has an `answer` of each of {', '.join(members)}")
    random.Random(_SEED).shuffle(rows)
    category = np.array([str(row["category"]) for row in rows])
    score = np.array([[row["outcomes"][name]["score"] for name in members] for row in rows])
    fold = np.arange(len(rows)) % _FOLDS
    found = []
    for at, row in enumerate(rows):
        seen = (fold != fold[at]) & (category == category[at])
        skill = score[seen if seen.any() else fold != fold[at]].mean(axis=0)
        outcomes = [row["outcomes"][name] for name in members]
        found.append(
            Prompt(
                str(row["category"]),
                tuple(outcome.get("answer") for outcome in outcomes),
                # A score without an answer was drawn.
                tuple(
                    bool(outcome["score"] > 0.5 and outcome.get("answer") is not None)
                    for outcome in outcomes
                ),
                tuple(float(value) for value in skill),
            )
        )
    return found


class Reviewer(StrEnum):
    """How a reviewer judges, see above."""

    INDEPENDENT = "independent"
    OWN_ANSWER = "own answer"
    MISLED = "misled"


Held = Mapping[int, str | None]
"""By member the answer that it has now."""


@dataclass(slots=True)
class Bench:
    """The judgements of a panel on one prompt, each drawn once.

    Attributes:
        prompt: The prompt.
        reviewer: How its members judge.
        rng: Draws.
    """

    prompt: Prompt
    reviewer: Reviewer
    rng: random.Random
    _recognises: dict[int, bool] = field(default_factory=dict)
    _favourite: dict[int, str] = field(default_factory=dict)

    def right_one(self) -> str | None:
        """The right answer, if any member has given it."""
        for answer, right in zip(self.prompt.answers, self.prompt.right, strict=True):
            if right:
                return answer
        return None

    def taken_for_right(self, member: int, shown: Sequence[str]) -> str:
        """The answer among those that are shown which a member takes for right."""
        own, right = self.prompt.answers[member], self.right_one()
        if self.reviewer is Reviewer.OWN_ANSWER and own is not None and own in shown:
            return own
        skill = self.prompt.skill[member]
        knows = self._recognises.setdefault(member, self.rng.random() < skill)
        if knows and right is not None and right in shown:
            return right
        among = {*shown}
        if self.reviewer is Reviewer.MISLED and among != {right}:
            among.discard(str(right))
        if self._favourite.get(member) not in among:
            self._favourite[member] = self.rng.choice(sorted(among))
        return self._favourite[member]

    def reviews(self, held: Held) -> dict[int, dict[int, Review]]:
        """The reviews of a round."""
        found: dict[int, dict[int, Review]] = {}
        members = list(held)
        for ballot in ballots(members, members, self.rng):
            shown = [answer for at in ballot.order if (answer := held[at]) is not None]
            best = self.taken_for_right(ballot.reviewer, shown) if shown else None
            found[ballot.reviewer] = {
                at: Review(
                    (_LIKED if best is not None and held[at] == best else _DISLIKED)
                    + self.rng.uniform(-1, 1)
                )
                for at in ballot.order
            }
        return found

    def revised(self, held: Held, leading: str | None) -> dict[int, str | None]:
        """The answers of a further round."""
        after = dict(held)
        for member, answer in held.items():
            shown = [one for one in {answer, leading} if one is not None]
            if len(shown) == 2:
                after[member] = self.taken_for_right(member, sorted(shown))
            elif shown:
                after[member] = shown[0]
        return after


def majority(prompt: Prompt) -> int:
    """The first member of those that gave the most frequent answer, the most skilled one first."""
    counts = Counter(answer for answer in prompt.answers if answer is not None)
    order = range(len(prompt.answers))
    return max(order, key=lambda at: (counts[str(prompt.answers[at])], prompt.skill[at]))


def deliberate(
    bench: Bench,
    rounds: int,
    recipe: Recipe,
    gain: Callable[[], float],
    gains: RoundGains,
    price: float,
) -> tuple[bool, int]:
    """Hold a deliberation by the service's rules. Returns whether it is right, and its calls."""
    prompt = bench.prompt
    assert recipe.deliberation is not None
    held: dict[int, str | None] = dict(enumerate(prompt.answers))
    right = bench.right_one()
    best: str | None = None
    best_at: int | None = None
    belief, calls = 0.5, 0
    for number in range(1, rounds + 1):
        if number > 1:
            held = bench.revised(held, best)
        calls += len(held)
        finals = {
            at: None if answer is None else FinalAnswer("choice", answer)
            for at, answer in held.items()
        }
        if all_agree(list(finals.values())):
            agreed = held[0]
            if number > 1:
                gains.observe(recipe, HeldRound(belief, 1.0, changed=agreed != best))
            return agreed is not None and agreed == right, calls
        reviews = bench.reviews(held)
        calls += len(held)
        before, doubted = best, belief
        leader_at = leader(reviews, finals, recipe.deliberation.votes, best_at)
        assert leader_at is not None
        belief = leader_belief(reviews, finals, leader_at)
        best, best_at = held[leader_at], leader_at
        same = number > 1 and best == before
        if number > 1:
            gains.observe(recipe, HeldRound(doubted, belief, changed=not same))
        why = stop_reason(
            rounds_held=number,
            most_rounds=rounds,
            settled=same or unanimous(reviews, leader_at),
            belief=belief,
            gain=gain(),
            price=RoundPrice(price, 0.0, 1.0, 0.0),
        )
        if why is not None:
            break
    return best is not None and best == right, calls


def _play(
    prompts: Sequence[Prompt],
    recipe: Recipe,
    rounds: int,
    *,
    reviewer: Reviewer,
    learns: bool,
    price: float,
) -> tuple[Outcomes, float]:
    """Deliberate on all prompts. Returns the outcomes, and the gain of a round by the end."""
    assert recipe.deliberation is not None
    gains, rng = RoundGains(), random.Random(_SEED)
    given = recipe.deliberation.gain
    found = Outcomes()

    def gain() -> float:
        return gains.draw(recipe, rng) if learns else given

    for prompt in prompts:
        bench = Bench(prompt, reviewer, random.Random(rng.random()))
        right, calls = deliberate(bench, rounds, recipe, gain, gains, price)
        found.right.append(right)
        found.calls += calls
    return found, gains.mean(recipe)


def measure(path: Path, panels: Mapping[str, Sequence[str]]) -> Report:
    """Compare members alone, a vote, and deliberations of each panel. Raises ValueError."""
    report = Report("deliberate")
    for name, members in panels.items():
        prompts = read(path, members)
        alone = [
            Outcomes([prompt.right[at] for prompt in prompts], len(prompts))
            for at in range(len(members))
        ]
        best = max(alone, key=lambda found: sum(found.right))
        voted = Outcomes([p.right[majority(p)] for p in prompts], len(prompts) * len(members))
        oracle = Outcomes([any(prompt.right) for prompt in prompts], voted.calls)
        table = Table(
            f"{name}: {len(members)} members, {len(prompts)} prompts",
            ("way", "right, %", "over the best member", "over the vote", "calls"),
        )
        settings = {"kind": "deliberate", "members": [*"abcdefgh"[: len(members)]]}
        recipe = RecipeConfig.model_validate(settings).recipe()
        ways = [("best member alone", best), ("vote", voted)]
        for kind in Reviewer:
            for rounds, learns, price in (
                (1, False, 0.0),
                (2, False, 0.0),
                (2, False, _PRICE),
                (2, True, _PRICE),
            ):
                found, gain = _play(
                    prompts, recipe, rounds, reviewer=kind, learns=learns, price=price
                )
                words = f"{kind}, {rounds} round{'s' if rounds > 1 else ''}"
                if price:
                    words += f", gain {'learned' if learns else 'as configured'}"
                ways.append((words, found))
                report.facts[f"{name}, {words}"] = {
                    "right": sum(found.right) / len(prompts),
                    "calls": found.calls / len(prompts),
                    "gain": gain,
                }
        ways.append(("any member right", oracle))
        for words, found in ways:
            table.rows.append(
                (
                    words,
                    f"{100 * sum(found.right) / len(prompts):.1f}",
                    _difference(found, best),
                    _difference(found, voted),
                    f"{found.calls / len(prompts):.2f}",
                )
            )
        report.tables.append(table)
    report.notes.append(
        "Reviews are simulated by the accuracy of each reviewer in the prompt's category; a round "
        f"is weighed at {_PRICE:g} of quality where a gain is named."
    )
    return report


def _difference(found: Outcomes, base: Outcomes) -> str:
    if found is base:
        return ""
    mean, low, high = found.interval(base)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def main(given: Sequence[str] | None = None) -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("deliberate", __doc__)
    words.add_argument("--outcomes", type=Path, required=True, help="outcomes with answers")
    words.add_argument("--members", type=lambda text: tuple(text.split(",")), help="another panel")
    options = words.parse_args(given)
    panels = PANELS if options.members is None else {"panel": options.members}
    return tell(lambda _: measure(options.outcomes, panels), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
