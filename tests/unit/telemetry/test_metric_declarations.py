"""Metrics: their table, their values, and the texts of several processes joined into one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from service.engine.engine_interface import EngineTimings
from service.gateway.request_metrics import GatewayMetrics
from service.gateway.request_record import RequestRecord
from service.pool.autoscaling_load import PoolLoad
from service.rpc.call_headers import Call, Times
from service.rpc.snapshot import ExpertState, Queue, Snapshot
from service.telemetry import metric_declarations as metric_table
from service.telemetry.label_values import LABELS, MAX_SERIES, OTHER
from service.telemetry.metric_declarations import METRICS
from service.telemetry.metric_types import Kind, MetricSpec, Side
from service.telemetry.metrics_registry import MetricsRegistry
from service.telemetry.pool_metrics import PoolMetrics
from service.telemetry.prometheus_exposition import join
from service.types import Residency

ROOT = Path(__file__).parents[3]
# What a name may end with: a unit, what is counted, or Prometheus' own words.
UNITS = (
    "_seconds",
    "_bytes",
    "_batches",
    "_entries",
    "_ratio",
    "_requests",
    "_pools",
    "_info",
    "_price",
    "_replicas",
)
STATES = ("_state", "_open", "_up", "_waiting", "_running", "_settlements", "_load")
OK = RequestRecord(
    arrived_s=100.0,
    category="math",
    expert="a",
    recipe="a",
    attempts=1,
    streamed=True,
    local=True,
    first_byte_at_s=100.5,
    ended_s=101.0,
    queue_ms=200.0,
    engine_ms=250.0,
    predicted_wait_s=0.1,
)
REJECTED = RequestRecord(
    recipe="single",
    outcome="over_capacity",
    fault="over_capacity",
    attempts=2,
    streamed=True,
    local=True,
)
CALL = Call("/v1/chat/completions", "a", "r", 1000, True, "g", 1)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_table_declares_each_metric_once_with_a_conventional_name() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"coe_[a-z_]+", metric.name)
        assert set(metric.labels) <= LABELS.keys(), metric.name
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        if metric.kind is not Kind.COUNTER:
            assert metric.name.endswith(UNITS + STATES), metric.name
        assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets), metric.name
        assert list(metric.buckets) == sorted(metric.buckets)
    used = {label for metric in METRICS for label in metric.labels} | {"gateway", "pool"}
    assert used == LABELS.keys()


def test_metrics_table_every_metric_is_recorded_somewhere() -> None:
    names = {
        name: value for name, value in vars(metric_table).items() if isinstance(value, MetricSpec)
    }
    assert set(names.values()) == set(METRICS)
    code = "".join(
        path.read_text()
        for path in (ROOT / "service").rglob("*.py")
        if path.parts[-2:] != ("telemetry", "metric_declarations.py")
    )
    assert {
        name for name in names if not re.search(rf"\bmetric(_declarations|_table)\.{name}\b", code)
    } == set()


def test_add_metric_of_the_other_side_raises() -> None:
    with pytest.raises(KeyError):
        MetricsRegistry(Side.GATEWAY).add(metric_table.SWAPS, 1, "a", "b", "c")
    with pytest.raises(KeyError):
        MetricsRegistry(Side.POOL).add(metric_table.REQUESTS_REJECTED, 1, "a")


def test_add_wrong_number_of_labels_raises() -> None:
    with pytest.raises(ValueError, match="expert, category, recipe, outcome"):
        MetricsRegistry(Side.GATEWAY).add(metric_table.REQUESTS, 1, "a")


def test_add_too_many_label_values_are_counted_as_other() -> None:
    registry = MetricsRegistry(Side.GATEWAY)
    for i in range(MAX_SERIES + 50):
        registry.add(metric_table.TENANT_TOKENS, 1, f"tenant {i}")
    found = [
        s for f in registry.prometheus.collect() if f.name == "coe_tenant_tokens" for s in f.samples
    ]
    assert len(found) == MAX_SERIES + 1
    assert {s.value for s in found if s.labels["tenant"] == OTHER} == {50}


def test_total_that_falls_is_treated_as_a_counter_reset() -> None:
    registry = MetricsRegistry(Side.POOL)
    seen = []
    # A part of it, which had counted 3, goes away.
    for value in (2, 5, 5, 2, 4):
        registry.total(metric_table.CANARY_FAILURES, value)
        seen.append(registry.value(metric_table.CANARY_FAILURES))
    assert seen == [2, 5, 5, 5, 7]


async def test_request_finished_counts_the_request_once_with_its_times() -> None:
    metrics = GatewayMetrics()
    metrics.request_started()
    metrics.request_finished(OK)
    metrics.request_started()
    metrics.request_finished(REJECTED)
    assert metrics.in_flight == 0
    got = samples(await metrics.text({"gateway": "g"}))
    mine = ("gateway", "g")
    labels = (("category", "math"), ("expert", "a"), mine, ("outcome", "ok"), ("recipe", "single"))
    assert got["coe_requests_total", labels] == 1
    assert got["coe_requests_rejected_total", (mine, ("reason", "over_capacity"))] == 1
    assert got["coe_time_to_first_token_seconds_sum", (("expert", "a"), mine)] == 0.5
    assert got["coe_request_duration_seconds_count", (("expert", "a"), mine)] == 1
    # Half a second to the first byte, of which 0.2 in the queue and 0.25 in the engine.
    assert got["coe_gateway_overhead_seconds_sum", (mine,)] == pytest.approx(0.05)
    assert got["coe_in_flight_requests", (mine,)] == 0


@pytest.mark.parametrize(
    ("predicted_wait_s", "under_s", "over_s"),
    [(0.05, 0.15, None), (0.2, None, 0.0), (1.0, None, 0.8)],
)
async def test_request_finished_error_of_the_predicted_wait_has_a_direction(
    predicted_wait_s: float, under_s: float | None, over_s: float | None
) -> None:
    gateway = GatewayMetrics()
    gateway.request_started()
    gateway.request_finished(replace(OK, queue_ms=200.0, predicted_wait_s=predicted_wait_s))
    got = samples(await gateway.text({}))
    for direction, error_s in (("under", under_s), ("over", over_s)):
        name = "coe_wait_prediction_error_seconds_sum"
        found = got.get((name, (("direction", direction),)))
        assert found == (None if error_s is None else pytest.approx(error_s))


class FakePool:
    """A pool's state."""

    def snapshot(self) -> Snapshot:
        return Snapshot(
            boot="b",
            kind="cpu",
            experts={"a": ExpertState(Residency.DEVICE)},
            queues={"a": Queue(2, 1)},
        )

    def swap_counts(self) -> dict[tuple[str, str, str], int]:
        return {("a", "inplace", "queue"): 3}

    def unload_counts(self) -> dict[tuple[str, str], int]:
        return {("a", "idle"): 2}

    def canary_failures(self) -> int:
        return 1

    def details(self) -> dict[str, dict[str, object]]:
        return {"a": {"host_bytes": 7, "state": "device"}}

    def load(self) -> PoolLoad:
        return PoolLoad(offered={"a": 0.5}, backlog_s={})


async def test_pool_metrics_report_queues_residency_and_requests() -> None:
    metrics = PoolMetrics()
    metrics.follow(FakePool())
    metrics.ended(CALL, Times(1, 1.5, 2, 3, 0.5, 0.25), "")
    metrics.on_finished(EngineTimings("a", 0.125, 0.5, 2.0, 10, 5))
    for _ in range(2):
        got = samples(await metrics.text({"pool": "p"}))
    a, p = ("expert", "a"), ("pool", "p")
    assert got["coe_requests_waiting", (a, p)] == 2
    assert got["coe_requests_running", (a, p)] == 1
    assert got["coe_swaps_total", (a, ("method", "inplace"), p, ("reason", "queue"))] == 3
    assert got["coe_unloads_total", (a, p, ("reason", "idle"))] == 2
    assert got["coe_canary_failures_total", (p,)] == 1
    assert got["coe_expert_weight_bytes", (a, p, ("tier", "device"))] == 7
    assert got["coe_expert_weight_bytes", (a, p, ("tier", "host"))] == 0
    assert got["coe_offered_load", (a, p)] == 0.5
    assert got["coe_backlog_seconds", (a, p)] == 0
    assert got["coe_queue_seconds_sum", (a, p)] == 0.5
    assert got["coe_swap_wait_seconds_sum", (a, p)] == 0.25
    assert got["coe_engine_queue_seconds_sum", (a, p)] == 0.125
    assert got["coe_prefill_seconds_sum", (a, p)] == 0.5
    assert got["coe_decode_seconds_sum", (a, p)] == 2
    assert got["coe_inter_token_latency_seconds_sum", (a, p)] == 0.5
    assert got["coe_tokens_total", (a, p, ("type", "completion"))] == 5
    states = {
        dict(labels)["state"]: value
        for (name, labels), value in got.items()
        if name == "coe_expert_state"
    }
    assert states == {state.value: float(state is Residency.DEVICE) for state in Residency}


async def test_pool_metrics_of_a_removed_expert_disappear() -> None:
    class Emptied(FakePool):
        """The same pool, once its config has changed."""

        gone = False

        def snapshot(self) -> Snapshot:
            whole = super().snapshot()
            return replace(whole, experts={}, queues={}) if self.gone else whole

        def details(self) -> dict[str, dict[str, object]]:
            return {} if self.gone else super().details()

    metrics, pool = PoolMetrics(), Emptied()
    metrics.follow(pool)
    assert any("expert" in dict(labels) for _, labels in samples(await metrics.text({"pool": "p"})))
    pool.gone = True
    gauges = {metric.name for metric in METRICS if metric.kind is Kind.GAUGE}
    left = samples(await metrics.text({"pool": "p"}))
    assert [name for name, labels in left if name in gauges and "expert" in dict(labels)] == []


async def test_pool_metrics_engine_registry_survives_another_engine_s_start() -> None:
    metrics = PoolMetrics()
    for expert in ("a", "b"):
        Gauge(
            "engine_tokens", "Tokens.", ("model",), registry=metrics.engine_registry(expert)
        ).labels("m").set(1)
    got = samples(await metrics.text({"pool": "p"}))
    for expert in ("a", "b"):
        assert got["engine_tokens", (("expert", expert), ("model", "m"), ("pool", "p"))] == 1
    # A new engine for an expert: only that one's begin anew.
    assert isinstance(metrics.engine_registry("a"), CollectorRegistry)
    got = samples(await metrics.text({"pool": "p"}))
    assert [dict(labels)["expert"] for name, labels in got if name == "engine_tokens"] == ["b"]


async def test_join_of_several_texts_has_each_family_once() -> None:
    texts = []
    for name in ("one", "two"):
        metrics = GatewayMetrics()
        metrics.request_finished(OK)
        texts.append(await metrics.text({"gateway": name}))
    text = join([*texts, ""])
    got = samples(text)
    for metric in METRICS:
        assert text.count(f"# TYPE {metric.name} ") == (metric.side is not Side.POOL), metric.name
    assert got == samples(texts[0]) | samples(texts[1])
    assert join([]) == ""
