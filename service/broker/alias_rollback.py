"""Decides when a target of an alias is rolled back: its share of failures is surely greater. Pure.

The excess of a target's share of failures over the baseline's has a lower confidence bound, by
Newcombe's hybrid of Wilson's score intervals ("Interval estimation for the difference between
independent proportions", Statistics in Medicine 17, 1998, method 10). The target is rolled back
where this bound is above the margin.

The rule looks after every failure, so a fixed level would be crossed by chance some day. The error
probability is therefore divided over the doublings of the number of requests: the k-th doubling
after the least number gets 1 / ((k + 1)(k + 2)) of its half, which adds up to 1. The other half is
for the many looks within a doubling. A simulation in the tests holds the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import NormalDist

from service.config.aliases import RollbackConfig

# Tenants of a target that are told apart in a window; later ones count as one.
_MAX_TENANTS = 64
_OTHERS = ""


class AliasOutcome(StrEnum):
    """How a request by an alias ended, as far as its target is to blame."""

    OK = "ok"
    ERROR = "error"
    REFUSED = "refused"
    UNCOUNTED = "uncounted"


@dataclass(slots=True)
class Tally:
    """Requests of a target, and how many of them failed in which way."""

    requests: int = 0
    errors: int = 0
    refusals: int = 0

    def add(self, outcome: AliasOutcome) -> None:
        """Count one request."""
        self.requests += 1
        self.errors += outcome is AliasOutcome.ERROR
        self.refusals += outcome is AliasOutcome.REFUSED

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(
            self.requests + other.requests,
            self.errors + other.errors,
            self.refusals + other.refusals,
        )


@dataclass(frozen=True, slots=True)
class Rollback:
    """Why a target was rolled back.

    Attributes:
        reason: `errors` or `refusals`.
        share: The target's share of failed requests, in [0, 1].
        baseline_share: That of the target of the greatest weight.
        requests: The target's requests that were counted.
        at_s: When, in seconds since 1970.
    """

    reason: str
    share: float
    baseline_share: float
    requests: int
    at_s: float = 0.0

    @property
    def text(self) -> str:
        """For logs and people."""
        return (
            f"{self.share:.1%} {self.reason} in {self.requests} requests, beside "
            f"{self.baseline_share:.1%}"
        )


def wilson(count: int, total: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a share; each side is exceeded with 1 - `confidence`.

    Args:
        count: Successes, at most `total`.
        total: Trials; 0 bounds nothing.
        confidence: In [0.5, 1).
    """
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(confidence)
    share, more = count / total, z * z / total
    centre = (share + more / 2) / (1 + more)
    half = z / (1 + more) * math.sqrt(share * (1 - share) / total + more / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def excess_bound(
    failed: int, total: int, base_failed: int, base_total: int, confidence: float
) -> float:
    """Lower confidence bound of one share of failures less another; `total` is above 0.

    A baseline without requests counts as one without failures.
    """
    share = failed / total
    low, _ = wilson(failed, total, confidence)
    if base_total == 0:
        return low
    base_share = base_failed / base_total
    _, base_high = wilson(base_failed, base_total, confidence)
    return share - base_share - math.hypot(share - low, base_high - base_share)


def find_fault(target: Tally, baseline: Tally, rule: RollbackConfig) -> Rollback | None:
    """Return why a target should be rolled back, beside the baseline; None where it should not."""
    if not rule.enabled or target.requests < rule.min_requests:
        return None
    doubling = int(math.log2(target.requests / rule.min_requests))
    # Two kinds of failure are looked at.
    kinds = sum(margin is not None for margin in (rule.error_margin, rule.refusal_margin))
    if kinds == 0:
        return None
    wrong = (1 - rule.confidence) / 2 / kinds / ((doubling + 1) * (doubling + 2))
    for reason, failed, base_failed, margin in (
        ("errors", target.errors, baseline.errors, rule.error_margin),
        ("refusals", target.refusals, baseline.refusals, rule.refusal_margin),
    ):
        if margin is None:
            continue
        bound = excess_bound(failed, target.requests, base_failed, baseline.requests, 1 - wrong)
        if bound > margin:
            return Rollback(
                reason,
                failed / target.requests,
                base_failed / baseline.requests if baseline.requests else 0.0,
                target.requests,
            )
    return None


@dataclass(slots=True)
class _Period:
    """The tallies of half a window, by target and tenant."""

    number: int
    tallies: dict[str, dict[str, Tally]] = field(default_factory=dict)

    def of(self, target: str, tenant: str) -> Tally:
        tenants = self.tallies.setdefault(target, {})
        known = tenant in tenants or len(tenants) < _MAX_TENANTS
        return tenants.setdefault(tenant if known else _OTHERS, Tally())


class SharedTraffic:
    """The outcomes of one alias that shares requests, and its targets that were rolled back.

    Where several tenants use a target, the others have to see it fail as well as the tenant with
    the most failures: nobody decides for others by the requests that it sends.

    Args:
        weights: The weight of each target.
        rule: When a target is rolled back.
    """

    def __init__(self, weights: Mapping[str, float], rule: RollbackConfig) -> None:
        self.weights = dict(weights)
        self.rule = rule
        self.baseline = max(weights, key=weights.__getitem__)
        self.rolled_back: dict[str, Rollback] = {}
        self._periods: list[_Period] = []

    def record(
        self, target: str, outcome: AliasOutcome, tenant: str, now_s: float
    ) -> Rollback | None:
        """Count a request, and return why its target is rolled back now; None where it is not.

        Args:
            target: The target that the request was sent to.
            outcome: How it ended.
            tenant: The tenant's name.
            now_s: The time, in seconds since 1970.
        """
        if outcome is AliasOutcome.UNCOUNTED or target not in self.weights:
            return None
        number = int(now_s // (self.rule.window_s / 2))
        if not self._periods or self._periods[-1].number < number:
            self._periods.append(_Period(number))
        newest = self._periods[-1].number
        self._periods = [one for one in self._periods if one.number >= newest - 1]
        self._periods[-1].of(target, tenant).add(outcome)
        if outcome is AliasOutcome.OK or target == self.baseline or target in self.rolled_back:
            return None
        found = find_fault(self.tally(target), self.tally(self.baseline), self.rule)
        if found is None or not self._others_agree(target, found):
            return None
        found = Rollback(found.reason, found.share, found.baseline_share, found.requests, now_s)
        self.rolled_back[target] = found
        return found

    def _others_agree(self, target: str, found: Rollback) -> bool:
        """Whether the share of failures is too great without the tenant that met most of them.

        The bound of confidence is not asked of them, because they may have few requests.
        """
        tenants = self._by_tenant(target)
        if len(tenants) == 1:
            return True
        worst = max(tenants, key=lambda name: getattr(tenants[name], found.reason))
        others = [tally for name, tally in tenants.items() if name != worst]
        failed = sum(getattr(tally, found.reason) for tally in others)
        share: float = failed / sum(tally.requests for tally in others)
        errors = found.reason == "errors"
        margin = self.rule.error_margin if errors else self.rule.refusal_margin
        assert margin is not None
        return share - found.baseline_share > margin

    def _by_tenant(self, target: str) -> dict[str, Tally]:
        found: dict[str, Tally] = {}
        for period in self._periods:
            for tenant, tally in period.tallies.get(target, {}).items():
                found[tenant] = found.get(tenant, Tally()).plus(tally)
        return found

    def tally(self, target: str) -> Tally:
        """The outcomes of a target within the window."""
        total = Tally()
        for tally in self._by_tenant(target).values():
            total = total.plus(tally)
        return total

    def restore(self) -> list[str]:
        """Give every target its requests again, and begin to count anew. Return who was out."""
        restored = list(self.rolled_back)
        self.rolled_back = {}
        self._periods = []
        return restored
