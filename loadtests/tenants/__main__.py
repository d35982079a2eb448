"""`python -m loadtests.tenants`: Checks that limits hold and that tenants share capacity.

It uses the whole service around the simulated engine. The first part has two gateways that share a
Redis. 64 clients with one key use up a budget and then a rate limit, and some of them leave early.
They then use up a budget with requests for several answers at once, and a budget with requests to
every endpoint that generates; half of these clients leave early. The used tokens are compared with
the limits and with the ledger. The second part has one gateway and two tenants, one of which has 50
times the other's requests in flight. The small tenant's times are compared with those that it has
alone.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import uvloop
from redis import Redis

from loadtests.lib import median_intervals
from loadtests.lib.child_processes import admin_key_of, fetch, say
from loadtests.lib.coe_service import config, serving
from loadtests.lib.command_line import parser, tell
from loadtests.lib.load_client import Exchange, Target, closed_loop
from loadtests.lib.redis_server import redis_server
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from loadtests.lib.varied_prompts import prompts
from loadtests.tenants.tenant_clients import ENDPOINTS, MANY, PLAIN, Clients

CLIENTS = 64
BUDGET, RATE = 3000, 300
# Whose key, what it is allowed, and the share of its clients' requests that leave.
PHASES = (
    ("payer", BUDGET, 0.0, PLAIN),
    ("leaver", BUDGET, 0.1, PLAIN),
    ("rated", RATE, 0.1, PLAIN),
    ("many", BUDGET, 0.5, MANY),
    ("every", BUDGET, 0.5, ENDPOINTS),
)
_WORDS = {
    "many": "budget, tokens, any form, half leave",
    "every": "budget, tokens, any endpoint, half leave",
    "payer": "budget, tokens",
    "leaver": "budget, tokens, some leave",
    "rated": "requests per minute, some leave",
}
_SETTLED_S = 3.0
_STEP_MS, _PLACES = 10.0, 16
_SMALL, _TIMES = 2, 50
_RATIO = 1.5


def _key(name: str) -> str:
    return f"load-test-key-of-{name}"


def _keys(**limits: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {"tenant": name, "sha256": hashlib.sha256(_key(name).encode()).hexdigest(), **given}
        for name, given in limits.items()
    }


def _body(model: str, prompt: str, tokens: int, *, stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "stream": stream}


# --- limits


async def limits(port: int, rounds: int, report: Report) -> None:
    """A budget and a rate limit under 64 clients through two gateways."""
    experts = {"sim": {"model": "sim", "price": {"prompt": 0, "completion": 1_000_000}}}
    pool = {"engine": "simulated", "simulated": {"decode_ms": 1.0}}
    table = Table(
        f"{CLIENTS} clients, two gateways, one Redis",
        ("round", "limit", "allowed", "used", "in the ledger", "refused", "left early", "leaked"),
    )
    over = leaked = apart = unfilled = unmade = 0
    least_gateways = least_forms = 99
    with redis_server(port + 2) as redis:
        for number in range(rounds):
            keys = _keys(
                payer={"budget": {"amount": BUDGET, "period": "month"}},
                leaver={"budget": {"amount": BUDGET, "period": "month"}},
                rated={"requests_per_min": RATE},
                many={"budget": {"amount": BUDGET, "period": "month"}},
                every={"budget": {"amount": BUDGET, "period": "month"}},
            )
            settings = config(port, experts, {"sim": pool}) | {
                "keys": keys,
                "store": {
                    "kind": "redis",
                    "url": f"redis://127.0.0.1:{port + 2}/0",
                    "prefix": f"round{number}",
                    # A machine that is busy is no outage.
                    "timeout_ms": 20_000,
                },
            }
            settings["server"]["gateways"] = 2
            del settings["router"]
            with serving(settings):
                for name, allowed, leaving, shapes in PHASES:
                    clients = Clients(port, _key(name), seed=number)
                    await clients.hammer(CLIENTS, allowed, leaving=leaving, shapes=shapes)
                    left = await _leaked(redis, f"round{number}")
                    spent = await clients.spent()
                    used = clients.used_tokens
                    if name == "rated":
                        used = clients.served + clients.left
                    over += max(0, spent - allowed, used - allowed)
                    unfilled += max(0, allowed - spent)
                    leaked += left
                    if name == "rated":
                        apart += max(0, used - spent)
                    else:
                        # Those who left pay at least for what they saw, at most for all of it.
                        least = used + clients.seen_tokens
                        apart += max(0, least - spent)
                        unmade += max(0, spent - least - clients.most_unseen_tokens)
                    if name == "every":
                        least_forms = min(least_forms, len(clients.left_on))
                        forms = sorted(clients.left_on.items())
                        say("left on " + ", ".join(f"{p} {s}: {n}" for (p, s), n in forms))
                    table.rows.append(
                        (
                            str(number + 1),
                            _WORDS[name],
                            str(allowed),
                            str(used),
                            str(spent),
                            str(clients.refused),
                            str(clients.left + clients.gone),
                            str(left),
                        )
                    )
                least_gateways = min(least_gateways, _gateways(port))
    report.tables.append(table)
    report.reach += [
        TargetCheck("overspent, at most", 0, over, over == 0),
        TargetCheck("leaked reservations, at most", 0, leaked, leaked == 0),
        TargetCheck("received and not in the ledger, at most", 0, apart, apart == 0),
        TargetCheck("in the ledger and never made, at most", 0, unmade, unmade == 0),
        TargetCheck("allowed and never granted, at most", 0, unfilled, unfilled == 0),
        TargetCheck(
            "endpoints left, whole and in streams, at least", 8, least_forms, least_forms >= 8
        ),
        TargetCheck("gateways that took part, at least", 2, least_gateways, least_gateways >= 2),
    ]
    report.facts["limits"] = {"overspent": over, "leaked": leaked, "apart": apart}


async def _leaked(redis: Redis, prefix: str) -> int:
    """Claims that nobody settled, once everything has ended."""
    end_s = time.monotonic() + _SETTLED_S
    while True:
        names: Any = redis.scan_iter(match=f"?{prefix}?:own:*")
        left = sum(int(redis.hlen(name)) for name in names)
        if not left or time.monotonic() > end_s:
            return left
        await asyncio.sleep(0.1)


def _gateways(port: int) -> int:
    """Return the number of gateways that have answered a request."""
    _, text = fetch(port, "/metrics", admin_key=admin_key_of())
    found = set()
    for line in text.decode().splitlines():
        if line.startswith("coe_requests_total{") and not line.endswith(" 0.0"):
            found.add(line.partition('gateway="')[2].partition('"')[0])
    return len(found)


# --- fairness


def _supply(target: Target, tokens: Callable[[], int], seed: int) -> Callable[[], bytes]:
    texts = prompts(64, seed=seed)
    turn = iter(range(10**9))

    def following() -> bytes:
        text = texts[next(turn) % len(texts)]
        return target.request(_body("sim", text, tokens(), stream=True))

    return following


async def fairness(port: int, for_s: float, report: Report) -> None:
    """A small tenant's times alone, and beside one with 50 times its requests in flight."""
    experts = {"sim": {"model": "sim"}}
    pool = {
        "engine": "simulated",
        "simulated": {"decode_ms": _STEP_MS, "max_num_seqs": _PLACES},
    }
    settings = config(port, experts, {"sim": pool}) | {"keys": _keys(small={}, heavy={})}
    del settings["router"]
    small = Target("127.0.0.1", port, key=_key("small"))
    heavy = Target("127.0.0.1", port, key=_key("heavy"))
    draw = random.Random(5)
    alone: list[Exchange] = []
    beside: list[Exchange] = []
    others: list[Exchange] = []
    with serving(settings):
        ask = _supply(small, lambda: 20, 1)
        flood = _supply(heavy, lambda: draw.randint(4, 36), 2)
        await closed_loop(small, ask, _SMALL, for_s=1.0)
        # Taking turns, so that a noisy moment is nobody's alone.
        for number in range(4):
            say(f"turn {number + 1} of 4")
            alone += (await closed_loop(small, ask, _SMALL, for_s=for_s / 4)).check().exchanges
            both = await asyncio.gather(
                closed_loop(heavy, flood, _SMALL * _TIMES, for_s=for_s / 4 + 1.0),
                _later(closed_loop, small, ask, for_s / 4),
            )
            others += both[0].check().exchanges
            beside += both[1].check().exchanges
    times = {"alone": _ms(alone), "beside": _ms(beside)}
    p95 = {name: median_intervals.percentile(values, 95) for name, values in times.items()}
    ratio = p95["beside"] / p95["alone"]
    heavy_ms = _ms(others)
    report.tables.append(
        Table(
            f"Two tenants, {_PLACES} places, {_SMALL} and {_SMALL * _TIMES} requests in flight",
            ("who", "answers", "p50 ms", "p95 ms"),
            [
                (
                    name,
                    str(len(values)),
                    f"{median_intervals.percentile(values, 50):.0f}",
                    f"{p:.0f}",
                )
                for name, values, p in (
                    ("small, alone", times["alone"], p95["alone"]),
                    ("small, beside the other", times["beside"], p95["beside"]),
                    ("the other", heavy_ms, median_intervals.percentile(heavy_ms, 95)),
                )
            ],
        )
    )
    report.reach.append(
        TargetCheck(
            "times the small one's p95 alone, at most", _RATIO, round(ratio, 3), ratio <= _RATIO
        )
    )
    report.facts["fairness"] = {"p95_ms": p95, "ratio": ratio}


def _ms(exchanges: list[Exchange]) -> list[float]:
    return [exchange.total_ms for exchange in exchanges]


async def _later(loop: Any, target: Target, ask: Callable[[], bytes], for_s: float) -> Any:
    # The other one's queue is there by then.
    await asyncio.sleep(0.5)
    return await loop(target, ask, _SMALL, for_s=for_s)


def _arguments() -> argparse.Namespace:
    words = parser("tenants", __doc__)
    words.add_argument(
        "--only", choices=("limits", "fairness"), help="run only one of the two parts"
    )
    words.add_argument(
        "--rounds", type=int, default=3, help="number of rounds of the limits (default 3)"
    )
    words.add_argument(
        "--for-s", type=float, default=40.0, help="seconds for each scenario of fairness"
    )
    words.add_argument(
        "--port", type=int, default=8200, help="first of four consecutive free ports (default 8200)"
    )
    return words.parse_args()


async def _measure(given: argparse.Namespace) -> Report:
    report = Report("tenants, simulated engine")
    if given.only != "fairness":
        await limits(given.port, given.rounds, report)
    if given.only != "limits":
        await fairness(given.port, given.for_s, report)
    return report


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    given = _arguments()
    return tell(lambda _: uvloop.run(_measure(given)), as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
