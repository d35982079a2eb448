"""Votes of experts on each other's answers, and when they stop. Pure.

N members answer. Each one reviews the answers of the others, and scores them. Its scores become
votes of quadratic voting (Lalley, Weyl: Quadratic Voting, 2018): v votes cost v², and a member has
a budget B for all its votes of a round. Two rules bound what a hostile member can do:

- A member casts no vote on its own answer.
- A member's votes on the answers that it sees add up to 0. So it can't win by disliking all others.

The answer with the greatest mean vote leads. Another round, in which all members see the leader's
answer and its corrections, is held unless the leader is stable, or the round is expected to gain
less quality than it costs by the prices of the selection (`service/broker/selection.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from service.broker.answer_agreement import FinalAnswer, agreed

MAX_SCORE = 10.0
"""The greatest score that a reviewer may give; the least is 0."""
# A score of this is neither good nor bad.
_NEUTRAL = MAX_SCORE / 2


@dataclass(frozen=True, slots=True)
class Review:
    """What one member said about another one's answer.

    Attributes:
        score: In [0, `MAX_SCORE`].
        correction: What is to be corrected; empty for nothing.
    """

    score: float
    correction: str = ""


# Reviewer → answer → review; both are positions of members.
Reviews = Mapping[int, Mapping[int, Review]]


class StopReason(StrEnum):
    """Why a deliberation ended."""

    AGREED = "agreed"
    STABLE = "stable"
    NOT_WORTH_IT = "not_worth_it"
    ROUNDS = "rounds"
    DEADLINE = "deadline"
    MAX_COST = "max_cost"
    NO_REVIEWS = "no_reviews"
    NO_ANSWER = "no_answer"


def votes_of(scores: Mapping[int, float], budget: float) -> dict[int, float]:
    """Turn one reviewer's scores into votes.

    The reviewer wants `√budget · (score - mean) / 5` votes on each answer. If these cost more than
    the budget, all of them are scaled down by the same factor.

    Args:
        scores: Answer → score in [0, `MAX_SCORE`]; the reviewer's own answer must not be there.
        budget: What the reviewer may spend: the sum of the squares of its votes.

    Returns:
        Answer → vote. The votes add up to 0, and their squares to at most `budget`.
    """
    if not scores:
        return {}
    mean = math.fsum(scores.values()) / len(scores)
    wanted = {at: (score - mean) / _NEUTRAL for at, score in scores.items()}
    # At least 1: a reviewer that hardly sees a difference spends little.
    length = max(1.0, math.sqrt(math.fsum(v * v for v in wanted.values())))
    return {at: math.sqrt(budget) * v / length for at, v in wanted.items()}


def tally(reviews: Reviews, answers: Sequence[int], budget: float) -> dict[int, float]:
    """The mean vote on each answer, over the reviewers that saw it.

    Args:
        reviews: The reviews of a round. Reviews of a member's own answer, and of answers that are
            not in `answers`, do not count.
        answers: Positions of the members that answered.
        budget: The budget of each reviewer.
    """
    cast: dict[int, list[float]] = {at: [] for at in answers}
    for reviewer, seen in reviews.items():
        scores = {at: review.score for at, review in seen.items() if at != reviewer and at in cast}
        for at, vote in votes_of(scores, budget).items():
            cast[at].append(vote)
    return {at: math.fsum(votes) / len(votes) if votes else 0.0 for at, votes in cast.items()}


def leader(
    reviews: Reviews,
    finals: Mapping[int, FinalAnswer | None],
    budget: float,
    before: int | None = None,
) -> int | None:
    """The member whose answer leads.

    The answer with the greatest mean vote leads. Among equal votes, the one that most members gave
    leads, then the leader `before`, then the first member.

    Args:
        reviews: The reviews of the round.
        finals: By member the final answer of its text; None where it has none to compare.
        budget: The budget of each reviewer.
        before: The leader of the round before.

    Returns:
        The member's position; None without an answer.
    """
    if not finals:
        return None
    votes = tally(reviews, list(finals), budget)
    given = [final for final in finals.values() if final is not None]

    def rank(at: int) -> tuple[float, int, bool, int]:
        final = finals[at]
        # Sums of votes differ in the last bits by the order of the reviewers.
        return round(votes[at], 9), given.count(final) if final else 0, at == before, -at

    return max(finals, key=rank)


def leader_belief(
    reviews: Reviews, finals: Mapping[int, FinalAnswer | None], leader_at: int
) -> float:
    """How likely the reviewers find the leading answer right, in [0, 1].

    A reviewer that scores the leading answer s, and the best of the other answers that it sees r,
    believes in it with s / (s + r). One that sees no other answer believes in it with s / 10.
    Scores alone say little, because many reviewers give an 8 to everything. The median over the
    reviewers bounds what one of them can do. Without a review it is 0.5.

    Args:
        reviews: The reviews of the round.
        finals: By member the final answer of its text. An answer with the same final one as the
            leading answer is no other answer.
        leader_at: The leading member.
    """
    own = finals.get(leader_at)
    beliefs = sorted(
        _belief(
            seen[leader_at].score,
            [
                review.score
                for at, review in seen.items()
                if at not in (leader_at, reviewer) and (own is None or finals.get(at) != own)
            ],
        )
        for reviewer, seen in reviews.items()
        if leader_at in seen and reviewer != leader_at
    )
    if not beliefs:
        return 0.5
    middle = len(beliefs) // 2
    return beliefs[middle] if len(beliefs) % 2 else (beliefs[middle - 1] + beliefs[middle]) / 2


def _belief(score: float, others: Sequence[float]) -> float:
    if not others:
        return score / MAX_SCORE
    both = score + max(others)
    return score / both if both > 0 else 0.5


def unanimous(reviews: Reviews, leader_at: int) -> bool:
    """Whether at least two reviewers saw the leading answer, and each one prefers it."""
    ballots = [
        {at: review.score for at, review in seen.items() if at != reviewer}
        for reviewer, seen in reviews.items()
    ]
    saw = [ballot for ballot in ballots if leader_at in ballot and len(ballot) > 1]
    return len(saw) > 1 and all(
        ballot[leader_at] > max(score for at, score in ballot.items() if at != leader_at)
        for ballot in saw
    )


def round_gain(quality: float, gain: float) -> float:
    """The quality that another round is expected to gain.

    Args:
        quality: How likely the leading answer is right, in [0, 1].
        gain: The share of wrong answers that a round puts right, in [0, 1].
    """
    return gain * (1.0 - min(1.0, max(0.0, quality)))


@dataclass(frozen=True, slots=True)
class RoundPrice:
    """What another round costs, in the terms of the selection.

    Attributes:
        cost: Expected cost of its calls.
        waiting_s: Expected waiting for it, in s.
        cost_price: Quality per unit of cost.
        time_price: Quality per second of waiting.
    """

    cost: float
    waiting_s: float
    cost_price: float
    time_price: float

    @property
    def quality(self) -> float:
        """The quality that the round costs: λ_cost · c + λ_time · W."""
        return self.cost_price * self.cost + self.time_price * self.waiting_s


def stop_reason(
    *,
    rounds_held: int,
    most_rounds: int,
    settled: bool,
    belief: float,
    gain: float,
    price: RoundPrice,
) -> StopReason | None:
    """Decide after a round whether the deliberation ends.

    Args:
        rounds_held: How many rounds were held.
        most_rounds: The most rounds.
        settled: Whether the answer that led before leads again, or all reviewers prefer the one
            that leads.
        belief: How likely the leading answer is right, in [0, 1].
        gain: The share of wrong answers that a round puts right.
        price: What another round costs.

    Returns:
        Why it ends; None for another round.
    """
    if settled:
        return StopReason.STABLE
    if rounds_held >= most_rounds:
        return StopReason.ROUNDS
    if round_gain(belief, gain) <= price.quality:
        return StopReason.NOT_WORTH_IT
    return None


def all_agree(finals: Sequence[FinalAnswer | None]) -> bool:
    """Whether several members answered, and all give the same final answer."""
    return len(finals) > 1 and agreed(finals)
