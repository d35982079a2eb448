"""`python -m loadtests.routers`: Measures this gateway beside other projects' gateways.

LiteLLM's proxy, Portkey's gateway, and the routers of vLLM and SGLang stand in front of one
upstream with ours: all their processes on one core, load generator and upstream on another. Each is
in an environment of its own in the user's cache, made by the first run. A gateway that can't be
installed is left out and named.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from loadtests.lib.child_processes import say
from loadtests.lib.coe_service import config, serving
from loadtests.lib.command_line import parser, tell
from loadtests.lib.fake_openai_start import fake_upstream
from loadtests.lib.load_client import Target
from loadtests.lib.machine_load import Watch
from loadtests.lib.pinned_cores import check_pinned, pinned, two_cores
from loadtests.lib.process_times import ServiceTimes, tree_bytes, tree_ms
from loadtests.lib.targets_and_report import Report, Table
from loadtests.routers import searches
from loadtests.routers.comparison import DIRECT, MOST_CHUNK_MS, OURS, Measured, fill
from loadtests.routers.measurements import (
    COMMON_LEVEL,
    LEVELS,
    STEP_MS,
    WHOLE_MS,
    Side,
    latencies,
    load,
    stream_delay,
)
from loadtests.routers.peer_environments import CannotInstallError
from loadtests.routers.peers import PEERS, Peer, Site

_MODEL = "fake"


@dataclass(frozen=True, slots=True)
class _Plan:
    """How long everything is measured."""

    singles: int
    search_s: float
    load_rounds: int
    load_s: float
    stream_rounds: int
    stream_s: float
    idle_s: float


_QUICK = _Plan(300, 1.0, 3, 1.5, 1, 2.0, 2.0)
_FULL = _Plan(1000, 1.0, 5, 2.0, 2, 2.0, 4.0)


def _arguments() -> argparse.Namespace:
    words = parser("routers", __doc__)
    words.add_argument(
        "--quick", action="store_true", help="run fewer rounds; the intervals are wider"
    )
    words.add_argument(
        "--peers",
        nargs="+",
        choices=[peer.name for peer in PEERS],
        default=[peer.name for peer in PEERS],
        help="the gateways to compare with (default: all)",
    )
    words.add_argument("--install", action="store_true", help="make the environments, and stop")
    words.add_argument(
        "--port", type=int, default=8200, help="first of 14 consecutive free ports (default 8200)"
    )
    return words.parse_args()


def _installed(names: Sequence[str]) -> tuple[list[Peer], list[str]]:
    """Those whose environments are there, and why others are not."""
    found, missing = [], []
    for peer in PEERS:
        if peer.name in names:
            try:
                peer.environment()
                found.append(peer)
            except CannotInstallError as error:
                missing.append(f"{peer.name} is left out: {error}")
                say(missing[-1])
    return found, missing


def _our_config(port: int, upstream_port: int, key: str) -> Any:
    """Ours as users have it: one gateway, keys, prices, a budget, metrics."""
    remote = {"url": f"http://127.0.0.1:{upstream_port}/v1", "model": "upstream"}
    expert = {
        "remote": remote,
        "categories": ["general"],
        "price": {"prompt": 1, "completion": 1},
    }
    digest = hashlib.sha256(key.encode()).hexdigest()
    return config(port, {_MODEL: expert}) | {
        "tenants": {"load": {"budget": {"amount": 1e9, "period": "month"}}},
        "keys": {"load": {"tenant": "load", "sha256": digest}},
    }


async def _search(side: Side, plan: _Plan) -> int:
    """The number in flight with the most replies per second within bounds."""
    tried: list[searches.Load] = []
    while (in_flight := searches.next_in_flight(tried)) is not None:
        tried.append(await load(side, _MODEL, in_flight, plan.search_s))
    best = searches.best_load(tried)
    return best.in_flight if best is not None else 1


async def _streams(sides: Sequence[Side], measured: dict[str, Measured], for_s: float) -> None:
    """One round: the most streams of each gateway, beside the upstream itself at each level."""
    direct = next(side for side in sides if side.name == DIRECT)
    baseline: dict[int, float] = {}
    for side in sides:
        if side is direct:
            continue
        passed: dict[int, bool] = {}
        added_ms = math.inf
        while (level := searches.next_level(LEVELS, passed)) is not None:
            if level not in baseline:
                baseline[level] = await stream_delay(direct, _MODEL, level, for_s)
            delay_ms = await stream_delay(side, _MODEL, level, for_s) - baseline[level]
            passed[level] = delay_ms < MOST_CHUNK_MS
            if level == COMMON_LEVEL:
                added_ms = delay_ms
        measured[side.name].streams.append(searches.largest_passed(passed))
        measured[side.name].chunk_ms.append(added_ms)


async def _measure_all(
    sides: Sequence[Side], measured: dict[str, Measured], plan: _Plan, our_pid: int
) -> dict[str, float]:
    """Everything that asks. Returns our processor time per reply, in ms by role."""
    for side in sides:
        await load(side, _MODEL, 16, 1.0)
    say(f"one in flight, {plan.singles} rounds")
    for name, times in (await latencies(sides, _MODEL, plan.singles)).items():
        measured[name].alone_ms = times
    say("searching the numbers in flight")
    in_flight = {side.name: await _search(side, plan) for side in sides}
    roles: dict[str, float] = {}
    for i in range(plan.load_rounds):
        say(f"replies per second, round {i + 1} of {plan.load_rounds}")
        for j in range(len(sides)):
            side = sides[(i + j) % len(sides)]
            ours = ServiceTimes(our_pid) if side.name == OURS else None
            found = await load(side, _MODEL, in_flight[side.name], plan.load_s)
            measured[side.name].loads.append(found)
            if ours is not None:
                replies = max(1, round(found.replies_per_s * plan.load_s))
                for role, ms in ours.per_request(replies).items():
                    roles[role] = roles.get(role, 0.0) + ms / plan.load_rounds
    for i in range(plan.stream_rounds):
        say(f"streams, round {i + 1} of {plan.stream_rounds}")
        n = i % len(sides)
        await _streams([*sides[n:], *sides[:n]], measured, plan.stream_s)
    return roles


def _run(given: argparse.Namespace, watch: Watch) -> Report:
    peers, missing = _installed(given.peers)
    report = Report("routers")
    report.notes += missing
    generator, core = two_cores()
    plan = _QUICK if given.quick else _FULL
    key = "sk-" + secrets.token_hex(24)
    upstream_port = given.port + 3
    measured = {DIRECT: Measured(), OURS: Measured("Python")}
    sides = [Side(DIRECT, Target("127.0.0.1", upstream_port, key=key), None)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loadtests-")))
        stack.enter_context(pinned(generator))
        stack.enter_context(fake_upstream(upstream_port, STEP_MS, whole_ms=WHOLE_MS, stamped=True))
        with pinned(core):
            for i, peer in enumerate(peers):
                port = given.port + 4 + 2 * i
                site = Site(port, port + 1, upstream_port, _MODEL, key, folder)
                pid = stack.enter_context(peer.serving(site))
                sides.append(Side(peer.name, peer.target(site), pid))
                measured[peer.name] = Measured(peer.language, rust_router=peer.rust_router)
            our_pid = stack.enter_context(serving(_our_config(given.port, upstream_port, key)))
        sides.insert(1, Side(OURS, Target("127.0.0.1", given.port, key=key), our_pid))
        gateways = [(side, side.pid) for side in sides if side.pid is not None]
        for _, pid in gateways:
            check_pinned(pid, core)
        stack.enter_context(watch.window())
        _idle(gateways, measured, plan.idle_s)
        roles = uvloop.run(_measure_all(sides, measured, plan, our_pid))
        for side, pid in gateways:
            measured[side.name].held_bytes = tree_bytes(pid)
    fill(report, measured)
    report.tables.append(_roles_table(roles, measured[OURS]))
    report.facts["versions"] = {peer.name: peer.package.version for peer in peers}
    report.notes.append(
        f"All processes of a gateway are on core {core} and counted, with ours those of Ray and "
        f"HAProxy; load generator and upstream are on core {generator}. 'direct' is the upstream "
        "asked without a gateway. Versions: "
        + ", ".join(f"{peer.name} {peer.package.version}" for peer in peers)
        + "."
    )
    return report


def _idle(
    gateways: Sequence[tuple[Side, int]], measured: dict[str, Measured], over_s: float
) -> None:
    """What each takes while nobody asks: it disturbs the others on the same core."""
    time.sleep(over_s)  # the starts have their echoes
    before = [tree_ms(pid) for _, pid in gateways]
    time.sleep(over_s)
    for (side, pid), began_ms in zip(gateways, before, strict=True):
        measured[side.name].idle_share = (tree_ms(pid) - began_ms) / 1000 / over_s


def _roles_table(roles: dict[str, float], ours: Measured) -> Table:
    whole = sum(ours.busy_ms) / len(ours.busy_ms)
    table = Table("Our processor time per reply", ("process", "ms"))
    table.rows = [(role, f"{ms:.3f}") for role, ms in roles.items()]
    table.rows.append(("Ray's other processes", f"{max(0.0, whole - sum(roles.values())):.3f}"))
    return table


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    given = _arguments()
    if given.install:
        return 1 if _installed(given.peers)[1] else 0
    return tell(lambda watch: _run(given, watch), as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
