"""`coe chat`, `coe top` and `coe route` against a running service."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from textual.widgets import DataTable, Static

from service.cli import cli
from service.cli.top import make_app
from service.errors import CoeError
from tests.support.in_process_service import ADMIN_KEY, chat, run_gateway, simulated
from tests.support.polling import until

TURNS = simulated(
    {"cpu": {"tokens": 6, "swap_s": 0.01}},
    experts={"general": {"model": "m", "categories": ["general"]}, "math": {"model": "m"}},
    kinds={"cpu": {"slots": 1, "swap": {"min_stay_s": 0}}},
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's files: the admin key's."""
    monkeypatch.setenv("COE_HOME", str(tmp_path))
    (tmp_path / "admin-key").write_text(ADMIN_KEY)


async def coe(*words: str, given: str | None = None) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, cli, words, input=given)


async def test_chat_prints_the_answer_and_its_route() -> None:
    async with run_gateway(TURNS) as s:
        result = await coe("chat", "hello there", "--url", s.url)
        assert result.exit_code == 0, result.output
        answer, route = result.output.strip().split("\n")
        assert answer.startswith("general:")
        assert route.startswith("↳ general · general, ")
        for step in ("route", "queue", "swap", "prefill", "decode"):
            assert f"{step} " in route
        assert "6 tokens" in route


async def test_chat_keeps_the_turns_of_a_conversation() -> None:
    async with run_gateway(TURNS) as s:
        result = await coe("chat", "--url", s.url, "-m", "math", "--json", given="one\n\ntwo\n")
        lines = [json.loads(line) for line in result.output.strip().split("\n")]
        assert [item["expert"] for item in lines] == ["math", "math"]
        assert lines[0]["category"] is None
        request = s.pools["cpu"].engine.asked[-1]
        turns = json.loads(request.body)["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]


async def test_commands_print_errors_on_one_line() -> None:
    async with run_gateway(TURNS) as s:
        result = await coe("chat", "hi", "--url", s.url, "-m", "nobody")
        assert "nobody" in str(result.exception)
    result = await coe("chat", "hi", "--url", "http://127.0.0.1:9")
    assert "cannot reach" in str(result.exception)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"+OK another protocol\r\n", "cannot call"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", "not JSON"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhello", "broke off"),
    ],
)
async def test_commands_against_another_service_fail_with_one_line(
    reply: bytes, words: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        result = await coe("keys", "--url", url, "list")
    assert isinstance(result.exception, CoeError)
    assert words in result.exception.message
    if words == "broke off":
        return
    result = await coe("keys", "--url", "nowhere", "list")
    assert isinstance(result.exception, CoeError)


async def test_tables_can_be_printed_as_json() -> None:
    async with run_gateway(TURNS) as s:
        top = json.loads((await coe("top", "--json", "--url", s.url)).output)
        assert [expert["name"] for expert in top["experts"]] == ["general", "math"]
        experts = json.loads((await coe("experts", "--json", "--url", s.url)).output)
        assert "math" in next(iter(experts["pools"].values()))
        done = json.loads((await coe("experts", "--url", s.url, "pin", "math", "--json")).output)
        assert done == {"expert": "math", "done": "pin", "pools": 1}
        route = json.loads((await coe("route", "hi", "--url", s.url, "--json")).output)
        assert route["chosen"] == "general"


async def test_top_follows_experts_and_requests_and_moves_weights() -> None:
    # A unit that looks like markup of a terminal.
    prices = TURNS.prices.model_copy(update={"unit": "[/b] [red]EUR"})
    async with run_gateway(TURNS.model_copy(update={"prices": prices})) as s:
        app = make_app(s.url)
        async with app.run_test(size=(140, 40)) as pilot:
            experts = app.query_one("#experts", DataTable)
            routes = app.query_one("#routes", DataTable)
            await until(lambda: experts.row_count == 2, "the experts are shown")
            await s.ask(chat(model="math"))
            await until(lambda: routes.row_count == 1, "the request is shown")
            assert "math" in map(str, routes.get_row_at(0))
            heads = [str(column.label) for column in routes.columns.values()]
            assert "cost, [/b] [red]EUR" in heads
            assert len(heads) == len(routes.get_row_at(0))
            await until(lambda: str(experts.get_row_at(1)[2]) == "device", "the swap is shown")
            await pilot.press("p")
            message = app.query_one("#message", Static)
            await until(lambda: "pin general: done" in str(message.render()), "it was pinned")
            await pilot.press("q")
