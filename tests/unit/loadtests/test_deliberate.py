"""The simulation of deliberations: between what reviewers know and what members have answered."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from loadtests.deliberate import Bench, Prompt, Reviewer, deliberate, majority, measure, read
from service.broker.round_gains import RoundGains
from service.config.recipes import RecipeConfig

RECIPE = RecipeConfig.model_validate({"kind": "deliberate", "members": list("abc")}).recipe()


def held(prompt: Prompt, reviewer: Reviewer, rounds: int = 2) -> tuple[bool, int]:
    bench = Bench(prompt, reviewer, random.Random(1))
    return deliberate(bench, rounds, RECIPE, lambda: 0.2, RoundGains(), 0.0)


@pytest.mark.parametrize("reviewer", [Reviewer.INDEPENDENT, Reviewer.MISLED])
@pytest.mark.parametrize("right_at", [0, 1, 2])
def test_deliberate_reviewers_that_know_find_the_right_answer(
    reviewer: Reviewer, right_at: int
) -> None:
    answers = tuple("A" if at == right_at else "B" for at in range(3))
    right = tuple(answer == "A" for answer in answers)
    prompt = Prompt("x", answers, right, (1.0, 1.0, 1.0))
    assert held(prompt, reviewer)[0]
    # With the vote alone it loses.
    assert not right[majority(prompt)]


def test_deliberate_misled_reviewers_lose_what_the_vote_had() -> None:
    prompt = Prompt("x", ("A", "A", "B"), (True, True, False), (0.0, 0.0, 0.0))
    assert prompt.right[majority(prompt)]
    assert not held(prompt, Reviewer.MISLED, rounds=1)[0]
    # Who holds to its own answer keeps it.
    assert held(prompt, Reviewer.OWN_ANSWER, rounds=1)[0]


def test_deliberate_members_that_agree_need_no_reviews() -> None:
    prompt = Prompt("x", ("A", "A", "A"), (True, True, True), (0.5, 0.5, 0.5))
    assert held(prompt, Reviewer.INDEPENDENT) == (True, 3)
    none = Prompt("x", (None, None, None), (False, False, False), (0.5, 0.5, 0.5))
    right, calls = held(none, Reviewer.INDEPENDENT)
    assert not right
    assert calls >= 6


def test_measure_reads_answers_and_compares_all_ways(tmp_path: Path) -> None:
    rng = random.Random(2)
    path = tmp_path / "outcomes.jsonl"
    with path.open("w") as out:
        for number in range(120):
            outcomes = {}
            for name, skill in (("m", 0.8), ("n", 0.6), ("o", 0.6)):
                good = rng.random() < skill
                answer = "A" if good else rng.choice("BC")
                outcomes[name] = {"score": float(good), "answer": answer}
            row = {"id": str(number), "prompt": "?", "category": "xy"[number % 2]}
            out.write(json.dumps({**row, "outcomes": outcomes}) + "\n")
    prompts = read(path, ("m", "n", "o"))
    assert len(prompts) == 120
    assert all(0.3 < skill < 1 for prompt in prompts for skill in prompt.skill)
    report = measure(path, {"panel": ("m", "n", "o")})
    [table] = report.tables
    ways = [row[0] for row in table.rows]
    assert ways[:2] == ["best member alone", "vote"]
    shares = {row[0]: float(row[1]) for row in table.rows}
    assert max(shares.values()) == shares["any member right"]
    assert shares["independent, 1 round"] >= shares["misled, 1 round"]
    (tmp_path / "none.jsonl").write_text(
        '{"category": "c", "outcomes": {"m": {"score": 1}, "n": {"score": 1}, "o": {"score": 1}}}\n'
    )
    with pytest.raises(ValueError, match="no prompt has an `answer`"):
        read(tmp_path / "none.jsonl", ("m", "n", "o"))
