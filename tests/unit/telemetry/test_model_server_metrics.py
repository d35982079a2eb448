"""The load of a model server: of one pool, of several, and as text."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from service.rpc.snapshot import ExpertState, Queue, Snapshot
from service.telemetry.model_server_metrics import ModelServerLoad
from service.types import Residency

NAMES = st.lists(st.sampled_from(["a", "law", "org/law:2", "A.b-c_d"]), unique=True)
LOADS = st.builds(
    ModelServerLoad,
    waiting=st.integers(0, 10**6),
    running=st.integers(0, 10**6),
    kv_usage=st.floats(0, 1),
    max_lora=st.integers(0, 512),
    ready_adapters=NAMES.map(tuple),
    waiting_adapters=NAMES.map(tuple),
)


def families(load: ModelServerLoad, now_s: float = 7.5) -> dict[str, tuple[str, list[object]]]:
    return {
        family.name: (family.type, list(family.samples))
        for family in text_string_to_metric_families(load.text(now_s))
    }


@settings(max_examples=30)
@given(LOADS)
def test_text_has_one_gauge_of_each_kind(load: ModelServerLoad) -> None:
    found = families(load)
    expected = {"num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"}
    expected |= {"lora_requests_info"} if load.max_lora else set()
    assert found.keys() == {f"vllm:{name}" for name in expected}
    for kind, samples in found.values():
        assert kind == "gauge"
        assert len(samples) == 1
    (usage,) = found["vllm:kv_cache_usage_perc"][1]
    assert usage.value == load.kv_usage  # type: ignore[attr-defined]
    if load.max_lora:
        (info,) = found["vllm:lora_requests_info"][1]
        assert info.value == 7.5  # type: ignore[attr-defined]
        assert info.labels == {  # type: ignore[attr-defined]
            "max_lora": str(load.max_lora),
            "running_lora_adapters": ",".join(load.ready_adapters),
            "waiting_lora_adapters": ",".join(load.waiting_adapters),
        }


@settings(max_examples=30)
@given(LOADS)
def test_wire_keeps_everything(load: ModelServerLoad) -> None:
    assert ModelServerLoad.from_wire(orjson.loads(orjson.dumps(load.to_wire()))) == load


@settings(max_examples=30)
@given(st.lists(LOADS, max_size=4))
def test_sum_counts_requests_and_takes_the_fullest_cache(loads: list[ModelServerLoad]) -> None:
    total = ModelServerLoad.sum_of(loads)
    assert total.waiting == sum(load.waiting for load in loads)
    assert total.running == sum(load.running for load in loads)
    assert total.kv_usage == max([0.0, *(load.kv_usage for load in loads)])
    assert set(total.ready_adapters) == {name for load in loads for name in load.ready_adapters}
    assert len(total.ready_adapters) == len(set(total.ready_adapters))


@pytest.mark.parametrize(
    ("state", "waiting", "ready", "waits"),
    [
        (Residency.DEVICE, 0, True, False),
        (Residency.DEVICE, 2, True, True),
        (Residency.LOADING, 0, False, True),
        (Residency.DISK, 0, False, False),
        (Residency.FAILED, 0, False, False),
    ],
)
def test_adapter_is_ready_where_it_answers_and_waits_where_it_is_asked_for(
    state: Residency, waiting: int, ready: bool, waits: bool
) -> None:
    queues = {"base": Queue(waiting=1, running=3), "law": Queue(waiting=waiting, running=1)}
    states = {"base": ExpertState(Residency.DEVICE), "law": ExpertState(state)}
    snapshot = Snapshot("boot", "p", experts=states, queues=queues)
    load = ModelServerLoad.of_pool(snapshot, ["law", "gone"], 4, 0.5)
    assert (load.waiting, load.running) == (1 + waiting, 4)
    assert load.ready_adapters == (("law",) if ready else ())
    assert load.waiting_adapters == (("law",) if waits else ())
