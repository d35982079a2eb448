"""What is measured of each gateway: latency, replies per second, streams, processor time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.lib import median_intervals
from loadtests.lib.child_processes import say
from loadtests.lib.load_client import Asker, Exchange, Target, closed_loop, once, repeat
from loadtests.lib.process_times import tree_ms
from loadtests.lib.varied_prompts import prompts
from loadtests.routers.chunk_delays import chunk_delays
from loadtests.routers.searches import Load

STEP_MS = 20.0
WHOLE_MS = 20.0
CHUNKS = 64
LEVELS = (16, 32, 64, 128, 256)
# The middle of the levels, which a bisection tries first: all gateways are measured at it.
COMMON_LEVEL = 64
STREAM_S = CHUNKS * STEP_MS / 1000
_GRACE_S = 30.0


@dataclass(frozen=True, slots=True)
class Side:
    """One that is asked: a gateway, or the upstream itself.

    Attributes:
        name: Its name in tables.
        target: Where it is asked.
        pid: The process whose tree is the gateway; None of the upstream.
    """

    name: str
    target: Target
    pid: int | None


def _body(model: str, prompt: str, tokens: int, *, stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "stream": stream}


def _good(exchange: Exchange) -> bool:
    return not exchange.error and exchange.status == 200 and b'"chat.completion"' in exchange.body


async def latencies(sides: Sequence[Side], model: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of streamed one-chunk replies, one in flight, each side in turn.

    The first tenth warms up and is left out. Raises RuntimeError if a reply is not whole.
    """
    askers = [Asker(side.target) for side in sides]
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for i, text in enumerate(prompts(rounds, seed=4)):
        for j in range(len(sides)):
            n = (i + j) % len(sides)
            request = sides[n].target.request(_body(model, text, 1, stream=True))
            try:
                exchange = await askers[n].ask(request)
            except RuntimeError as error:
                raise RuntimeError(f"{sides[n].name}: {error}") from error
            if i >= rounds // 10:
                times[sides[n].name].append(exchange.total_ms)
    for asker in askers:
        asker.close()
    return times


async def load(side: Side, model: str, in_flight: int, for_s: float) -> Load:
    """Whole replies of an upstream that takes 20 ms, so many in flight."""
    request = side.target.request(_body(model, prompts(1, seed=1)[0], 1, stream=False))
    before_ms = tree_ms(side.pid) if side.pid is not None else 0.0
    looping = closed_loop(side.target, repeat(request), in_flight, for_s=for_s)
    try:
        turn = await asyncio.wait_for(looping, for_s + _GRACE_S)
    except OSError:  # it refuses connections, or doesn't answer in time
        return Load(in_flight, 0.0, math.inf, 1.0)
    busy_ms = tree_ms(side.pid) - before_ms if side.pid is not None else 0.0
    good = [exchange.total_ms for exchange in turn.exchanges if _good(exchange)]
    if not good:
        return Load(in_flight, 0.0, math.inf, 1.0)
    return Load(
        in_flight,
        len(good) / turn.wall_s,
        median_intervals.percentile(good, 99),
        1 - len(good) / len(turn.exchanges),
        busy_ms / len(good),
    )


async def stream_delay(side: Side, model: str, streams: int, for_s: float) -> float:
    """The 99th percentile of the chunks' delays in ms, with so many streams at all times.

    Streams begin at even times and each is followed by another, so that their beginnings are
    spread as in service. Chunks count once all streams are under way. Infinite if a stream is not
    whole, or none of its chunks comes in time.
    """
    texts = prompts(streams, seed=2)
    requests = [side.target.request(_body(model, text, CHUNKS, stream=True)) for text in texts]
    supply = once(requests * (2 + math.ceil(for_s / STREAM_S)))
    whole_s = STREAM_S + for_s
    looping = closed_loop(side.target, supply, streams, for_s=whole_s, spread_s=STREAM_S)
    try:
        turn = await asyncio.wait_for(looping, whole_s + STREAM_S + _GRACE_S)
        from_s = min(exchange.began_s for exchange in turn.exchanges) + STREAM_S
        delays = [
            delay
            for exchange in turn.exchanges
            for delay in chunk_delays(exchange, CHUNKS, from_s, from_s + for_s)
        ]
    except (OSError, ValueError) as error:
        say(f"{side.name}, {streams} streams: {str(error) or repr(error)}")
        return math.inf
    return median_intervals.percentile(delays, 99) if delays else math.inf
