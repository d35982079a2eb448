"""What many pools cost a gateway: their snapshots as they come, and a choice among all of them.

A child process plays the pools: each sends the snapshot stream of a pool with 150 experts in ten
slots, 20 lines a second. In every line the queues of one slot and the speed of one expert are new,
and so are the times until that slot's experts are ready. The gateway's own client and table follow
them over HTTP. The gateway's processor time is measured without requests, and each choice is timed
while the snapshots come.

With more pools than a gateway follows, the choice is made among a subset. Its expected utility is
compared with that of a choice among all pools.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from msgspec import structs

from loadtests.lib.child_processes import say
from loadtests.lib.median_intervals import Estimate, median, percentile
from loadtests.lib.targets_and_report import Report, Table, at_least, at_most
from loadtests.route.selection_latency import EXPERTS, SLOTS, book_of, pool_of, requests_of
from service.broker.pool_state import PoolStateTable, PoolView
from service.broker.selection import select
from service.rpc.pool_directory import PoolDirectory, followed_subset
from service.rpc.pool_link import PoolAddress
from service.rpc.snapshot import Queue, Snapshot, Speed, encode

POOLS = (16, 64)
LINES_PER_S = 20
FLEET = 1000
_CYCLE = 60
_CHOICES_PER_S = 50


def measure(report: Report, seconds: float) -> None:
    """Measure each number of pools for so many seconds, and the subset of a fleet."""
    table = Table(
        f"A gateway that follows pools of {EXPERTS} experts, {LINES_PER_S} snapshots/s from each",
        ("pools", "of a core, without requests", "choice, ms", "99th percentile"),
    )
    report.tables.append(table)
    for count in POOLS:
        with _pools(count) as url:
            share, times = asyncio.run(_follow(url, count, seconds))
        choice = median(times)
        late = percentile(times, 99)
        table.rows.append((str(count), f"{share:.3f}", choice.text(), f"{late:.3f}"))
        report.facts[f"snapshots_{count}_pools"] = {
            "core": share,
            "choice_ms": choice.value,
            "choice_p99_ms": late,
        }
    report.reach += [
        at_most(f"snapshots of {count} pools, of a core", 0.1, Estimate(share, share, share)),
        at_most(f"choice among {count} pools while snapshots come, ms", 0.5, choice),
        at_most("its 99th percentile, ms", 1.0, Estimate(late, late, late)),
    ]
    subset_ms, utility = _subset_of_fleet()
    report.reach += [
        at_most(f"choice of a gateway among {FLEET} pools, ms", 1.0, subset_ms),
        at_least("expected utility over that of a choice among all", 0.98, utility),
    ]


async def _follow(url: str, count: int, seconds: float) -> tuple[float, list[float]]:
    """The share of a core without requests, and the time of each choice in ms."""
    catalog = book_of(random.Random(1))
    directory = PoolDirectory("gateway", "secret")
    table = PoolStateTable(catalog.index)
    directory.listen(table.update)
    directory.update([PoolAddress(f"{url}/{i}", "gpu", str(i)) for i in range(count)])
    try:
        async with asyncio.timeout(20):
            while len(directory.links()) < count:
                await directory.change(1)
        # The first lines hold whole states; the times of steady traffic are wanted.
        await asyncio.sleep(1)
        used, began = time.process_time(), time.perf_counter()
        await asyncio.sleep(seconds)
        share = (time.process_time() - used) / (time.perf_counter() - began)
        times = []
        for request in itertools.islice(requests_of(catalog), int(seconds * _CHOICES_PER_S)):
            await asyncio.sleep(1 / _CHOICES_PER_S)
            begun = time.perf_counter()
            views = [
                PoolView(link.address.boot, link.snapshot, 0.0, link.unseen())
                for link in directory.links()
                if link.snapshot is not None
            ]
            best = select(catalog, table.to_matrix(views), request).best_position()
            times.append(1e3 * (time.perf_counter() - begun))
            assert best is not None
    finally:
        await directory.close()
    return share, times


def _subset_of_fleet(rounds: int = 40) -> tuple[Estimate, Estimate]:
    """The time of a choice among a gateway's subset, and its utility over that among all pools.

    Each pool of the fleet holds 15 of the experts. Utilities are averages over requests of several
    gateways, whose subsets differ.
    """
    draw = random.Random(2)
    catalog = book_of(draw)
    views = [
        pool_of(f"pool-{i}", tuple(draw.sample(catalog.experts, 15)), draw) for i in range(FLEET)
    ]
    by_boot = {view.boot: view for view in views}
    addresses = [PoolAddress("", "gpu", str(view.boot)) for view in views]
    whole = PoolStateTable(catalog.index)
    times: list[float] = []
    ratios: list[float] = []
    requests = requests_of(catalog)
    for gateway in range(8):
        subset = [by_boot[one.boot] for one in followed_subset(f"gateway-{gateway}", addresses)]
        table = PoolStateTable(catalog.index)
        table.to_matrix(subset)
        few = all_of_them = 0.0
        for request in itertools.islice(requests, rounds):
            begun = time.perf_counter()
            selection = select(catalog, table.to_matrix(subset), request)
            times.append(1e3 * (time.perf_counter() - begun))
            few += float(selection.utility.max())
            all_of_them += float(select(catalog, whole.to_matrix(views), request).utility.max())
        ratios.append(few / all_of_them)
    return median(times), median(ratios)


@contextmanager
def _pools(count: int) -> Iterator[str]:
    """A process that plays so many pools, and the URL that they share."""
    command = [sys.executable, "-m", "loadtests.route.snapshot_streams", str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            say(f"{count} pools, {LINES_PER_S} snapshots/s from each")
            yield f"http://127.0.0.1:{json.loads(child.stdout.readline())}"
        finally:
            child.terminate()


def stream_of(boot: str) -> tuple[bytes, list[bytes]]:
    """A pool's first line, and lines of changes that can be repeated for ever."""
    seed = int.from_bytes(hashlib.blake2b(boot.encode(), digest_size=4).digest())
    draw = random.Random(seed)
    names = book_of(random.Random(1)).experts
    whole = replace(pool_of(boot, names, draw).snapshot, seq=1)
    states = [whole]
    for _ in range(_CYCLE - 1):
        states.append(_next_state(states[-1], draw))
    steps = zip([*states[1:], whole], states, strict=True)
    return encode(whole, None), [encode(now, before) for now, before in steps]


def _next_state(last: Snapshot, draw: random.Random) -> Snapshot:
    slot = draw.randrange(SLOTS)
    inside = [name for name, state in last.experts.items() if state.slot == slot]
    return replace(
        last,
        seq=last.seq + 1,
        experts=last.experts
        | {name: structs.replace(last.experts[name], eta_s=draw.random() * 5) for name in inside},
        queues=last.queues
        | {name: Queue(draw.randint(0, 4), draw.randint(0, 8)) for name in inside},
        speeds=last.speeds | {draw.choice(inside): Speed(0.1, 0.02 * draw.random(), 0.0001)},
    )


async def _serve(count: int) -> None:
    streams = {str(i): stream_of(str(i)) for i in range(count)}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        boot = head.split(b" ")[1].split(b"/")[1].decode()
        first, changes = streams[boot]
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            for line in itertools.chain([first], itertools.cycle(changes)):
                writer.write(b"%x\r\n%b\r\n" % (len(line), line))
                await writer.drain()
                await asyncio.sleep(1 / LINES_PER_S)
        except ConnectionError:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(json.dumps(server.sockets[0].getsockname()[1]), flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
