"""Each expert's first pool: spread evenly, and kept when another pool comes or goes."""

from __future__ import annotations

from collections import Counter

from service.broker.rendezvous_hash import rendezvous_hash

POOLS = [f"pool-{i}" for i in range(10)]
EXPERTS = [f"expert-{i}" for i in range(1000)]


def first(expert: str, pools: list[str]) -> str:
    return min(pools, key=lambda pool: rendezvous_hash(expert, pool))


def test_rendezvous_hash_spreads_experts_and_is_a_share() -> None:
    counts = Counter(first(expert, POOLS) for expert in EXPERTS)
    assert min(counts.values()) > 60
    assert max(counts.values()) < 140
    assert all(0 < rendezvous_hash(expert, POOLS[0]) <= 1 for expert in EXPERTS)


def test_rendezvous_hash_pool_that_goes_moves_its_own_experts_only() -> None:
    left = POOLS[1:]
    for expert in EXPERTS:
        before = first(expert, POOLS)
        assert before == POOLS[0] or first(expert, left) == before
