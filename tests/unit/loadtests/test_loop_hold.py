"""The event-loop load test sends the largest requests that a gateway admits."""

from __future__ import annotations

import asyncio
import gc
import time
import zlib

import orjson
import pytest

from loadtests.loop_hold import Case, cases, png
from loadtests.loop_hold_meter import HoldMeter
from service.config import Config
from service.gateway.request.body_limits import RequestLimitChecker
from service.gateway.request.media_tokens import image_size
from service.gateway.request.parsing import parse_request

CONFIG = Config.model_validate(
    {"experts": {"small": {"model": "m"}}, "pools": {"cpu": {"engine": "simulated"}}}
)
LIMITS = RequestLimitChecker(CONFIG)


@pytest.mark.parametrize("case", list(cases(CONFIG)), ids=lambda case: str(case.name))
def test_loop_hold_requests_pass_the_gateway_s_limits(case: Case) -> None:
    raw = orjson.dumps({"model": "small", **case.body})
    assert len(raw) <= CONFIG.server.max_body_bytes
    LIMITS.shape(raw)
    LIMITS.fields(parse_request(case.path, raw, {}, 1000).data)


def spin(for_s: float) -> None:
    end_s = time.thread_time() + for_s
    while time.thread_time() < end_s:
        pass


def test_loop_hold_meter_names_the_longest_callback() -> None:
    async def holds() -> None:
        await asyncio.sleep(0)
        spin(0.03)
        await asyncio.sleep(0)

    with HoldMeter() as meter:
        asyncio.run(holds())
    assert meter.longest_s >= 0.03
    assert meter.where.endswith("holds")
    assert meter.callbacks >= 3


def test_loop_hold_meter_does_not_count_waiting() -> None:
    async def waits() -> None:
        await asyncio.sleep(0.05)
        await asyncio.to_thread(spin, 0.05)

    before = asyncio.Handle._run
    with HoldMeter() as meter:
        asyncio.run(waits())
    assert meter.longest_s < 0.05
    assert asyncio.Handle._run is before


@pytest.mark.parametrize("collections", [True, False])
def test_loop_hold_meter_counts_garbage_collection_only_on_request(collections: bool) -> None:
    held: list[object] = [[i] for i in range(300_000)]

    async def collects() -> None:
        gc.collect()

    began_s = time.thread_time()
    gc.collect()
    alone_s = time.thread_time() - began_s
    with HoldMeter(collections=collections) as meter:
        asyncio.run(collects())
    assert (meter.longest_s > alone_s / 2) is collections
    assert len(held) == 300_000


def test_loop_hold_images_are_the_largest_by_bytes_and_by_pixels() -> None:
    sizes = {}
    for case in cases(CONFIG):
        if case.image:
            (part,) = case.body["messages"][0]["content"]
            header, _, payload = part["image_url"]["url"].partition(",")
            size = image_size(payload)
            assert header == "data:image/png;base64"
            assert size is not None
            sizes[case.name] = (len(payload), size[0] * size[1])
    assert sizes["image, decoded: bytes"][0] > 0.99 * CONFIG.server.max_body_bytes
    assert 0.9999 < sizes["image, decoded: pixels"][1] / 178_956_970 <= 1


@pytest.mark.parametrize(("mode", "row_bytes"), [("RGB", 1 + 3 * 9), ("1", 1 + 2)])
def test_loop_hold_png_holds_whole_rows(mode: str, row_bytes: int) -> None:
    made = png(9, 5, mode)
    start = made.index(b"IDAT") + 4
    assert len(zlib.decompress(made[start : made.index(b"IEND") - 8])) == 5 * row_bytes
