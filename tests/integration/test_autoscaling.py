"""Autoscaling of pools and gateways by Ray Serve: from zero, up, and down under running streams.

All tests share one `coe serve` and follow one another.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.coe_serve_process import Service, serve, wait_until
from tests.support.redis_server import redis_server

pytestmark = pytest.mark.cluster

POOL, GATEWAY = "ray::ServeReplica:coe:pool-main", "ray::ServeReplica:coe:gateway"
DECODE_S = 0.1
DRAIN_S = 2
DELAY_S = 8
PLACES = 4
SCALING: dict[str, Any] = {
    "upscale_delay_s": 0.5,
    "downscale_delay_s": DELAY_S,
    "downscale_drain_s": 60,
}


def settings(redis_url: str) -> dict[str, Any]:
    """No pool at first, and one gateway."""
    return {
        "server": {
            # Less than a stream of the tests takes.
            "drain_s": DRAIN_S,
            "gateways": {"max_replicas": 2, "target_in_flight_requests": 5, **SCALING},
        },
        "store": {"kind": "redis", "url": redis_url},
        "experts": {"one": {"model": "m"}, "two": {"model": "m"}},
        "pools": {
            "main": {
                "engine": "simulated",
                "min_replicas": 0,
                "max_replicas": 2,
                "cpus": 0.1,
                "simulated": {"decode_ms": DECODE_S * 1000, "max_num_seqs": PLACES},
                "autoscaling": {
                    "target_ongoing_requests": PLACES,
                    "target_wait_s": 1,
                    "downscale_to_zero_delay_s": DELAY_S,
                    **SCALING,
                },
            }
        },
    }


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The running service."""
    folder = tmp_path_factory.mktemp("autoscaling")
    with redis_server(folder) as redis:
        path = folder / "coe.yaml"
        path.write_text(yaml.safe_dump(settings(redis.url)))
        with serve(path) as running:
            yield running


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    """The official client, without its own retries."""
    with openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def open_stream(client: openai.OpenAI, tokens: int, model: str = "one") -> Any:
    """Ask for a streamed answer of so many tokens, and return it once it has begun."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"{tokens} tokens, please"}],
        stream=True,
        max_tokens=tokens,
    )
    next(answer)
    return answer


def stream(client: openai.OpenAI, tokens: int, model: str = "one") -> int:
    """Ask for a streamed answer of so many tokens, and return how many came."""
    answer = open_stream(client, tokens, model)
    return 1 + sum(1 for chunk in answer if chunk.choices)


def wanted_pools(service: Service) -> float:
    """The replicas of the pool that start or run; others end their streams and stop."""
    with urllib.request.urlopen(service.url + "/metrics", timeout=60) as reply:
        text = reply.read().decode()
    states = {
        sample.labels["state"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "coe_replicas" and sample.labels["deployment"] == "pool-main"
    }
    return states["starting"] + states["running"]


def test_pool_scaled_to_zero_answers_the_first_request(
    service: Service, client: openai.OpenAI
) -> None:
    assert service.named(POOL) == []
    assert stream(client, 3) == 3
    assert len(service.named(POOL)) == 1


def test_pool_and_gateway_get_replicas_for_queued_requests(
    service: Service, client: openai.OpenAI
) -> None:
    end_s = time.monotonic() + 60
    with ThreadPoolExecutor(4 * PLACES) as threads:
        # More than one replica has places for, until the second one is there.
        asked: list[Future[int]] = []
        while not (len(service.named(POOL)) == len(service.named(GATEWAY)) == 2):
            assert time.monotonic() < end_s, "replicas never came"
            if sum(not one.done() for one in asked) < 4 * PLACES:
                asked.append(threads.submit(stream, client, 20, ("one", "two")[len(asked) % 2]))
            time.sleep(0.05)
        assert {one.result() for one in asked} == {20}


def test_removed_replica_ends_its_streams(service: Service, client: openai.OpenAI) -> None:
    # They outlast the delay of the removal, and the service's own drain time. One replica has
    # places for both.
    tokens = 250
    with ThreadPoolExecutor(2) as threads:
        long = [threads.submit(stream, client, tokens) for _ in range(2)]
        wait_until(lambda: wanted_pools(service) == 1, "a replica is taken out of service")
        assert not any(one.done() for one in long), "they ran all the while"
        assert {one.result() for one in long} == {tokens}
    wait_until(lambda: len(service.named(POOL)) <= 1, "a replica is gone")


def test_pool_is_scaled_to_zero_and_comes_again(service: Service, client: openai.OpenAI) -> None:
    wait_until(lambda: service.named(POOL) == [], "the pool is scaled to zero")
    wait_until(lambda: len(service.named(GATEWAY)) == 1, "one gateway is left")
    assert stream(client, 3) == 3
