"""Conversations, driven by OpenAI's own client, with a simulated pool behind the gateway."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, patch

import openai
import pytest

from service.errors import StorageFullError
from service.stored_responses.sqlite_responses import SqliteResponses
from tests.integration.test_stored_responses import (
    OTHER,
    PATH,
    SHOWN_KEY,
    asked,
    client,
    config,
)
from tests.support.in_process_service import run_gateway
from tests.support.polling import until
from tests.support.redis_server import redis_server
from tests.support.third_party_clients import SCRIPTS, last_json, python_with, run

ONE: Any = {"type": "message", "role": "user", "content": "one"}


async def test_turns_are_added_to_a_conversation(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        made = await api.conversations.create(metadata={"topic": "x"}, items=[ONE])
        first = await api.responses.create(
            model="general", input="two", conversation=made.id, instructions="Be brief."
        )
        events = [
            event
            async for event in await api.responses.create(
                model="general", input="three", conversation={"id": made.id}, stream=True
            )
        ]
        second = events[-1].response  # type: ignore[union-attr]
        third = await api.responses.create(
            model="general", input="four", previous_response_id=second.id
        )
        bodies = asked(s)
        items = [item async for item in await api.conversations.items.list(made.id, order="asc")]
        newest = await api.conversations.items.list(made.id, limit=1)
        shown = [item async for item in await api.responses.input_items.list(second.id)]
        whole = [item async for item in await api.responses.input_items.list(third.id)]
        kept = await api.responses.retrieve(first.id)
        found = await api.conversations.retrieve(made.id)
        changed = await api.conversations.update(made.id, metadata={"topic": "y"})
    two, three, four = ({"role": "user", "content": text} for text in ("two", "three", "four"))
    said = [item.model_dump(exclude_unset=True) for item in first.output]
    also = [item.model_dump(exclude_unset=True) for item in second.output]
    assert bodies[0]["input"] == [ONE, two]
    assert bodies[1]["input"] == [ONE, two, *said, three]
    # A response in a conversation can be gone on from, outside of it.
    assert bodies[2]["input"] == [ONE, two, *said, three, *also, four]
    assert [body.get("instructions") for body in bodies] == ["Be brief.", None, None]
    assert not any("conversation" in body for body in bodies)
    assert first.conversation is not None
    assert second.conversation is not None
    assert first.conversation.id == second.conversation.id == made.id
    assert third.conversation is None
    texts = [item.content[0].text for item in items]  # type: ignore[union-attr]
    assert texts[:2] + texts[3:4] == ["one", "two", "three"]
    assert len(items) == 5
    assert newest.data[0].id == items[-1].id == second.output[0].id
    assert len(shown) == 4
    assert len(whole) == 6
    assert kept.output == first.output
    assert (found.metadata, changed.metadata) == ({"topic": "x"}, {"topic": "y"})


async def test_items_are_added_read_and_deleted_for_good(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        made = await api.conversations.create()
        added = await api.conversations.items.create(
            made.id, items=[ONE, {**ONE, "content": "a secret of the tests"}]
        )
        assert added.object == "list"
        assert len(added.data) == 2
        secret = added.data[1].id
        assert secret is not None
        read = await api.conversations.items.retrieve(secret, conversation_id=made.id)
        assert read.content[0].text == "a secret of the tests"  # type: ignore[union-attr]
        left = await api.conversations.items.delete(secret, conversation_id=made.id)
        assert left.id == made.id
        with pytest.raises(openai.NotFoundError, match="no item"):
            await api.conversations.items.delete(secret, conversation_id=made.id)
        for path in (tmp_path / "kept").iterdir():
            assert b"a secret of the tests" not in path.read_bytes()
        response = await api.responses.create(model="general", input="x", conversation=made.id)
        assert len(asked(s)[0]["input"]) == 2
        await api.responses.delete(response.id)
        assert [item.id async for item in await api.conversations.items.list(made.id)] == [
            added.data[0].id
        ]
        response = await api.responses.create(model="general", input="x", conversation=made.id)
        gone = await api.conversations.delete(made.id)
        assert (gone.deleted, gone.object) == (True, "conversation.deleted")
        for call in (
            api.conversations.retrieve(made.id),
            api.responses.retrieve(response.id),
            api.responses.create(model="general", input="x", conversation=made.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await call


async def test_conversations_of_other_tenants_are_unknown(tmp_path: Path) -> None:
    async with (
        run_gateway(config(tmp_path)) as s,
        client(s) as api,
        client(s, OTHER) as theirs,
    ):
        made = await api.conversations.create(items=[ONE])
        (item,) = (await api.conversations.items.list(made.id)).data
        assert item.id is not None
        for name in (made.id, "conv_" + "0" * 48):
            for call in (
                theirs.conversations.retrieve(name),
                theirs.conversations.update(name, metadata={}),
                theirs.conversations.delete(name),
                theirs.conversations.items.list(name),
                theirs.conversations.items.create(name, items=[ONE]),
                theirs.conversations.items.retrieve(item.id, conversation_id=name),
                theirs.conversations.items.delete(item.id, conversation_id=name),
                theirs.responses.create(model="general", input="x", conversation=name),
            ):
                with pytest.raises(openai.NotFoundError, match="no conversation") as raised:
                    await call
                assert raised.value.type == "not_found_error"
        assert len((await api.conversations.items.list(made.id)).data) == 1


async def test_field_that_is_not_valid_gets_one_clear_error(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        made = await api.conversations.create()
        response = await api.responses.create(model="general", input="x")
        root = f"/v1/conversations/{made.id}"
        general: dict[str, Any] = {"model": "general", "input": "x"}
        for path, body, param in (
            ("/v1/conversations", {"items": [3]}, "items[0]"),
            ("/v1/conversations", {"items": [ONE] * 21}, "items"),
            ("/v1/conversations", {"metadata": {"a": 1}}, "metadata"),
            ("/v1/conversations", {"title": "x"}, "title"),
            ("/v1/conversations", [], None),
            (root, {}, "metadata"),
            (root, {"items": []}, "items"),
            (f"{root}/items", {"items": []}, "items"),
            (PATH, {**general, "conversation": 3}, "conversation"),
            (PATH, {**general, "conversation": made.id, "store": False}, "store"),
            (
                PATH,
                {**general, "conversation": made.id, "previous_response_id": response.id},
                "previous_response_id",
            ),
        ):
            status, _, answer = await s.ask(body, path, headers=SHOWN_KEY)
            assert (status, answer["error"]["param"]) == (400, param), (path, body)


async def test_turns_at_once_are_added_as_wholes(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        made = await api.conversations.create()
        responses = await asyncio.gather(
            *(
                api.responses.create(model="general", input=f"turn {n}", conversation=made.id)
                for n in range(8)
            )
        )
        listed = await api.conversations.items.list(made.id, limit=100, order="asc")
    pairs = [(listed.data[at], listed.data[at + 1]) for at in range(0, 16, 2)]
    assert len(listed.data) == 16
    answers = {response.output[0].id: response for response in responses}
    # Behind each turn's input stands its own answer.
    for asks, says in pairs:
        assert says.id is not None
        text = asks.content[0].text  # type: ignore[union-attr]
        assert responses.index(answers.pop(says.id)) == int(text.split()[1])


async def test_conversation_gets_no_part_of_a_turn(tmp_path: Path) -> None:
    held = config(tmp_path, pool={"tokens": 2000, "decode_ms": 100})
    async with run_gateway(held) as s, client(s) as api:
        made = await api.conversations.create()
        body = {"model": "general", "input": "one", "stream": True, "conversation": made.id}
        async with s.post(body, PATH, headers=SHOWN_KEY) as reply:
            created = json.loads((await reply.content.readuntil(b"\n\n")).split(b"data: ")[1])
        await until(lambda: s.gateway.state.metrics.in_flight == 0, "the request ended")
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(created["response"]["id"])
        assert (await api.conversations.items.list(made.id)).data == []


async def test_conversation_that_is_deleted_during_a_turn_stays_deleted(tmp_path: Path) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()
    add = SqliteResponses.add_response

    async def add_later(*given: Any) -> Any:
        reached.set()
        await go_on.wait()
        return await add(*given)

    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        made = await api.conversations.create()
        body = {"model": "general", "input": "one", "conversation": made.id}
        with patch.object(SqliteResponses, "add_response", add_later):
            running = asyncio.create_task(s.ask(body, PATH, headers=SHOWN_KEY))
            await reached.wait()
            await api.conversations.delete(made.id)
            go_on.set()
            status, _, answer = await running
        assert (status, answer["store"]) == (200, False)
        for call in (api.conversations.retrieve(made.id), api.responses.retrieve(answer["id"])):
            with pytest.raises(openai.NotFoundError):
                await call


async def test_full_disk_and_full_quota_keep_nothing(tmp_path: Path) -> None:
    bounded = config(tmp_path, responses={"tenant_bytes": 2000})
    async with run_gateway(bounded) as s, client(s) as api:
        made = await api.conversations.create(items=[ONE])
        large = {**ONE, "content": "y" * 2000}
        with pytest.raises(openai.RateLimitError, match="2000 bytes"):
            await api.conversations.items.create(made.id, items=[large])
        full = AsyncMock(side_effect=StorageFullError("full"))
        root = "/v1/conversations"
        for name, path in (("add_conversation", root), ("add_items", f"{root}/{made.id}/items")):
            with patch.object(SqliteResponses, name, full):
                status, _, answer = await s.ask({"items": [ONE]}, path, headers=SHOWN_KEY)
            assert (status, answer["error"]["code"]) == (507, "storage_full")
        assert len((await api.conversations.items.list(made.id)).data) == 1


async def test_input_tokens_count_the_whole_conversation(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        first = await api.responses.create(model="general", input="one two three")
        made = await api.conversations.create(items=[ONE])
        alone = await api.responses.input_tokens.count(model="general", input="four five")
        after = await api.responses.input_tokens.count(
            model="general", input="four five", previous_response_id=first.id
        )
        within = await api.responses.input_tokens.count(
            model="general", input="four five", conversation=made.id
        )
        assert alone.object == "response.input_tokens"
        assert alone.input_tokens == 2
        assert after.input_tokens > alone.input_tokens + 3
        assert within.input_tokens == 3
        # Nothing is kept, and nothing is charged.
        assert len((await api.conversations.items.list(made.id)).data) == 1
        assert all("store" not in body for body in asked(s)[1:])
        with pytest.raises(openai.NotFoundError):
            await api.responses.input_tokens.count(
                model="general", input="x", previous_response_id="resp_0"
            )


async def test_agents_sdk_goes_on_by_response_session_and_conversation(tmp_path: Path) -> None:
    program = python_with("agents")
    async with run_gateway(config(tmp_path, keys={})) as s:
        command = [program, SCRIPTS / "python_clients.py", "agents", s.url]
        answer = last_json(await asyncio.to_thread(run, command))
        lengths = [len(body["input"]) for body in asked(s)]
    assert answer["second"]
    assert answer["streamed"]
    assert answer["shown"] == 3
    assert answer["roles"] == ["user", "assistant"] * 2
    assert answer["kept"] == 4
    assert lengths == [1, 3, 1, 3, 1, 3]


async def test_two_gateways_share_conversations_in_redis(tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis:
        shared = config(tmp_path, store={"kind": "redis", "url": redis.url, "prefix": "t"})
        async with (
            run_gateway(shared) as a,
            run_gateway(shared) as b,
            client(a) as here,
            client(b) as there,
        ):
            made = await here.conversations.create(items=[ONE])
            await there.responses.create(model="general", input="two", conversation=made.id)
            await here.responses.create(model="general", input="three", conversation=made.id)
            assert len(asked(a)[0]["input"]) == 4
            await there.conversations.delete(made.id)
            with pytest.raises(openai.NotFoundError):
                await here.responses.create(model="general", input="x", conversation=made.id)
