"""Stored responses, driven by OpenAI's own client, with a simulated pool behind the gateway."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, patch

import openai
import pytest

from service.config import Config
from service.errors import StorageFullError, StoreUnavailableError
from service.gateway.request import stored_turn
from service.gateway.request.body_limits import RequestLimitChecker
from service.gateway.request.request_intake import RequestIntake
from service.http.asgi_helpers import read_body
from service.store.api_keys import digest_of
from service.stored_responses.sqlite_responses import SqliteResponses
from tests.support.in_process_service import (
    ADMIN_KEY,
    RunningGateway,
    run_gateway,
    serving,
    simulated,
)
from tests.support.polling import until
from tests.support.redis_server import redis_server

KEY, OTHER = "a-key-of-the-tests-a", "a-key-of-the-tests-b"
PATH = "/v1/responses"
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "stored-responses.md"
SHOWN_KEY = {"authorization": f"Bearer {KEY}"}


def config(tmp_path: Path, **given: Any) -> Config:
    responses = {"enabled": True, "folder": str(tmp_path / "kept"), **given.pop("responses", {})}
    keys = {
        "a": {"tenant": "acme", "sha256": digest_of(KEY)},
        "b": {"tenant": "other", "sha256": digest_of(OTHER)},
    }
    pool = {"tokens": 4, **given.pop("pool", {})}
    return simulated({"cpu": pool}, **{"responses": responses, "keys": keys, **given})


def client(s: RunningGateway, key: str = KEY) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=s.url + "/v1", api_key=key, max_retries=0)


def asked(s: RunningGateway) -> list[dict[str, Any]]:
    """The bodies that the engine got."""
    return [json.loads(request.body) for request in s.pools["cpu"].engine.asked]


async def test_conversation_goes_on_from_a_stored_response(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        first = await api.responses.create(model="general", input="one", instructions="Be brief.")
        assert first.id.startswith("resp_")
        assert len(first.id) > 40
        second = await api.responses.create(
            model="general", input="two", previous_response_id=first.id
        )
        third = await api.responses.create(
            model="general",
            input=[{"role": "user", "content": [{"type": "input_text", "text": "three"}]}],
            previous_response_id=second.id,
            store=False,
        )
        got = asked(s)
        kept = await api.responses.retrieve(second.id)
        items = await api.responses.input_items.list(second.id, order="asc", limit=2)
        every = [item async for item in items]
        newest = await api.responses.input_items.list(second.id, limit=1)
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(third.id)
    assert first.previous_response_id is None
    assert (second.previous_response_id, third.previous_response_id) == (first.id, second.id)
    assert all("previous_response_id" not in body and body["store"] is False for body in got)
    # Items are as the client and the expert wrote them; instructions are not inherited.
    said = [item.model_dump(exclude_unset=True) for item in first.output]
    one, two = ({"role": "user", "content": text} for text in ("one", "two"))
    assert got[0]["input"] == "one"
    assert got[1]["input"] == [one, *said, two]
    assert [body.get("instructions") for body in got] == ["Be brief.", None, None]
    assert got[2]["input"][:-1] == [
        *got[1]["input"],
        *(item.model_dump(exclude_unset=True) for item in second.output),
    ]
    assert kept.output == second.output
    assert (kept.id, kept.status, kept.usage) == (second.id, "completed", second.usage)
    assert [item.type for item in every] == ["message"] * 3
    assert every[0].content[0].text == "one"  # type: ignore[union-attr]
    assert len({item.id for item in every}) == 3
    assert newest.data[0].id == every[-1].id


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_of_the_cache_is_stored_under_an_id_of_its_own(
    tmp_path: Path, stream: bool
) -> None:
    tenants = {"acme": {"cache": {"mode": "exact"}}, "other": {}}
    found = []
    async with run_gateway(config(tmp_path, tenants=tenants)) as s, client(s) as api:
        for _ in range(2):
            reply = await api.responses.create(
                model="general",
                input="one",
                stream=stream,
                extra_headers={"x-coe-cache": "exact"},
            )
            if isinstance(reply, openai.AsyncStream):
                reply = [event async for event in reply][-1].response  # type: ignore[union-attr]
            found.append(await api.responses.retrieve(reply.id))
        assert len(asked(s)) == 1
    assert found[0].id != found[1].id
    assert found[0].output == found[1].output


async def test_large_bodies_are_read_and_written_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bool]] = {}

    def spied(owner: Any, name: str, size: Callable[..., int]) -> None:
        before = getattr(owner, name)

        def spy(*given: Any, **more: Any) -> Any:
            if size(*given) > 200_000:
                on_loop = threading.current_thread() is threading.main_thread()
                seen.setdefault(name, set()).add(on_loop)
            return before(*given, **more)

        monkeypatch.setattr(owner, name, spy)

    spied(RequestLimitChecker, "shape", lambda _, raw, *rest: len(raw))
    spied(RequestIntake, "parse", lambda _, path, raw, *rest: len(raw))
    spied(stored_turn, "_written", lambda data, before, own: len(str([*before, *own])))
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        first = await api.responses.create(model="general", input="w" * 300_000)
        await api.responses.create(model="general", input="x", previous_response_id=first.id)
    assert seen == {"shape": {False}, "parse": {False}, "_written": {False}}


async def test_stream_is_stored_when_the_client_has_its_end(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        events = [
            event
            async for event in await api.responses.create(model="general", input="one", stream=True)
        ]
        ids = {event.response.id for event in events if hasattr(event, "response")}
        last = events[-1].response  # type: ignore[union-attr]
        kept = await api.responses.retrieve(last.id)
        cut = await api.responses.create(
            model="general", input="x", previous_response_id=last.id, max_output_tokens=1
        )
        incomplete = await api.responses.retrieve(cut.id)
        await api.responses.create(model="general", input="y", previous_response_id=cut.id)
    assert ids == {last.id}
    assert kept.output == last.output
    assert (kept.status, last.store) == ("completed", True)  # type: ignore[attr-defined]
    assert (incomplete.status, incomplete.incomplete_details.reason) == (  # type: ignore[union-attr]
        "incomplete",
        "max_output_tokens",
    )


async def test_stream_of_a_client_that_leaves_is_stored_as_cancelled(tmp_path: Path) -> None:
    held = config(tmp_path, pool={"tokens": 2000, "decode_ms": 100})
    async with run_gateway(held) as s, client(s) as api:
        body = {"model": "general", "input": "one", "stream": True}
        async with s.post(body, PATH, headers=SHOWN_KEY) as reply:
            created = json.loads((await reply.content.readuntil(b"\n\n")).split(b"data: ")[1])
        response_id = created["response"]["id"]

        metrics = s.gateway.state.metrics
        await until(
            lambda: metrics.in_flight == 0 and not s.gateway.current._keeper._storing,
            "the request ended, and its response is stored",
        )
        kept = await api.responses.retrieve(response_id)
        assert (kept.status, kept.output) == ("cancelled", [])
        with pytest.raises(openai.BadRequestError, match="its status is cancelled"):
            await api.responses.create(model="general", input="x", previous_response_id=response_id)


CALLS: dict[str, Callable[[openai.AsyncOpenAI, str], Any]] = {
    "get": lambda api, i: api.responses.retrieve(i),
    "delete": lambda api, i: api.responses.delete(i),
    "input_items": lambda api, i: api.responses.input_items.list(i),
    "cancel": lambda api, i: api.responses.cancel(i),
    "continue": lambda api, i: api.responses.create(
        model="general", input="x", previous_response_id=i
    ),
}


async def test_responses_of_other_tenants_are_unknown(tmp_path: Path) -> None:
    async with (
        run_gateway(config(tmp_path)) as s,
        client(s) as api,
        client(s, OTHER) as theirs,
    ):
        made = await api.responses.create(model="general", input="private")
        for name, call in CALLS.items():
            texts = []
            for response_id in (made.id, "resp_" + "0" * 48):
                with pytest.raises(openai.NotFoundError) as raised:
                    await call(theirs, response_id)
                assert raised.value.type == "not_found_error", name
                texts.append(str(raised.value.message).replace(response_id, "ID"))
            assert texts[0] == texts[1]
        assert (await api.responses.retrieve(made.id)).id == made.id


async def test_deleted_response_breaks_the_conversation_clearly(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        first = await api.responses.create(model="general", input="a secret of the tests")
        second = await api.responses.create(
            model="general", input="x", previous_response_id=first.id
        )
        await api.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError, match=f"{first.id} before it was deleted"):
            await api.responses.create(model="general", input="x", previous_response_id=second.id)
        items = [item async for item in await api.responses.input_items.list(second.id)]
        assert len(items) == 1
        for path in (tmp_path / "kept").iterdir():
            assert b"a secret of the tests" not in path.read_bytes()
        with pytest.raises(openai.BadRequestError, match="in the background"):
            await api.responses.cancel(second.id)
        with pytest.raises(openai.NotFoundError, match="item"):
            await api.responses.input_items.list(second.id, after="msg_0")


async def test_field_that_is_not_valid_gets_one_clear_error(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s:
        for name, value, text in (
            ("previous_response_id", 3, "must be the id"),
            ("store", "yes", "true or false"),
            ("background", True, "waits"),
        ):
            body = {"model": "general", "input": "x", name: value}
            status, _, answer = await s.ask(body, PATH, headers=SHOWN_KEY)
            assert (status, answer["error"]["param"]) == (400, name)
            assert text in answer["error"]["message"]
        async with s.get(f"{PATH}/resp_1?stream=true", headers=SHOWN_KEY) as reply:
            assert reply.status == 400


async def test_service_without_stored_responses_says_so(tmp_path: Path) -> None:
    off = config(tmp_path, responses={"enabled": False})
    async with run_gateway(off) as s:
        for name in ("previous_response_id", "conversation"):
            body = {"model": "general", "input": "x", name: "resp_1"}
            status, _, answer = await s.ask(body, PATH, headers=SHOWN_KEY)
            assert (status, answer["error"]["code"]) == (400, "not_allowed")
        body = {"model": "general", "input": "x", "store": True}
        status, _, answer = await s.ask(body, PATH, headers=SHOWN_KEY)
        assert status == 200
        async with s.get(f"{PATH}/{answer['id']}", headers=SHOWN_KEY) as reply:
            assert reply.status == 404
    assert not (tmp_path / "kept").exists()


async def test_lengths_of_conversations_are_bounded(tmp_path: Path) -> None:
    bounded = config(
        tmp_path,
        responses={"max_chain": 2, "tenant_entries": 4},
        server={"max_body_bytes": 3000},
    )
    async with run_gateway(bounded) as s, client(s) as api:
        at: str | None = None
        ids = []
        for _ in range(3):
            made = await api.responses.create(model="general", input="x", previous_response_id=at)
            at = made.id
            ids.append(at)
        with pytest.raises(openai.BadRequestError, match="more than 2 responses"):
            await api.responses.create(model="general", input="x", previous_response_id=at)
        long = await api.responses.create(model="general", input="y" * 2500)
        with pytest.raises(openai.APIStatusError, match="3000 bytes") as raised:
            await api.responses.create(
                model="general", input="z" * 2500, previous_response_id=long.id
            )
        assert raised.value.status_code == 413
        # The oldest make room.
        await api.responses.create(model="general", input="x")
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(ids[0])
        async with s.get("/metrics", headers={"authorization": f"Bearer {ADMIN_KEY}"}) as reply:
            lines = (await reply.text()).splitlines()
    found = {
        line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("coe_resp")
    }
    assert found["coe_responses_evicted_total"] == 1
    assert found["coe_responses_entries"] == 4
    assert found["coe_responses_stored_total"] == 5
    assert found["coe_responses_bytes"] > 0


async def test_answer_goes_out_where_it_can_t_be_stored(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        for error in (StorageFullError("full"), StoreUnavailableError("away")):
            for stream in (False, True):
                with patch.object(SqliteResponses, "add_response", AsyncMock(side_effect=error)):
                    answer: Any = await api.responses.create(
                        model="general", input="x", stream=stream
                    )
                    if stream:
                        answer = [event async for event in answer][-1].response
                assert (answer.status, answer.store) == ("completed", False)
                with pytest.raises(openai.NotFoundError, match="no response"):
                    await CALLS["continue"](api, answer.id)


async def test_delete_on_a_full_disk_is_507(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        made = await api.responses.create(model="general", input="x")

        full = AsyncMock(side_effect=StorageFullError("full"))
        with patch.object(SqliteResponses, "remove_response", full):
            async with s.client.delete(f"{s.url}{PATH}/{made.id}", headers=SHOWN_KEY) as reply:
                assert reply.status == 507
                assert (await reply.json())["error"]["code"] == "storage_full"
        assert (await api.responses.retrieve(made.id)).id == made.id


class Agent:
    """A server of Responses that thinks, calls a tool, and gives the same ids every time."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads(await read_body(receive, 10**6))
        self.bodies.append(body)
        reply = {"id": "resp_0", "object": "response", "status": "completed", "output": OUTPUT}
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(reply).encode()})


OUTPUT: list[dict[str, Any]] = [
    {"id": "rs_0", "type": "reasoning", "summary": [], "encrypted_content": "gAAAx=="},
    {"id": "fc_0", "type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
]
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "low"}


@asynccontextmanager
async def agent_service(tmp_path: Path) -> AsyncIterator[tuple[RunningGateway, Agent]]:
    agent = Agent()
    async with serving(agent) as served:
        experts = {
            name: {
                "remote": {"url": served.url + "/v1", "model": name},
                "price": {"prompt": 1, "completion": 1},
                "capabilities": ["chat", "tools", "vision"],
            }
            for name in ("one", "two")
        }
        data = config(tmp_path, experts={"general": {"model": "m"}, **experts})
        async with run_gateway(data) as s:
            yield s, agent


async def test_reasoning_tool_calls_and_images_are_kept_as_they_are(tmp_path: Path) -> None:
    asks = {"role": "user", "content": [{"type": "input_text", "text": "What is it?"}, IMAGE]}
    result = {"type": "function_call_output", "call_id": "c1", "output": "a cat"}
    async with agent_service(tmp_path) as (s, agent):
        body = {"model": "one", "input": [asks], "coe": {"deadline_ms": 60_000}}
        _, _, first = await s.ask(body, PATH, headers=SHOWN_KEY)
        again = {
            "model": "auto",
            "input": [result],
            "previous_response_id": first["id"],
            "coe": {"allow": ["one", "two"]},
        }
        status, headers, second = await s.ask(again, PATH, headers=SHOWN_KEY)
        again["previous_response_id"] = second["id"]
        status, _, third = await s.ask(again, PATH, headers=SHOWN_KEY)
        async with s.get(f"{PATH}/{third['id']}/input_items", headers=SHOWN_KEY) as reply:
            listed = (await reply.json())["data"]
    assert status == 200
    # The tool's result goes back to the expert that called: the stored turns are one session.
    assert headers["x-coe-session"].startswith("locked")
    assert agent.bodies[1]["input"] == [asks, *OUTPUT, result]
    assert agent.bodies[2]["input"] == [asks, *OUTPUT, result, *OUTPUT, result]
    assert first["output"] == second["output"] == OUTPUT
    assert len({first["id"], second["id"], third["id"], "resp_0"}) == 4
    assert all(body["store"] is False and "coe" not in body for body in agent.bodies)
    # A server's ids may come again; each item that is listed has one of its own.
    assert len({item["id"] for item in listed}) == len(listed) == 7
    assert listed[-1] == {**asks, "type": "message", "status": "completed", "id": listed[-1]["id"]}


async def test_two_gateways_share_responses_in_redis(tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis:
        shared = config(tmp_path, store={"kind": "redis", "url": redis.url, "prefix": "t"})
        async with (
            run_gateway(shared) as a,
            run_gateway(shared) as b,
            client(a) as here,
            client(b) as there,
        ):
            first = await here.responses.create(model="general", input="one")
            second = await there.responses.create(
                model="general", input="two", previous_response_id=first.id
            )
            assert len(asked(b)[0]["input"]) == 3
            await here.responses.delete(first.id)
            with pytest.raises(openai.NotFoundError):
                await there.responses.create(
                    model="general", input="x", previous_response_id=second.id
                )
    assert not (tmp_path / "kept").exists()


async def test_responses_outlive_the_service(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        first = await api.responses.create(model="general", input="one")
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        second = await api.responses.create(
            model="general", input="two", previous_response_id=first.id
        )
        assert second.previous_response_id == first.id
        await until(lambda: len(asked(s)) == 1, "the engine was asked")
        assert len(asked(s)[0]["input"]) == 3


async def test_code_of_the_guide_runs(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    async with run_gateway(config(tmp_path, keys={})) as s:
        for block in code:
            own = block.replace("http://127.0.0.1:8000", s.url)
            ran = await asyncio.create_subprocess_exec(
                sys.executable, "-c", own, stdout=asyncio.subprocess.PIPE
            )
            out, _ = await ran.communicate()
            assert ran.returncode == 0
            assert out.strip()
    assert code
