"""What the routers of one expert chose, added up: as counted, as it travels, and as told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.moe.load_statistics import SEGMENT, Cacheability, entropy_bits, evenness, imbalance


@dataclass(frozen=True, slots=True)
class LayerBalance:
    """One layer's figures; None: nothing was seen that could tell. See `routes`."""

    imbalance: float | None
    entropy_bits: float | None
    entropy: float | None
    srp: float | None
    sch: float | None


@dataclass(frozen=True, slots=True, eq=False)
class RoutingCounts:
    """One expert's choices.

    layers: decoder layers that route; experts, top_k: of each. cache: how many experts of a layer
    the cache of `sch` holds. tokens: how many were looked at, in one step of `every`. since_s:
    from when on, in s since 1970. load: (layers, experts).
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
        """Of one layer, by its place in `layers`."""
        load, kept = self.load[place], self.cacheability
        return LayerBalance(
            imbalance(load),
            entropy_bits(load),
            evenness(load),
            kept.srp(place),
            kept.sch(place),
        )

    def like(self, other: RoutingCounts) -> bool:
        """Whether both are of one model, as far as shapes tell."""
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
        """As it travels from a pool to a gateway: what can be added up."""
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
    def from_wire(told: dict[str, Any]) -> RoutingCounts:
        """The reverse of `sums`."""
        kept = Cacheability(
            *(np.array(told[name], np.int64) for name in ("segments", "hits", "uses"))
        )
        return RoutingCounts(
            tuple(told["layers"]),
            told["experts"],
            told["top_k"],
            told["every"],
            told["cache"],
            told["since_s"],
            told["tokens"],
            np.array(told["load"], np.int64),
            kept,
        )

    def to_json(self) -> dict[str, Any]:
        """For people and programs: the shape, what was seen, and each layer's figures."""
        rows = []
        for place, layer in enumerate(self.layers):
            one = self.balance(place)
            rows.append(
                {
                    "layer": layer,
                    "load": self.load[place].tolist(),
                    "imbalance": one.imbalance,
                    "entropy_bits": one.entropy_bits,
                    "entropy": one.entropy,
                    "srp": one.srp,
                    "sch": one.sch,
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
