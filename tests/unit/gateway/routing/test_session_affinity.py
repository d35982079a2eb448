"""Finding and recording sessions, alone and with a store that is shared, slow or away."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import numpy as np
import orjson
import pytest

from service.broker.pool_state import PoolStateTable, PoolView
from service.broker.selection import select
from service.config import Config
from service.config.sessions import SessionsConfig
from service.engine.engine_interface import Message
from service.errors import StoreUnavailableError
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.request_record import RequestRecord
from service.gateway.routing.candidate_planner import selection_request
from service.gateway.routing.routing_setup import RoutingSetup
from service.gateway.routing.session_affinity import NO_SESSION, SessionService
from service.gateway.routing.session_memory import SessionMemory
from service.rpc.snapshot import ExpertState, Queue, Snapshot, Speed
from service.store.volatile_store import MemoryVolatileStore
from service.types import Residency, Tenant
from tests.support.polling import until

CHAT = "/v1/chat/completions"
FIRST = [{"role": "user", "content": "Look it up."}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function"}]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "42"}
SECOND = [*FIRST, CALL, RESULT]


class Clock:
    now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def service(
    store: Any = None, *, clock: Any = time.time, shared: bool = False, **config: Any
) -> SessionService:
    given = SessionsConfig(**{"max_wait_ms": 1000, **config})
    kept = MemoryVolatileStore(10**6) if store is None else store
    return SessionService(given, SessionMemory(), kept, shared=shared, clock=clock)


def asked(
    messages: Any = FIRST,
    tenant: str = "t",
    path: str = CHAT,
    session: str | None = None,
    **more: Any,
) -> InferenceRequest:
    headers = {} if session is None else {b"x-session-id": session.encode()}
    field = "messages" if path != "/v1/responses" else "input"
    body = orjson.dumps({"model": "auto", "max_tokens": 9, field: messages, **more})
    return parse_request(path, body, headers, 1000, Tenant(tenant))


async def answer(
    sessions: SessionService, request: InferenceRequest, expert: str = "a", reply: Any = None
) -> None:
    """Let an expert answer, as a whole reply or as the events of a stream."""
    record = RequestRecord(expert=expert, recipe=expert, pool="boot", category="math")
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    watched = sessions.watch(await sessions.find(request), record, send)
    kind = b"application/json"
    bodies = [orjson.dumps(reply or {"choices": [{"message": {"content": "x"}}]})]
    if isinstance(reply, list):
        kind = b"text/event-stream; charset=utf-8"
        bodies = [b"data: " + orjson.dumps(event) + b"\n\n" for event in reply]
    head = {"status": 200, "headers": [(b"content-type", kind)]}
    await watched({"type": "http.response.start", **head})
    for body in bodies:
        await watched({"type": "http.response.body", "body": body, "more_body": True})
    await watched({"type": "http.response.body", "body": b"", "more_body": False})
    assert b"".join(one.get("body", b"") for one in sent) == b"".join(bodies)


async def last(sessions: SessionService, request: InferenceRequest) -> tuple[str | None, bool]:
    found = await sessions.find(request)
    return (None if found.last is None else found.last.expert), found.certain


CALLS = [
    {"choices": [{"message": CALL}]},
    [{"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "c1"}]}}]}, {"choices": []}],
]


@pytest.mark.parametrize("reply", CALLS)
async def test_sessions_result_finds_the_expert_of_its_call(reply: Any) -> None:
    sessions = service()
    await answer(sessions, asked(), "a", reply)
    # Another conversation began in the same words.
    await answer(sessions, asked([*FIRST, {"role": "assistant", "content": "x"}, *FIRST]), "b")
    assert await last(sessions, asked(SECOND)) == ("a", True)
    found = await sessions.find(asked(SECOND))
    assert found.state.open
    assert found.last is not None
    assert (found.last.boot, found.last.category, found.last.recipe) == ("boot", "math", "a")


@pytest.mark.parametrize(
    "name", [{"session": "mine"}, {"prompt_cache_key": "mine"}, {}], ids=["header", "key", "start"]
)
async def test_sessions_are_the_tenant_s_own(name: dict[str, str]) -> None:
    sessions = service()
    await answer(sessions, asked(tenant="a", **name), "a", CALLS[0])
    await answer(sessions, asked(tenant="b", **name), "b", CALLS[0])
    assert await last(sessions, asked(SECOND, tenant="a", **name)) == ("a", True)
    assert await last(sessions, asked(SECOND, tenant="b", **name)) == ("b", True)
    assert await last(sessions, asked(SECOND, tenant="c", **name)) == (None, False)


async def test_sessions_named_one_goes_on_where_the_beginning_is_cut_off() -> None:
    sessions = service()
    await answer(sessions, asked(session="s"), "a")
    later = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "Why?"}]
    assert await last(sessions, asked(later, session="s")) == ("a", False)
    assert await last(sessions, asked(later)) == (None, False)
    # The header counts more than the body's key.
    key = {"prompt_cache_key": "s"}
    assert await last(sessions, asked(later, **key)) == (None, False)
    assert await last(sessions, asked(later, session="s", **key)) == ("a", False)
    # Behind HAProxy the header has another name.
    body = orjson.dumps({"messages": later})
    renamed = parse_request(CHAT, body, {b"x-coe-session-id": b"s"}, 1000, Tenant("t"))
    assert await last(sessions, renamed) == ("a", False)


async def test_sessions_call_is_found_by_its_id_where_the_session_has_forgotten_it() -> None:
    sessions = service()
    await answer(sessions, asked(), "a", CALLS[0])
    for i in range(50):
        # As many agents begin in the same words.
        other = {"role": "assistant", "tool_calls": [{"id": f"other-{i}", "type": "function"}]}
        turns = [*FIRST, {"role": "assistant", "content": f"{i}"}, *FIRST]
        await answer(sessions, asked(turns), "b", {"choices": [{"message": other}]})
    assert await last(sessions, asked(SECOND)) == ("a", True)
    assert await last(sessions, asked(SECOND, tenant="other")) == (None, False)
    # Once the result was answered, nothing is kept of the call.
    await answer(sessions, asked(SECOND), "a")
    assert await last(sessions, asked([RESULT], session="new")) == (None, False)


async def test_sessions_conversation_that_begins_has_no_last_turn_unless_it_is_named() -> None:
    sessions = service()
    for name in ({}, {"session": "s"}):
        await answer(sessions, asked(**name), "a")
    assert await last(sessions, asked()) == (None, False)
    assert await last(sessions, asked(session="s")) == ("a", False)


@pytest.mark.parametrize(
    "path",
    ["/v1/messages/count_tokens", "/v1/responses/input_tokens", "/v1/embeddings", "/tokenize"],
)
async def test_sessions_are_of_endpoints_that_converse_only(path: str) -> None:
    body = orjson.dumps({"messages": FIRST, "input": "x"})
    request = parse_request(path, body, {b"x-session-id": b"s"}, 1000)
    assert await service().find(request) is NO_SESSION


async def test_sessions_disabled_find_and_record_nothing() -> None:
    sessions = service(enabled=False)
    await answer(sessions, asked(session="s"), "a", CALLS[0])
    assert await sessions.find(asked(SECOND, session="s")) is NO_SESSION


async def test_sessions_are_forgotten_by_age_and_number() -> None:
    clock = Clock()
    sessions = service(clock=clock, max_age_s=60, max_sessions=2)
    for name in ("one", "two", "three"):
        await answer(sessions, asked(session=name), "a")
    assert await last(sessions, asked(session="one")) == (None, False)
    assert await last(sessions, asked(session="three")) == ("a", False)
    clock.now_s += 61
    assert await last(sessions, asked(session="three")) == (None, False)


async def test_sessions_error_reply_is_no_turn() -> None:
    sessions = service()

    async def send(message: Message) -> None:
        pass

    found = await sessions.find(asked(session="s"))
    watched = sessions.watch(found, RequestRecord(expert="a"), send)
    await watched({"type": "http.response.start", "status": 503, "headers": []})
    await watched({"type": "http.response.body", "body": b'{"error": {}}'})
    assert await last(sessions, asked(session="s")) == (None, False)


async def test_sessions_two_gateways_share_turns_in_both_directions() -> None:
    store = MemoryVolatileStore(10**6)
    one, two = service(store, shared=True), service(store, shared=True)
    for sessions in (one, two):
        await sessions.start()
    await answer(one, asked(session="s"), "a", CALLS[0])
    await until(lambda: store.size_bytes > 0, "the turn is written")
    assert await last(two, asked(SECOND, session="s")) == ("a", True)
    # Two conversations of one session, each by another gateway: both turns stay.
    other = [{"role": "user", "content": "Another matter."}]
    await answer(two, asked(other, session="s"), "b")
    before = store.size_bytes
    await until(lambda: store.size_bytes != before, "the second turn is written")
    assert await last(one, asked([*other, {"role": "assistant"}, *FIRST], session="s")) == (
        "b",
        True,
    )
    assert await last(service(store, shared=True), asked(SECOND, session="s")) == ("a", True)
    for sessions in (one, two):
        await sessions.stop()


async def test_sessions_forgotten_for_number_leave_the_store() -> None:
    store = MemoryVolatileStore(10**6)
    sessions = service(store, shared=True, max_sessions=1)
    await sessions.start()
    for i in range(20):
        await answer(sessions, asked(session=str(i)), "a")
    await sessions.stop()
    reader = service(store, shared=True)
    found = [await last(reader, asked(session=str(i))) for i in range(20)]
    assert found == [(None, False)] * 19 + [("a", False)]


class BadStore(MemoryVolatileStore):
    """A store that never answers, or that fails at once."""

    def __init__(self, *, hangs: bool) -> None:
        super().__init__(1000)
        self.hangs = hangs
        self.asked = 0

    async def get(self, name: str) -> bytes | None:
        self.asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        raise StoreUnavailableError("Redis is away")


@pytest.mark.parametrize("hangs", [True, False])
async def test_sessions_bad_store_is_no_error_and_no_wait(hangs: bool) -> None:
    store = BadStore(hangs=hangs)
    sessions = service(store, shared=True, max_wait_ms=200)
    await sessions.start()
    began_s = time.monotonic()
    for i in range(50):
        assert await last(sessions, asked(SECOND, session=str(i))) == (None, False)
    # A store that hangs is left alone for a while: 50 requests do not wait 200 ms each.
    assert time.monotonic() - began_s < 50 * 0.2 * 0.9
    if hangs:
        # Two values, the session's and the call's, and three times.
        assert store.asked <= 6
    # What this gateway knows itself needs no store.
    await answer(sessions, asked(session="own"), "a", CALLS[0])
    assert await last(sessions, asked(SECOND, session="own")) == ("a", True)
    await asyncio.wait_for(sessions.stop(), 60)


CONFIG = Config.model_validate(
    {
        "experts": {
            name: {"model": "m", "quality": {"general": quality}, "price": {"prompt": 1}}
            for name, quality in (("a", 0.8), ("b", 0.7), ("c", 0.4))
        },
        "router": {"artifact": "none"},
        "pools": {"p": {"engine": "simulated"}},
    }
)


def loaded(waits: tuple[int, ...]) -> list[PoolView]:
    """Pools of one expert each, with so many requests before a new one."""
    return [
        PoolView(
            name,
            Snapshot(
                boot=name,
                kind="p",
                experts={name: ExpertState(Residency.DEVICE)},
                queues={name: Queue(waiting, 1)},
                speeds={name: Speed(0.1, 0.02, 0.001)},
            ),
            0.0,
            {},
        )
        for name, waiting in zip("abc", waits, strict=True)
    ]


@pytest.mark.parametrize("name", [{}, {"session": "s"}, {"prompt_cache_key": "s"}])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses"])
async def test_sessions_first_turn_is_chosen_as_any_request_under_every_load(
    path: str, name: dict[str, str]
) -> None:
    """Only a turn after an answer is held to its expert; the first weighs queues like any other."""
    setup = RoutingSetup(CONFIG)
    table = PoolStateTable(setup.catalog.index)
    sessions, nobody = service(), service(enabled=False)
    chosen = set()
    for waits in itertools.product((0, 3, 40), repeat=3):
        request = asked(path=path, **name)
        found = []
        for kept in (sessions, nobody):
            plan = setup.planner.plan(request, session=await kept.find(request))
            wanted = selection_request(setup.cost_model, request, plan)
            found.append(select(setup.catalog, table.to_matrix(loaded(waits)), wanted))
        first, any_request = found
        assert np.array_equal(first.utility, any_request.utility)
        assert np.array_equal(first.ideal, any_request.ideal)
        assert first.session_outcome(0) is None
        chosen.add(first.best_position())
    assert len(chosen) == 3, "the load moves the choice"
