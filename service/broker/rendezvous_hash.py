"""Rendezvous hashing: gateways agree on a pool for each expert without communication. Pure.

Thaler and Ravishankar, Using Name-Based Mappings to Increase Hit Rates, 1998.
"""

from __future__ import annotations

import hashlib


def rendezvous_hash(expert: str, boot: str | None) -> float:
    """A hash of expert and pool, above 0 and at most 1: the pool where it is least is the first.

    A pool that comes or goes changes the first pool of its own share of the experts only.
    """
    digest = hashlib.blake2b(f"{expert}\0{boot}".encode(), digest_size=8).digest()
    return (1 + int.from_bytes(digest[:6])) / 2**48
