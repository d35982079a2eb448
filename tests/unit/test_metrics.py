"""Metrics: what is counted, and several processes' texts joined into one."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from service.link.snapshot import ExpertState, Queue, Snapshot
from service.telemetry.metrics import GatewayMetrics, join
from service.telemetry.pool_metrics import PoolCollector, pool_text
from service.types import Residency

POOL = """# HELP vllm_tokens Tokens.
# TYPE vllm_tokens counter
vllm_tokens_total{model="m"} 3.0
# HELP coe_queue_requests Waiting.
# TYPE coe_queue_requests gauge
coe_queue_requests{expert="a"} 2.0
"""


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_each_pool_s_samples_are_kept_apart() -> None:
    metrics = GatewayMetrics()
    metrics.requests.labels("a", "math", "ok").inc()
    text = join(metrics.text(), [("cpu-1", POOL), ("cpu-2", POOL)])
    got = samples(text)
    for pool in ("cpu-1", "cpu-2"):
        assert got["coe_queue_requests", (("expert", "a"), ("pool", pool))] == 2
        assert got["vllm_tokens_total", (("model", "m"), ("pool", pool))] == 3
    labels = (("category", "math"), ("expert", "a"), ("outcome", "ok"))
    assert got["coe_requests_total", labels] == 1
    # One description each, or Prometheus refuses the whole text.
    assert text.count("# TYPE coe_queue_requests") == 1


def test_a_family_that_gateway_and_pool_share_is_one() -> None:
    own = GatewayMetrics()
    own.in_flight.set(3)
    other = GatewayMetrics()
    other.in_flight.set(5)
    got = samples(join(own.text(), [("p", other.text())]))
    assert got["coe_in_flight_requests", ()] == 3
    assert got["coe_in_flight_requests", (("pool", "p"),)] == 5


def test_a_pool_tells_its_queues_and_residency() -> None:
    snapshot = Snapshot(
        boot="b",
        kind="cpu",
        experts={"a": ExpertState(Residency.DEVICE)},
        queues={"a": Queue(2, 1)},
    )
    got = samples(pool_text(PoolCollector(lambda: snapshot, dict, lambda: 0, dict)).decode())
    assert got["coe_queue_requests", (("expert", "a"),)] == 2
    assert got["coe_running_requests", (("expert", "a"),)] == 1
    states = {
        dict(labels)["state"]: value
        for (name, labels), value in got.items()
        if name == "coe_residency"
    }
    assert states == {state.value: float(state is Residency.DEVICE) for state in Residency}
