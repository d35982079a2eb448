"""What deliberations and recruits cost and take beyond one call of each of their experts. Pure.

A deliberation of members M holds its first answers, and then steps: the first reviews with
probability p₀, and each further round of answers and reviews with p₁, p₂. With the cost a of an
answer, v of a review, and f of an answer in a further round, which also reads the best one,

    c = Σ_M a + p₀ · Σ_M v + (p₁ + p₂) · Σ_M (f + v)

Each step takes as long as its slowest member. A review reads the answers of all other members.

A recruit chooses its members for each prompt: the k experts with the greatest utility of their own,
by the same prices as the choice among recipes. They answer at once, and the aggregator reads their
answers, unless all of them say the same. Here it is a cascade, whose later expert it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.broker.pool_state import Floats
from service.broker.recipe_catalog import Ints, RecipeCatalog
from service.types import MAX_LATER

# Tokens of a template without its texts, as the selection expects them.
TEMPLATE_TOKENS = 150.0
# Tokens of one reviewer's corrections of the leading answer.
_CORRECTION_TOKENS = 25.0
# A recruit of fewer experts is none.
LEAST_RECRUITS = 2


@dataclass(frozen=True, slots=True)
class StepFigures:
    """For each expert (experts,): what it writes and reads in the steps of recipes.

    Attributes:
        answer_tokens: Expected length of its answer.
        review_tokens: Expected length of its review.
        review_cost: Expected cost of a review, without the answers that it reads.
        prompt_price: Cost of one more token of its prompt.
    """

    answer_tokens: Floats
    review_tokens: Floats
    review_cost: Floats
    prompt_price: Floats


@dataclass(frozen=True, slots=True)
class StepBound:
    """What a call of a recipe's later steps may have beyond the request's own, at most.

    Attributes:
        shown_bytes: Bytes that are added to the prompt.
        answer_tokens: The bound of what it writes instead of an answer.
    """

    shown_bytes: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepTimes:
    """For each expert (experts,) in its best pool; infinite without one.

    Attributes:
        wait: Time until prefill starts, in s.
        prefill: Time of the prefill of the request's own prompt, in s.
        per_token: Time for one more token of the prompt, in s.
        chunk: Time for one token of an answer, in s.
    """

    wait: Floats
    prefill: Floats
    per_token: Floats
    chunk: Floats


@dataclass(frozen=True, slots=True)
class Cast:
    """The experts of each recipe of a request, (recipes, …) as in `RecipeCatalog`.

    Attributes:
        members: (recipes, M), indices of experts; their number where there is none.
        later: (recipes, MAX_LATER), the same.
        later_prob: (recipes, MAX_LATER), probability that each later expert is called. Steps of
            deliberations are no such calls.
        missing: (recipes,), whether a recruit found too few experts.
        too_dear: (recipes,), whether it is the cost that leaves too few.
    """

    members: Ints
    later: Ints
    later_prob: Floats
    missing: NDArray[np.bool_]
    too_dear: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Beyond:
    """What recipes cost and take beyond one call of each expert, each (recipes,); times in s."""

    cost: Floats
    most_cost: Floats
    time: Floats
    most_time: Floats
    displaced_calls: Floats


@dataclass(frozen=True, slots=True)
class RecipeUsage:
    """What recipes are expected to use for one prompt, each (recipes,).

    Attributes:
        cost: Units of cost of all calls.
        tokens: Tokens that all calls read and write.
    """

    cost: Floats
    tokens: Floats


def fixed_cast(catalog: RecipeCatalog, rows: Ints, escalation_prob: Floats) -> Cast:
    """The experts of recipes that recruit none."""
    none = np.zeros(len(rows), dtype=bool)
    prob = escalation_prob
    if catalog.deliberates[rows].any():
        # The steps of a deliberation are no later experts.
        prob = np.where(catalog.deliberates[rows][:, None], 0.0, escalation_prob)
    return Cast(catalog.members[rows], catalog.later[rows], prob, none, none)


def cast_of(
    catalog: RecipeCatalog,
    rows: Ints,
    escalation_prob: Floats,
    *,
    eligible: NDArray[np.bool_],
    skill: Floats,
    price: Floats,
    cost: Floats,
    max_cost: float,
) -> Cast:
    """The experts of each recipe, with those that are recruited for this prompt.

    Args:
        catalog: The recipes.
        rows: (recipes,), rows of the catalog.
        escalation_prob: (recipes, MAX_LATER), of the request.
        eligible: (experts,), whether an expert can be recruited now.
        skill: (experts,), expected quality of each expert's own answer.
        price: (experts,), what its answer costs in quality: λ_cost · c + λ_time · (W + X).
        cost: (experts,), expected cost of one call, and no less than it costs at least.
        max_cost: The most that the calls of one recipe may cost.
    """
    cast = fixed_cast(catalog, rows, escalation_prob)
    positions = np.flatnonzero(catalog.recruits[rows])
    if not len(positions):
        return cast
    members, later, prob = cast.members.copy(), cast.later.copy(), cast.later_prob.copy()
    missing, too_dear = cast.missing.copy(), cast.too_dear.copy()
    order = np.argsort(price - skill, kind="stable")
    for at in positions.tolist():
        recruitment = catalog.recipes[int(rows[at])].recruitment
        assert recruitment is not None
        able = [int(e) for e in order if eligible[e] and catalog.among[rows[at], e]]
        if recruitment.aggregator is not None:
            aggregator = catalog.index[recruitment.aggregator]
        elif able:
            aggregator = max(able, key=lambda e: float(skill[e]))
        else:
            missing[at] = True
            continue
        chosen = _affordable(able, recruitment.k, cost, max_cost - float(cost[aggregator]))
        missing[at] = len(chosen) < LEAST_RECRUITS
        too_dear[at] = missing[at] and len(able) >= LEAST_RECRUITS
        members[at, : len(chosen)] = chosen
        later[at, 0] = aggregator
    return Cast(members, later, prob, missing, too_dear)


def _affordable(able: list[int], k: int, cost: Floats, left: float) -> list[int]:
    """The first k experts that fit into a cost together.

    Where the first ones leave no room for as many as are needed, the cheapest ones come first.
    """
    for candidates in (able, sorted(able, key=lambda e: float(cost[e]))):
        chosen: list[int] = []
        spent = 0.0
        for e in candidates:
            if len(chosen) < k and spent + cost[e] <= left:
                chosen.append(e)
                spent += float(cost[e])
        if len(chosen) >= min(LEAST_RECRUITS, len(able)):
            break
    return sorted(chosen, key=able.index)


def _reviews(figures: StepFigures, members: Ints) -> tuple[Floats, Floats]:
    """Tokens that each member's review reads of other answers, and its cost, both (members,)."""
    answers = figures.answer_tokens[members]
    read = answers.sum() - answers
    return read, figures.review_cost[members] + figures.prompt_price[members] * read


def _revision_tokens(figures: StepFigures, members: Ints) -> float:
    """Tokens that an answer of a further round reads: the best one, and its corrections."""
    answers = figures.answer_tokens[members]
    return float(answers.mean()) + TEMPLATE_TOKENS + _CORRECTION_TOKENS * (len(members) - 1)


def further_round_cost(figures: StepFigures, members: Ints, cost: Floats) -> float:
    """Expected cost of one further round of a deliberation, by these members."""
    reviews = float(_reviews(figures, members)[1].sum())
    revised = cost[members] + figures.prompt_price[members] * _revision_tokens(figures, members)
    return reviews + float(revised.sum())


def review_time(figures: StepFigures, times: StepTimes, members: Ints) -> float:
    """Expected time of the slowest member's review, in s."""
    read, _ = _reviews(figures, members)
    more = times.per_token[members] * (read + TEMPLATE_TOKENS)
    decode = times.chunk[members] * figures.review_tokens[members]
    return float((times.wait[members] + times.prefill[members] + more + decode).max())


def further_answer_time(figures: StepFigures, times: StepTimes, members: Ints) -> float:
    """Expected time of the slowest member's answer in a further round, in s."""
    more = times.per_token[members] * _revision_tokens(figures, members)
    decode = times.chunk[members] * figures.answer_tokens[members]
    return float((times.wait[members] + times.prefill[members] + more + decode).max())


def deliberations(catalog: RecipeCatalog, rows: Ints) -> Iterator[tuple[int, int, Ints]]:
    """Yield the position, the most rounds and the members of each deliberation among the rows."""
    for at in np.flatnonzero(catalog.deliberates[rows]).tolist():
        recipe = catalog.recipes[int(rows[at])]
        assert recipe.deliberation is not None
        yield at, recipe.deliberation.rounds, catalog.members[rows[at], : len(recipe.members)]


def beyond_first_calls(
    catalog: RecipeCatalog,
    rows: Ints,
    escalation_prob: Floats,
    cost: Floats,
    figures: StepFigures,
    cast: Cast,
    times: StepTimes,
) -> Beyond:
    """What each recipe costs and takes beyond one call of each of its experts.

    Args:
        catalog: The recipes.
        rows: (recipes,), rows of the catalog.
        escalation_prob: (recipes, MAX_LATER); of a deliberation the probability of each step.
        cost: (experts,), expected cost of one answer.
        figures: What experts write and read.
        cast: The experts of each recipe.
        times: The times of each expert.
    """
    found = Beyond(*(np.zeros(len(rows)) for _ in range(5)))
    for at, rounds, members in deliberations(catalog, rows):
        reviews_p, further_p = float(escalation_prob[at, 0]), escalation_prob[at, 1:rounds].sum()
        reviews = float(_reviews(figures, members)[1].sum())
        further = further_round_cost(figures, members, cost)
        found.cost[at] = reviews_p * reviews + further_p * further
        found.most_cost[at] = reviews + (rounds - 1) * further
        review_s = review_time(figures, times, members)
        further_s = further_answer_time(figures, times, members) + review_s
        # 0 · ∞ would be NaN.
        found.time[at] = (reviews_p * review_s if reviews_p > 0 else 0.0) + (
            further_p * further_s if further_p > 0 else 0.0
        )
        # Further rounds are not held where they would miss the deadline.
        found.most_time[at] = review_s
        found.displaced_calls[at] = reviews_p + 2 * further_p
    for at in np.flatnonzero(catalog.recruits[rows] & ~cast.missing).tolist():
        members = cast.members[at][cast.members[at] < len(catalog.experts)]
        aggregator = cast.later[at, 0]
        read = float(figures.answer_tokens[members].sum()) + TEMPLATE_TOKENS
        probability = float(cast.later_prob[at, 0])
        found.most_cost[at] = float(figures.prompt_price[aggregator]) * read
        found.most_time[at] = float(times.per_token[aggregator]) * read
        found.cost[at] = probability * found.most_cost[at]
        found.time[at] = probability * found.most_time[at] if probability > 0 else 0.0
    return found


def most_cost(
    catalog: RecipeCatalog,
    rows: Ints,
    cost: Floats,
    figures: StepFigures | None = None,
    recruitable: NDArray[np.bool_] | None = None,
) -> Floats:
    """(recipes,), the cost if every step is taken; of a recruit that of its cheapest members.

    Args:
        catalog: The recipes.
        rows: (recipes,), rows of the catalog.
        cost: (experts,), the cost of one call.
        figures: What experts write and read; None counts each review as an answer.
        recruitable: (experts,), those that may be recruited; None for all.
    """
    found: Floats = catalog.most_calls[rows] @ cost
    if not catalog.has_steps:
        return found
    for at, rounds, members in deliberations(catalog, rows) if figures is not None else ():
        assert figures is not None
        reviews = float(_reviews(figures, members)[1].sum())
        further = further_round_cost(figures, members, cost)
        found[at] = float(cost[members].sum()) + reviews + (rounds - 1) * further
    for at in np.flatnonzero(catalog.recruits[rows]).tolist():
        among = catalog.among[rows[at]]
        if recruitable is not None:
            among = among & recruitable
        cheapest = np.sort(cost[among])
        found[at] += cheapest[:LEAST_RECRUITS].sum()
        if not catalog.uses[rows[at]].any() and len(cheapest):
            found[at] += cheapest[0]
    return found


def expected_usage(
    catalog: RecipeCatalog,
    rows: Ints,
    escalation_prob: Floats,
    cost: Floats,
    prompt_tokens: Floats,
    answer_tokens: Floats,
    figures: StepFigures | None,
    skill: Floats | None = None,
    recruitable: NDArray[np.bool_] | None = None,
) -> RecipeUsage:
    """What each recipe costs and reads and writes for one prompt, by the experts' skill alone.

    Args:
        catalog: The recipes.
        rows: (recipes,), rows of the catalog.
        escalation_prob: (recipes, MAX_LATER), probability of each later step.
        cost: (experts,), expected cost of one answer.
        prompt_tokens: (experts,), length of the prompt.
        answer_tokens: (experts,), expected length of one answer.
        figures: What experts write and read in steps; None where no recipe has any.
        skill: (experts,), expected quality of each expert alone, for recruits.
        recruitable: (experts,), those that may be recruited; None for all.
    """
    experts = len(catalog.experts)
    none = np.zeros(experts)
    cast = cast_of(
        catalog,
        rows,
        escalation_prob,
        eligible=np.ones(experts, dtype=bool) if recruitable is None else recruitable,
        skill=none if skill is None else skill,
        price=none,
        cost=none,
        max_cost=np.inf,
    )
    # The last column stands for absent members.
    calls = np.zeros((len(rows), experts + 1))
    each = np.arange(len(rows))[:, None]
    np.add.at(calls, (each, cast.members), 1.0)
    np.add.at(calls, (each, cast.later), cast.later_prob)
    calls = calls[:, :-1]
    spent, tokens = calls @ cost, calls @ (prompt_tokens + answer_tokens)
    if figures is None:
        return RecipeUsage(spent, tokens)
    no_time = StepTimes(none, none, none, none)
    spent += beyond_first_calls(catalog, rows, escalation_prob, cost, figures, cast, no_time).cost
    for at, rounds, members in deliberations(catalog, rows):
        prompts = float(prompt_tokens[members].sum())
        read, _ = _reviews(figures, members)
        written = float(figures.review_tokens[members].sum())
        reviews = prompts + len(members) * TEMPLATE_TOKENS + float(read.sum()) + written
        again = prompts + len(members) * _revision_tokens(figures, members)
        further = reviews + again + float(answer_tokens[members].sum())
        steps = escalation_prob[at]
        tokens[at] += steps[0] * reviews + steps[1:rounds].sum() * further
    for at in np.flatnonzero(catalog.recruits[rows] & ~cast.missing).tolist():
        members = cast.members[at][cast.members[at] < experts]
        read_too = float(figures.answer_tokens[members].sum()) + TEMPLATE_TOKENS
        tokens[at] += float(cast.later_prob[at, 0]) * read_too
    return RecipeUsage(spent, tokens)


def further_steps(escalation_prob: Floats) -> Floats:
    """(recipes,), expected calls of each member of a deliberation, by its steps' probabilities."""
    found: Floats = 1.0 + escalation_prob[:, 0] + 2.0 * escalation_prob[:, 1:MAX_LATER].sum(axis=1)
    return found
