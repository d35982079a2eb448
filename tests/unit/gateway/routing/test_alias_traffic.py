"""What counts as a failure of an alias's target, and roll-backs that gateways share."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.broker.alias_rollback import AliasOutcome
from service.broker.model_aliases import AliasChoice
from service.config import Config
from service.engine.engine_interface import Message
from service.errors import StoreUnavailableError, UnknownModelError
from service.gateway.request_record import RequestRecord
from service.gateway.routing import alias_traffic
from service.gateway.routing.alias_traffic import AliasTraffic, RefusalSend, outcome_of
from service.store.volatile_store import MemoryVolatileStore
from service.telemetry import metric_declarations
from service.telemetry.metric_types import Side
from service.telemetry.metrics_registry import MetricsRegistry
from tests.support.polling import until

CONFIG = Config.model_validate(
    {
        "experts": {"old": {"model": "m"}, "new": {"model": "n"}},
        "pools": {"cpu": {"engine": "simulated"}},
        "aliases": {"prod": {"old": 9, "new": 1}, "fixed": "old"},
    }
)
NEW = AliasChoice("prod", "new", "prod")


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        self.now_s += 1e-3
        return self.now_s


def traffic(
    store: Any = None, *, shared: bool = False, clock: Any = None, after: AliasTraffic | None = None
) -> AliasTraffic:
    registry = MetricsRegistry(Side.GATEWAY)
    kept = MemoryVolatileStore(10**6) if store is None else store
    clock = clock or Clock()
    return AliasTraffic(CONFIG, registry, kept, shared=shared, clock=clock, after=after)


def ended(status: int = 200, outcome: str = "ok", attempts: int = 1, **more: Any) -> RequestRecord:
    record = RequestRecord(status=status, outcome=outcome, attempts=attempts, alias=NEW, **more)
    record.finish()
    return record


def fail(one: AliasTraffic) -> None:
    for _ in range(CONFIG.aliases["prod"].rollback.min_requests):
        one.finished(ended(503, "engine_dead"))


@pytest.mark.parametrize(
    ("record", "outcome"),
    [
        (ended(), "ok"),
        (ended(refused=True), "refused"),
        (ended(attempts=0), "uncounted"),  # from the cache
        (ended(503, "over_capacity"), "error"),
        (ended(502, "upstream_error"), "error"),
        (ended(200, "engine_dead"), "error"),  # in a stream
        (ended(504, "deadline_exceeded"), "error"),
        (ended(504, "deadline_exceeded", own_deadline=True), "uncounted"),
        (ended(200, "client_gone"), "uncounted"),
        (ended(400), "refused"),
        (ended(400, "invalid_request_error", attempts=0), "refused"),
        (ended(400, "infeasible_bounds", attempts=0), "uncounted"),
        (ended(403, "forbidden", attempts=0), "uncounted"),
        (ended(429, "insufficient_quota", attempts=0), "uncounted"),
    ],
)
def test_outcome_blames_the_target_only(record: RequestRecord, outcome: str) -> None:
    assert outcome_of(record) is AliasOutcome(outcome)


REFUSALS: list[Any] = [
    {"choices": [{"message": {"refusal": "I can't."}, "finish_reason": "stop"}]},
    {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]},
    {"type": "message", "content": [], "stop_reason": "refusal"},
    {"output": [{"content": [{"type": "refusal", "refusal": ""}]}]},
    {"type": "response.refusal.delta", "delta": "I"},
    {"response": {"incomplete_details": {"reason": "content_filter"}}},
]
ANSWERS: list[Any] = [
    {"choices": [{"message": {"content": "a refusal", "refusal": None}, "finish_reason": "stop"}]},
    {"choices": [{"message": {"content": 'say {"finish_reason": "content_filter"}'}}]},
    {"choices": [{"message": {"content": "", "refusal": ""}}]},
    {
        "type": "message",
        "content": [{"text": '"stop_reason":"refusal"'}],
        "stop_reason": "end_turn",
    },
]


@pytest.mark.parametrize(
    ("reply", "refused"), [*((r, True) for r in REFUSALS), *((a, False) for a in ANSWERS)]
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
async def test_refusals_are_found_however_the_answer_is_cut(
    reply: Any, refused: bool, separators: tuple[str, str]
) -> None:
    body = json.dumps(reply, separators=separators).encode()
    for size in (1, 7, len(body)):
        record, sent = RequestRecord(), []

        async def send(message: Message, into: list[Message] = sent) -> None:
            into.append(message)

        watched = RefusalSend(record, send)
        await watched({"type": "http.response.start", "status": 200, "headers": []})
        for at in range(0, len(body), size):
            await watched({"type": "http.response.body", "body": body[at : at + size]})
        assert record.refused is refused
        assert b"".join(one.get("body", b"") for one in sent) == body


def test_watch_leaves_answers_alone_that_nobody_compares() -> None:
    async def send(_: Message) -> None: ...

    one = traffic()
    for alias in (None, AliasChoice("fixed", "old")):
        assert one.watch(RequestRecord(alias=alias), send) is send
    assert one.watch(RequestRecord(alias=NEW), send) is not send


def test_rollback_is_told_in_metrics_and_undone(caplog: pytest.LogCaptureFixture) -> None:
    one = traffic()
    registry = one._registry
    one.finished(ended())
    fail(one)
    assert list(one.left_out("prod")) == ["new"]
    assert one.left_out("fixed") == one.left_out(None) == ()
    assert "target new was rolled back: 98.0% errors in 50 requests, beside 0.0%" in caplog.text
    one.refresh_metrics()
    value = registry.value
    assert value(metric_declarations.ALIAS_ROLLED_BACK, "prod", "new") == 1
    assert value(metric_declarations.ALIAS_ROLLED_BACK, "prod", "old") == 0
    assert value(metric_declarations.ALIAS_ROLLBACKS, "prod", "new", "errors") == 1
    assert value(metric_declarations.ALIAS_REQUESTS, "prod", "new", "error") == 50
    assert one.to_json()["prod"]["new"]["rolled_back"]["reason"] == "errors"
    assert one.restore("prod") == ["new"]
    one.refresh_metrics()
    assert value(metric_declarations.ALIAS_ROLLED_BACK, "prod", "new") == 0
    with pytest.raises(UnknownModelError, match="no alias 'fixed' shares requests; those that do"):
        one.restore("fixed")


async def test_rollbacks_and_restores_reach_other_gateways(monkeypatch: Any) -> None:
    monkeypatch.setattr(alias_traffic, "_FOLLOW_S", 0.01)
    store, clock = MemoryVolatileStore(10**6), Clock()
    first, second = (traffic(store, shared=True, clock=clock) for _ in range(2))
    for one in (first, second):
        await one.start(anew=False)
    fail(first)
    await until(lambda: list(second.left_out("prod")) == ["new"], "the other gateway follows")
    # A gateway that starts later knows it as well.
    third = traffic(store, shared=True, clock=clock)
    await third.start(anew=False)
    assert list(third.left_out("prod")) == ["new"]
    second.restore("prod")
    await until(lambda: not first.left_out("prod") and not third.left_out("prod"), "all restore")
    fail(third)
    await until(lambda: list(first.left_out("prod")) == ["new"], "the first follows")
    # A config that was read again begins anew, everywhere.
    successor = traffic(store, shared=True, clock=clock)
    await successor.start(anew=True)
    await until(lambda: not first.left_out("prod") and not second.left_out("prod"), "all restore")
    for one in (first, second, third, successor):
        await one.stop()


class Broken(MemoryVolatileStore):
    value: bytes | None = None

    async def get(self, name: str) -> bytes | None:
        if self.value is None:
            raise StoreUnavailableError("away")
        return self.value

    async def put(self, name: str, value: bytes, *, ttl_s: float) -> None:
        raise StoreUnavailableError("away")


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"no",
        b"[]",
        b'{"at_s": "x"}',
        b'{"at_s": 9e9, "rolled_back": [1]}',
        b'{"at_s": 9e9, "rolled_back": {"new": {"a": 1}}}',
    ],
)
async def test_rollback_works_alone_where_the_store_is_away_or_wrong(value: bytes | None) -> None:
    store = Broken(10**6)
    store.value = value
    one = traffic(store, shared=True)
    await one.start(anew=False)
    fail(one)
    await one._read_all()
    assert list(one.left_out("prod")) == ["new"]
    await one.stop()


def test_rollback_goes_on_where_only_added_experts_differ() -> None:
    first = traffic()
    fail(first)
    assert first.left_out("prod")
    assert not traffic().left_out("prod")
    assert traffic(after=first).left_out("prod") == first.left_out("prod")
