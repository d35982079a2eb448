"""Counts of the choices of one expert's gates, with their wire and JSON formats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.moe.load_statistics import SEGMENT, Cacheability, entropy_bits, evenness, imbalance


@dataclass(frozen=True, slots=True)
class LayerBalance:
    """One layer's statistics, as in `load_statistics`. None means that there are too few tokens."""

    imbalance: float | None
    entropy_bits: float | None
    entropy: float | None
    srp: float | None
    sch: float | None


@dataclass(frozen=True, slots=True, eq=False)
class RoutingCounts:
    """The counts of one expert's gates.

    Attributes:
        layers: The indices of decoder layers with a gate.
        experts: The number of routed experts of each layer.
        top_k: The number of routed experts per token.
        every: On average one of this many steps was sampled.
        cache: The number of a layer's routed experts that the cache of `sch` holds.
        since_s: The start of the counts, in seconds since 1970.
        tokens: The number of sampled tokens.
        load: The number of tokens by routed expert, (layers, experts).
        cacheability: The sums for SRP and SCH.
    """

    layers: tuple[int, ...]
    experts: int
    top_k: int
    every: int
    cache: int
    since_s: float
    tokens: int
    load: NDArray[np.int64]
    cacheability: Cacheability

    def balance(self, place: int) -> LayerBalance:
        """Return the statistics of one layer, by its index in `layers`."""
        load, kept = self.load[place], self.cacheability
        return LayerBalance(
            imbalance(load),
            entropy_bits(load),
            evenness(load),
            kept.srp(place),
            kept.sch(place),
        )

    def like(self, other: RoutingCounts) -> bool:
        """Return whether both have the same layers, experts and top_k."""
        return (self.layers, self.experts, self.top_k) == (
            other.layers,
            other.experts,
            other.top_k,
        )

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        return replace(
            self,
            every=max(self.every, other.every),
            cache=max(self.cache, other.cache),
            since_s=min(self.since_s, other.since_s),
            tokens=self.tokens + other.tokens,
            load=self.load + other.load,
            cacheability=self.cacheability + other.cacheability,
        )

    def to_wire(self) -> dict[str, Any]:
        """Return the counts for the wire between pool and gateway, in a form that can be added."""
        return {
            "layers": list(self.layers),
            "experts": self.experts,
            "top_k": self.top_k,
            "every": self.every,
            "cache": self.cache,
            "since_s": self.since_s,
            "tokens": self.tokens,
            "load": self.load.tolist(),
            "segments": self.cacheability.segments.tolist(),
            "hits": self.cacheability.hits.tolist(),
            "uses": self.cacheability.uses.tolist(),
        }

    @staticmethod
    def from_wire(payload: dict[str, Any]) -> RoutingCounts:
        """Parse the output of `to_wire`."""
        cacheability = Cacheability(
            *(np.array(payload[name], np.int64) for name in ("segments", "hits", "uses"))
        )
        return RoutingCounts(
            tuple(payload["layers"]),
            payload["experts"],
            payload["top_k"],
            payload["every"],
            payload["cache"],
            payload["since_s"],
            payload["tokens"],
            np.array(payload["load"], np.int64),
            cacheability,
        )

    def to_json(self) -> dict[str, Any]:
        """Return shape, counts and each layer's statistics, for the API."""
        rows = []
        for place, layer in enumerate(self.layers):
            balance = self.balance(place)
            rows.append(
                {
                    "layer": layer,
                    "load": self.load[place].tolist(),
                    "imbalance": balance.imbalance,
                    "entropy_bits": balance.entropy_bits,
                    "entropy": balance.entropy,
                    "srp": balance.srp,
                    "sch": balance.sch,
                }
            )
        return {
            "shape": {"layers": len(self.layers), "experts": self.experts, "top_k": self.top_k},
            "every": self.every,
            "segment": SEGMENT,
            "cache": self.cache,
            "tokens": self.tokens,
            "since_s": self.since_s,
            "layers": rows,
        }
