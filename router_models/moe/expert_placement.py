"""Which device holds which routed experts of a layer. Pure.

A step of expert parallelism ends when the busiest device is done, so a layer's cost is the load of
that device. All devices have room for the same number of experts. Several devices may hold the same
expert; its copies then share its load evenly, as in vLLM's dispatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Placed:
    """The experts of each device, ascending; a copied one stands on several."""

    devices: tuple[tuple[int, ...], ...]

    def device_load(self, load: Floats) -> Floats:
        """Return each device's load (devices,) for loads of the experts (experts,)."""
        copies = np.bincount([e for held in self.devices for e in held], minlength=len(load))
        share = load / np.maximum(copies, 1)
        return np.array([share[list(held)].sum() for held in self.devices])

    def busiest(self, load: Floats) -> float:
        """Return the load of the busiest device."""
        return float(self.device_load(load).max())


def linear(experts: int, devices: int) -> Placed:
    """Place as vLLM's `linear` does: neighbours together."""
    room = _room(experts, devices)
    return Placed(tuple(tuple(range(d * room, (d + 1) * room)) for d in range(devices)))


def round_robin(experts: int, devices: int) -> Placed:
    """Place as vLLM's `round_robin` does: one expert per device in turn."""
    _room(experts, devices)
    return Placed(tuple(tuple(range(d, experts, devices)) for d in range(devices)))


def copied(load: Floats, replicas: int, devices: int) -> Counts:
    """Return the number of devices per expert, (experts,), with `replicas` redundant copies.

    Each goes to the expert whose copies have most to do each. Raises ValueError where there
    are more copies than places.
    """
    if replicas > len(load) * (devices - 1):
        raise ValueError(
            f"{replicas} copies are too many: {len(load)} experts on {devices} devices have "
            f"places for {len(load) * (devices - 1)}"
        )
    copies = np.ones(len(load), dtype=np.int64)
    for _ in range(replicas):
        each = np.where(copies < devices, load / copies, -1.0)
        copies[int(each.argmax())] += 1
    return copies


def longest_first(load: Floats, copies: Counts, devices: int) -> Placed:
    """Give the remaining expert with the largest load to the least loaded device with room.

    Longest processing time (Graham, 1969) with the least-loaded rule of LLEP (Nguyen et al.,
    arXiv 2601.17111), under equal room. Without that bound on room the busiest device has at
    most 4/3 − 1/(3·devices) of the least possible; with room for three the same is proven
    (Kellerer and Woeginger, 1993). Two copies of one expert share a device only where no
    other has room.
    """
    room = _room(int(copies.sum()), devices)
    each = load / copies
    held: list[list[int]] = [[] for _ in range(devices)]
    busy = np.zeros(devices)
    for expert in sorted(range(len(load)), key=lambda e: (-each[e], e)):
        for _ in range(int(copies[expert])):
            free = [d for d in range(devices) if len(held[d]) < room]
            fresh = [d for d in free if expert not in held[d]] or free
            least = min(fresh, key=lambda d: (busy[d], d))
            held[least].append(expert)
            busy[least] += each[expert]
    return _placed(held)


def exact(load: Floats, copies: Counts, devices: int, *, time_limit_s: float) -> Placed | None:
    """The placement whose busiest device has least to do, or None where none was proven in time.

    min T  s.t.  Σ_d n[e,d] = copies[e],  Σ_e n[e,d] = room,  Σ_e n[e,d]·each[e] ≤ T,
    n integer; by HiGHS (Huangfu and Hall, 2018), as MoETuner (Go and Mahajan, arXiv
    2502.06643) does, whose cost of communication is left out: loads do not tell it.
    """
    room = _room(int(copies.sum()), devices)
    total = float(load.sum())
    if total <= 0:
        return longest_first(load, copies, devices)
    experts = len(load)
    each = load / copies / total
    one, many = np.ones(experts), np.ones(devices)
    last = sparse.csr_matrix((experts, 1))
    found = milp(
        np.append(np.zeros(experts * devices), 1.0),
        integrality=np.append(np.ones(experts * devices), 0),
        bounds=Bounds(np.zeros(experts * devices + 1), np.append(np.repeat(copies, devices), 1.0)),
        constraints=[
            LinearConstraint(
                sparse.hstack([sparse.kron(sparse.eye(experts), many[None]), last]), copies, copies
            ),
            LinearConstraint(
                sparse.hstack(
                    [
                        sparse.kron(one[None], sparse.eye(devices)),
                        sparse.csr_matrix((devices, 1)),
                    ]
                ),
                room,
                room,
            ),
            LinearConstraint(
                sparse.hstack([sparse.kron(each[None], sparse.eye(devices)), -many[:, None]]),
                -np.inf,
                0,
            ),
        ],
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )
    if found.status != 0 or found.x is None:
        return None
    counts = np.rint(found.x[:-1]).astype(np.int64).reshape(experts, devices)
    return _placed(
        [[e for e in range(experts) for _ in range(counts[e, d])] for d in range(devices)]
    )


def least_possible(load: Floats, copies: Counts, devices: int) -> float:
    """No placement's busiest device has less: all shared evenly, or the largest copy alone."""
    return max(float(load.sum()) / devices, float((load / copies).max()))


def _room(places: int, devices: int) -> int:
    """Experts that each device holds. Raises ValueError where they can't be equal."""
    if devices < 2:
        raise ValueError(f"{devices} device has nothing to place; give at least 2")
    if places % devices:
        raise ValueError(
            f"{places} experts can't be spread evenly over {devices} devices; "
            f"{-places % devices} more copies would"
        )
    return places // devices


def _placed(held: list[list[int]]) -> Placed:
    # The devices are interchangeable. They are sorted, so that equal placements compare equal.
    return Placed(tuple(sorted(tuple(sorted(item)) for item in held)))
