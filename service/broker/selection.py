"""Choosing how a request is answered, and where. Pure: what is known comes in as data.

Every recipe r, with a pool for each expert that it may ask, has a utility,

    U = Q − λ_cost · c − λ_time · (T + X)

Q: expected quality of its answer for this prompt, in [0, 1]; c: expected spending, all calls
counted; T: time to the answer in s (loading or swapping, queue, prefill, decode; the slowest of
those asked together, plus those asked later times how likely that is); X: what
swaps for it cost others, in s. λ_cost is the sum of the budgets' shadow prices. The greatest
wins. Taking each request's best option under such prices is the online form of a
multiple-choice knapsack (as in Kellerer, Pferschy, Pisinger: Knapsack Problems, ch. 11).

How much better the best would be if every expert were resident and idle is unmet demand: by
it alone a cold expert gets loaded that each single request shies away from.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from service.broker.pool_state import Floats, PoolMatrix
from service.broker.recipe_catalog import Ints, RecipeCatalog

_NEVER = np.inf
_NO_ONE = np.zeros(0, dtype=np.intp)


class Exclusion(IntEnum):
    """Why a recipe is out of the question."""

    NONE = 0
    NO_POOL = 1
    CONTEXT = 2
    MAX_COST = 3
    DEADLINE = 4
    RESTING = 5


@dataclass(frozen=True, slots=True)
class PrefixCacheHint:
    """Where a conversation's beginning is in the prefix cache: so many prompt tokens of it."""

    expert: str
    boot: str
    tokens: int


@dataclass(frozen=True, slots=True)
class SelectionRequest:
    """What a request wants. Arrays (recipes,) stand for the recipes `rows` of the book.

    quality: expected, in [0, 1]. reach (recipes, MAX_LATER): how likely each later expert is
    asked. tokens (experts,): expected length of each expert's answer. cost (experts,):
    expected spending of one call. time_price: quality per second. cost_price: quality per
    unit of cost. most_cost: hard bound on what all calls of a recipe may cost together.
    deadline_s: time that is left, to the first token where `streams`, else to the end.
    context_tokens: what prompt and answer need together, as far as that is known.
    """

    rows: Ints
    quality: Floats
    reach: Floats
    tokens: Floats
    cost: Floats
    prompt_tokens: int = 0
    time_price: float = 0.01
    cost_price: float = 0.0
    most_cost: float = _NEVER
    deadline_s: float = _NEVER
    context_tokens: int = 0
    streams: bool = False
    warm: PrefixCacheHint | None = None
    banned: Collection[tuple[str, str]] = field(default=())


@dataclass(frozen=True, slots=True)
class Candidate:
    """An expert in a pool (`boot`; empty: in this gateway).

    Times in s. eta_s: until its weights are there, swaps included; wait_s: until its first
    token is begun, that included; answer_s: from then to the end; displaced_s: what it costs
    others.
    """

    expert: str
    boot: str
    eta_s: float
    wait_s: float
    answer_s: float
    displaced_s: float


@dataclass(frozen=True, slots=True)
class Selection:
    """All recipes of a wish, weighed. Arrays (recipes,) in the order of `wish.rows`.

    `barred`: a `Exclusion` for each, 0 where it is possible.
    `pool` (experts,): the best pool for each expert, an index into `standing.boots`.
    """

    book: RecipeCatalog
    wish: SelectionRequest
    standing: PoolMatrix
    pool: Ints
    wait: Floats
    answer: Floats
    time: Floats
    displaced: Floats
    cost: Floats
    utility: Floats
    barred: NDArray[np.int8]
    ideal: Floats

    def best(self) -> int | None:
        """Position of the winner among `wish.rows`; None where nothing is possible."""
        if not len(self.utility):
            return None
        # The first of equals, which is the one that stands first in the config.
        at = int(self.utility.argmax())
        return at if self.utility[at] > -_NEVER else None

    @property
    def worth(self) -> Floats:
        """Quality less the price of time, whatever it costs; -inf where it is impossible."""
        possible = np.isfinite(self.utility)
        taken = self.wish.time_price * (self.time + self.displaced)
        return np.where(possible, self.wish.quality - np.where(possible, taken, 0.0), -_NEVER)

    def order(self) -> Ints:
        """Positions, best first; barred ones last."""
        return np.argsort(-self.utility, kind="stable")

    def option(self, expert: str) -> Candidate | None:
        """The pool to ask for an expert; None where none can be asked."""
        e = self.book.index[expert]
        if not np.isfinite(self.wait[e]):
            return None
        p = int(self.pool[e])
        s = self.standing
        return Candidate(
            expert,
            s.boots[p],
            float(s.eta[p, e]),
            float(self.wait[e]),
            float(self.answer[e]),
            float(s.displaced[p, e]),
        )

    def unmet(self, chosen: int) -> tuple[str, ...]:
        """Experts of the recipe that would have won were all resident and idle, if it is
        another one than `chosen`."""
        at = int(self.ideal.argmax())
        if at == chosen or not self.missed(chosen) > 0:
            return ()
        return self.book.recipes[int(self.wish.rows[at])].members

    def missed(self, chosen: int) -> float:
        """By how much that one would have been better."""
        return float(self.ideal.max() - self.utility[chosen])


def select(book: RecipeCatalog, standing: PoolMatrix, wish: SelectionRequest) -> Selection:
    """Weigh every recipe of a wish. Pools that were not heard of for over a second count only
    where nothing else is left."""
    roomy = _roomy(standing, wish)
    usable = standing.usable
    if (roomy != usable).any():
        fits = (roomy.any(axis=0) | ~book.asks[wish.rows]).all(axis=1)
        # Where no recipe has room for it, the engine says so, with both numbers.
        usable = roomy if fits.any() else usable
    if wish.banned:
        usable = usable.copy()
        for expert, boot in wish.banned:
            if boot in standing.boots:
                usable[standing.boots.index(boot), book.index[expert]] = False
    if not standing.fresh.all():
        fresh = usable & standing.fresh[:, None]
        weighed = _weigh(book, standing, wish, fresh)
        if weighed.best() is not None or not (usable & ~fresh).any():
            return weighed
    return _weigh(book, standing, wish, usable)


def _roomy(standing: PoolMatrix, wish: SelectionRequest) -> NDArray[np.bool_]:
    """Where prompt and answer fit into the context, as far as that is known, (pools, experts)."""
    fits: NDArray[np.bool_] = (standing.context == 0) | (standing.context >= wish.context_tokens)
    return standing.usable & fits


def _weigh(
    book: RecipeCatalog, standing: PoolMatrix, wish: SelectionRequest, usable: NDArray[np.bool_]
) -> Selection:
    s = standing
    experts = len(book.experts)
    if not len(s.boots):
        nowhere = np.full(experts, _NEVER)
        return _total(book, s, wish, _NO_ONE, nowhere, nowhere, nowhere, nowhere, nowhere)
    prefill = s.first + s.per_token * wish.prompt_tokens
    if wish.warm is not None and wish.warm.boot in s.boots and wish.warm.expert in book.index:
        p, e = s.boots.index(wish.warm.boot), book.index[wish.warm.expert]
        held = min(wish.warm.tokens, wish.prompt_tokens)
        prefill[p, e] -= s.per_token[p, e] * held
    answer = prefill + s.chunk * wish.tokens
    batches, rest = np.divmod(s.ahead, s.capacity)
    # Whole batches ahead must end first; those in the same one cost little, but not nothing.
    wait = s.eta + batches * answer + rest / s.capacity * prefill
    # Those ahead were taken for ones like this; a long prompt among them takes what it takes.
    wait += s.per_token * np.maximum(0.0, s.prompts - s.ahead * wish.prompt_tokens)
    together = wait + answer + s.displaced
    together[~usable] = _NEVER
    pool = together.argmin(axis=0)
    columns = book.all_singles
    there = usable[pool, columns]
    idle = np.where(usable, answer, _NEVER).min(axis=0)
    return _total(
        book,
        s,
        wish,
        pool,
        np.where(there, wait[pool, columns], _NEVER),
        np.where(there, answer[pool, columns], _NEVER),
        np.where(there, prefill[pool, columns], _NEVER),
        np.where(there, s.displaced[pool, columns], _NEVER),
        idle,
    )


def _total(
    book: RecipeCatalog,
    standing: PoolMatrix,
    wish: SelectionRequest,
    pool: Ints,
    wait: Floats,
    answer: Floats,
    prefill: Floats,
    displaced: Floats,
    idle: Floats,
) -> Selection:
    """From experts, (experts,), to recipes."""
    rows = wish.rows
    alone = book.single[rows]
    per = (wait + answer, displaced, wish.cost, idle, wait + prefill)
    sums = _alone(book, wish, per) if alone.all() else _together(book, wish, per, alone)
    time, displacing, cost = sums.time, sums.displacing, sums.cost
    worth = wish.quality - wish.cost_price * cost
    utility = worth - wish.time_price * (time + displacing)
    barred = np.zeros(len(rows), dtype=np.int8)
    nowhere = ~np.isfinite(time)
    if nowhere.any():
        barred[nowhere] = Exclusion.NO_POOL
        if wish.context_tokens:
            small = standing.usable.any(axis=0) & ~_roomy(standing, wish).any(axis=0)
            barred[nowhere & (book.asks[rows] & small).any(axis=1)] = Exclusion.CONTEXT
        if wish.banned:
            resting = np.zeros(len(book.experts), dtype=bool)
            there = [name for name, boot in wish.banned if boot in standing.boots]
            resting[[book.index[name] for name in there]] = True
            known = (barred == Exclusion.NO_POOL) & (book.asks[rows] & resting).any(axis=1)
            barred[known] = Exclusion.RESTING
    if math.isfinite(wish.most_cost):
        barred[(sums.worst > wish.most_cost) & (barred == 0)] = Exclusion.MAX_COST
    if math.isfinite(wish.deadline_s):
        late = (sums.ends > wish.deadline_s) & (barred == 0)
        if late.any():
            # Where all are late, single experts may try.
            if (late | (barred != 0)).all():
                late &= ~alone
            barred[late] = Exclusion.DEADLINE
    utility[barred != 0] = -_NEVER
    ideal = np.where(
        np.isfinite(sums.ideal_time) & (barred != Exclusion.MAX_COST),
        worth - wish.time_price * sums.ideal_time,
        -_NEVER,
    )
    return Selection(
        book, wish, standing, pool, wait, answer, time, displacing, cost, utility, barred, ideal
    )


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of each recipe, (recipes,): what its experts' figures come to.

    ideal_time: were all resident and idle. worst: its cost if all are asked; ends: when its
    first token is there, or its end, in the worst case.
    """

    time: Floats
    displacing: Floats
    cost: Floats
    ideal_time: Floats
    worst: Floats
    ends: Floats


# By expert, (experts,): time, displaced, cost, time if idle, time to the first token.
_Per = tuple[Floats, Floats, Floats, Floats, Floats]


def _alone(book: RecipeCatalog, wish: SelectionRequest, per: _Per) -> _Sums:
    """Of single experts only: their own figures. What `_together` gives for them, sooner."""
    experts = book.members[wish.rows, 0]
    time, displaced, cost, idle, first = (figure[experts] for figure in per)
    return _Sums(time, displaced, cost, idle, cost, first if wish.streams else time)


def _together(
    book: RecipeCatalog, wish: SelectionRequest, per: _Per, alone: NDArray[np.bool_]
) -> _Sums:
    """Of any recipes: the slowest of those asked together, the sum of what they cost, and of
    those asked later each times how likely that is. `alone`: which are single experts."""
    members, later = book.members[wish.rows], book.later[wish.rows]
    reach = wish.reach
    # One more column stands for nobody.
    table = np.zeros((5, len(book.experts) + 1))
    table[:, :-1] = per
    asked = table[:, members]
    chained = table[:, later]
    slowest = asked[0].max(axis=1)
    worst = asked[2].sum(axis=1) + chained[2].sum(axis=1)
    # Nothing of an answer by several can stream before they have agreed.
    first = table[4] if wish.streams else table[0]
    ends = np.where(alone, first[members[:, 0]], slowest + chained[0].sum(axis=1))
    # 0 · ∞ is no number, and who is never asked costs nothing.
    np.multiply(chained[:4], reach, out=chained[:4], where=reach > 0)
    chained[:4][:, reach <= 0] = 0.0
    expected = chained[:4].sum(axis=2)
    return _Sums(
        slowest + expected[0],
        asked[1].sum(axis=1) + expected[1],
        asked[2].sum(axis=1) + expected[2],
        asked[3].max(axis=1) + expected[3],
        worst,
        ends,
    )
