"""Engines by command, with a real process: `tests/support/foreign_server.py`."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import psutil
import pytest

from service.config import CommandConfig
from service.engine.command import port_owner
from service.engine.command.engine import (
    CommandEngine,
    default_endpoints,
    server_environment,
)
from service.engine.engine_interface import EngineRequest, Message
from service.engine.scoped_env import scoped_env, without_secrets
from service.errors import (
    CoeError,
    EngineDeadError,
    EngineRestartingError,
    ExpertFailedError,
    InvalidRequestError,
    OverCapacityError,
    UpstreamError,
)
from service.rpc.http_connections import HttpConnections
from tests.support.foreign_server import command
from tests.support.polling import until

CHAT = "/v1/chat/completions"


def make(tmp_path: Path, *arguments: str, name: str = "e", **settings: Any) -> CommandEngine:
    given = {"run": command(*arguments), "memory_bytes": 1, "stop_timeout_s": 1.0, **settings}
    config = CommandConfig.model_validate(given)
    env, secrets = server_environment(config, [])
    endpoints = default_endpoints(("chat", "embeddings"))
    return CommandEngine(name, config, endpoints, env, secrets, tmp_path / "logs")


@asynccontextmanager
async def started(engine: CommandEngine) -> AsyncIterator[CommandEngine]:
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()


class Collected:
    """An ASGI send that keeps what it gets."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.came = asyncio.Event()

    async def __call__(self, message: Message) -> None:
        self.messages.append(message)
        self.came.set()

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


def chat(said: str, name: str = "e", **fields: Any) -> EngineRequest:
    body = {"model": name, "messages": [{"role": "user", "content": said}], **fields}
    return EngineRequest(CHAT, name, orjson.dumps(body), "id-1", cache_salt="of a tenant")


async def ask(engine: CommandEngine, request: EngineRequest) -> Collected:
    got = Collected()
    await engine.run(request, got)
    return got


def pids_in(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def running(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


@asynccontextmanager
async def answering(tmp_path: Path, reply: bytes) -> AsyncIterator[CommandEngine]:
    """An engine whose server answers every request with these bytes."""
    left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass  # until the client hangs up
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        left.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        engine = make(tmp_path)
        port = server.sockets[0].getsockname()[1]
        process: Any = SimpleNamespace(status=None, ended=asyncio.Event())
        engine._connections, engine._process = HttpConnections("127.0.0.1", port, 5.0), process
        try:
            yield engine
        finally:
            engine._connections.close()
            await left.wait()


def whole_reply(kind: str, body: bytes) -> bytes:
    return (
        f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


# --- answers


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b""),
        ("application/json", b" \n"),
        ("application/json", b"3"),
        ("text/html", b"<html>who are you?</html>"),
        ("text/plain", b"hello"),
        ("application/json", gzip.compress(b"{}")),
    ],
)
async def test_run_answer_that_is_no_json_is_refused(
    tmp_path: Path, kind: str, body: bytes
) -> None:
    async with answering(tmp_path, whole_reply(kind, body)) as engine:
        with pytest.raises(UpstreamError, match="with no JSON") as caught:
            await ask(engine, chat("hello"))
        assert caught.value.status == 502


@pytest.mark.parametrize("kind", ["Text/Event-Stream; charset=UTF-8", "TEXT/EVENT-STREAM"])
async def test_run_stream_is_known_however_its_type_is_written(tmp_path: Path, kind: str) -> None:
    events = b'data: {"model": "m", "choices": []}\n\ndata: [DONE]\n\n'
    async with answering(tmp_path, whole_reply(kind, events)) as engine:
        got = await ask(engine, chat("hello", stream=True))
    assert b'"model":"e"' in got.body.replace(b" ", b"")
    assert b'"m"' not in got.body


async def test_run_whole_answer_has_the_experts_name_and_usage(tmp_path: Path) -> None:
    async with started(make(tmp_path, "--model", "/models/secret-path.gguf", model="m")) as engine:
        got = await ask(engine, chat("hello"))
    answer = orjson.loads(got.body)
    assert got.status == 200
    assert answer["model"] == "e"
    assert answer["choices"][0]["message"]["content"] == "m0 m1 m2 m3"
    assert answer["usage"]["total_tokens"] == 7
    assert b"secret-path" not in got.body


@pytest.mark.parametrize("answered_as", ["e", "other", 'with "quotes"'])
async def test_run_stream_passes_events_with_the_experts_name(
    tmp_path: Path, answered_as: str
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with started(make(tmp_path, "--model", answered_as)) as engine:
        got = await ask(engine, chat("hello", stream=True, stream_options=options))
    lines = [line[6:] for line in got.body.split(b"\n\n") if line]
    assert lines[-1] == b"[DONE]"
    events = [orjson.loads(line) for line in lines[:-1]]
    assert {event["model"] for event in events} == {"e"}
    assert [e["choices"][0]["delta"]["content"] for e in events[:-1]] == ["e0", "e1", "e2", "e3"]
    assert events[-1]["usage"]["completion_tokens"] == 4
    assert not got.messages[-1].get("more_body", False)


async def test_run_stream_sends_each_piece_as_it_comes(tmp_path: Path) -> None:
    hold = tmp_path / "go on"
    async with started(make(tmp_path, "--tokens", "3", "--hold", str(hold))) as engine:
        got = Collected()
        task = asyncio.create_task(engine.run(chat("hello", stream=True), got))
        await got.came.wait()
        assert not task.done()
        assert b"e0" in got.body
        assert b"e2" not in got.body
        hold.touch()
        await task
    assert b"e2" in got.body


@pytest.mark.parametrize("salted", [True, False])
async def test_run_request_has_only_fields_that_the_server_may_know(
    tmp_path: Path, salted: bool
) -> None:
    async with started(make(tmp_path, cache_salt=salted)) as engine:
        options = {"include_usage": True, "continuous_usage_stats": True}
        got = await ask(engine, chat("hello", stream_options=options, seed=7))
    echo = orjson.loads(got.body)["echo"]
    assert echo["stream_options"] == {"include_usage": True}
    assert echo["seed"] == 7
    assert ("cache_salt" in echo) == salted


async def test_run_embeddings_answers(tmp_path: Path) -> None:
    async with started(make(tmp_path)) as engine:
        request = EngineRequest("/v1/embeddings", "e", b'{"model":"e","input":"a"}', "id")
        got = await ask(engine, request)
    assert orjson.loads(got.body)["data"][0]["embedding"] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("said", "status", "message"),
    [("refuse", 400, "no such field"), ("fail", 500, "a fault")],
)
async def test_run_error_of_the_server_is_passed_on_in_openai_form(
    tmp_path: Path, said: str, status: int, message: str
) -> None:
    async with started(make(tmp_path)) as engine:
        got = await ask(engine, chat(said))
    assert got.status == status
    assert orjson.loads(got.body)["error"]["message"] == message


@pytest.mark.parametrize(
    ("said", "stream", "error"),
    [
        ("busy", False, OverCapacityError),
        ("close", False, EngineDeadError),
        ("die", False, EngineDeadError),
        ("die", True, EngineDeadError),
        ("break off", True, EngineDeadError),
    ],
)
async def test_run_failure_is_typed(
    tmp_path: Path, said: str, stream: bool, error: type[CoeError]
) -> None:
    async with started(make(tmp_path, "--step-s", "0.02")) as engine:
        with pytest.raises(error) as caught:
            await ask(engine, chat(said, stream=stream))
        assert type(caught.value) is error
        if said in ("die", "break off"):
            assert engine.failure() == "its server ended (signal SIGKILL)"
            with pytest.raises(EngineRestartingError):
                await ask(engine, chat("hello"))


async def test_run_answer_that_can_not_be_written_again_is_refused(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(253):
        deep = [deep]
    async with started(make(tmp_path)) as engine:
        # The server repeats the body one level deeper.
        with pytest.raises(UpstreamError, match="more than 254 levels"):
            await ask(engine, chat("hello", deep=deep))
        assert (await ask(engine, chat("hello", deep=deep[0]))).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_run_idle_connection_that_the_server_closes_is_replaced(
    tmp_path: Path, stream: bool
) -> None:
    async with started(make(tmp_path)) as engine:
        # The connection that asked whether it was ready is idle now.
        assert (await ask(engine, chat("close once", stream=stream))).status == 200
    async with started(make(tmp_path, name="e2")) as engine:
        with pytest.raises(EngineDeadError, match="connection to its server was lost"):
            await ask(engine, chat("close", "e2", stream=stream))


EVENT = b'data: {"model": "m", "choices": [{"delta": {"content": "x"}}]}\n\n'
WHOLE = b'{"model": "m", "choices": []}'


@pytest.mark.parametrize(
    ("kind", "body", "dies", "whole"),
    [
        (b"application/json", WHOLE, False, True),
        (b"application/json", WHOLE[:-3], True, False),
        (b"application/json", WHOLE[:-3], False, False),
        (b"text/event-stream", EVENT + b"data: [DONE]\n\n", False, True),
        (b"text/event-stream", EVENT + b"data: [DONE]\n\n", True, True),
        (b"text/event-stream", EVENT, False, True),
        (b"text/event-stream", EVENT, True, False),
        (b"text/event-stream", EVENT + EVENT[:20], True, False),
    ],
)
async def test_run_answer_without_a_length_that_a_dying_server_cuts_off_is_no_answer(
    tmp_path: Path, kind: bytes, body: bytes, dies: bool, whole: bool
) -> None:
    process: Any = SimpleNamespace(status=None, ended=asyncio.Event())

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\ncontent-type: " + kind + b"\r\n\r\n" + body)
        await writer.drain()
        if dies:
            process.status = -signal.SIGKILL
            process.ended.set()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        engine = make(tmp_path)
        port = server.sockets[0].getsockname()[1]
        engine._connections, engine._process = HttpConnections("127.0.0.1", port, 5.0), process
        answers = ask(engine, chat("hello", stream=kind.startswith(b"text")))
        try:
            if whole:
                assert (await answers).status == 200
            else:
                with pytest.raises(EngineDeadError, match=r"cut its answer off|SIGKILL"):
                    await answers
        finally:
            engine._connections.close()


@pytest.mark.parametrize("body", [b"{", b"[]", b"3"])
async def test_run_body_that_is_no_object_is_refused(tmp_path: Path, body: bytes) -> None:
    async with started(make(tmp_path)) as engine:
        with pytest.raises(InvalidRequestError):
            await ask(engine, EngineRequest(CHAT, "e", body, "id"))


async def test_run_cancelled_closes_the_upstream_request(tmp_path: Path) -> None:
    aborts = tmp_path / "aborts"
    arguments = ("--tokens", "1000", "--step-s", "0.02", "--aborts", str(aborts))
    async with started(make(tmp_path, *arguments)) as engine:
        got = Collected()
        task = asyncio.create_task(engine.run(chat("hello", stream=True), got))
        await got.came.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(aborts.exists, "the upstream request ends")
        assert await engine.in_flight() == 0
        assert (await ask(engine, chat("hello"))).status == 200


# --- starts


async def test_start_waits_until_the_server_is_ready(tmp_path: Path) -> None:
    began_s = time.monotonic()
    async with started(make(tmp_path, "--ready-s", "0.4")) as engine:
        assert time.monotonic() - began_s >= 0.4
        assert engine.failure() is None
        assert (await ask(engine, chat("hello"))).status == 200


@pytest.mark.parametrize("how", [("--never-ready",), ("--hang",), ("--start-s", "3600")])
async def test_start_server_that_is_never_ready_fails_with_its_last_lines(
    tmp_path: Path, how: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREIGN_KEY", "sesame-123")
    limits: list[asyncio.Timeout] = []
    real = asyncio.timeout

    def timeout(delay_s: float | None) -> asyncio.Timeout:
        limit = real(delay_s)
        if delay_s == 500:
            limits.append(limit)
        return limit

    monkeypatch.setattr(asyncio, "timeout", timeout)
    pids, log = tmp_path / "pids", tmp_path / "logs" / "e.log"
    engine = make(
        tmp_path,
        *how,
        *("--say", "loading the weights", "--say-env", "FOREIGN_KEY", "--pids", str(pids)),
        ready_timeout_s=500.0,
        secret_env=["FOREIGN_KEY"],
    )
    starting = asyncio.create_task(engine.start())
    await until(lambda: log.exists() and b"the key is" in log.read_bytes(), "it says so")
    if how == ("--never-ready",):
        await until(lambda: "503" in engine._refusal, "it says that it is not ready")
    limits[0].reschedule(asyncio.get_running_loop().time())  # the time is up
    with pytest.raises(ExpertFailedError) as caught:
        await starting
    assert "it was not ready within 500 s" in caught.value.message
    if how == ("--never-ready",):
        assert "(/health: status 503)" in caught.value.message
    assert "loading the weights | the key is ***" in caught.value.message
    assert "sesame" not in caught.value.message
    assert len(caught.value.message) < 2000
    assert "\n" not in caught.value.message
    assert not running(pids_in(pids))


async def test_start_server_that_exits_fails_at_once_with_its_status(tmp_path: Path) -> None:
    engine = make(tmp_path, "--exit", "3", "--say", "no such model")
    with pytest.raises(ExpertFailedError, match=r"exit status 3\).*no such model"):
        await engine.start()


async def test_start_lines_of_an_earlier_server_are_not_told(tmp_path: Path) -> None:
    async with started(make(tmp_path, "--say", "a prompt of yesterday")):
        pass
    with pytest.raises(ExpertFailedError) as caught:
        await make(tmp_path, "--exit", "3").start()
    assert "yesterday" not in caught.value.message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"run": ["./not-there", "{port}"]}, "program ./not-there can't be used: No such file"),
        ({"run": ["/etc/hostname", "{port}"]}, "program /etc/hostname can't be used: "),
        ({"cwd": "/not/there"}, "folder /not/there can't be used: No such file"),
    ],
)
async def test_start_command_that_cannot_run_is_one_line(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    engine = make(tmp_path, **settings)
    with pytest.raises(ExpertFailedError, match=message) as caught:
        await engine.start()
    assert "\n" not in caught.value.message


async def test_start_without_a_variable_of_secret_env_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExpertFailedError, match="NOT_SET_HERE of its secret_env is not set"):
        make(tmp_path, secret_env=["NOT_SET_HERE"])


def test_server_environment_has_no_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("A_TOKEN", "B_TOKEN"):
        monkeypatch.setenv(name, f"value of {name}")
    config = CommandConfig(run=command(), memory_bytes=1, secret_env=("A_TOKEN",))
    env, secrets = server_environment(config, ["A_TOKEN", "B_TOKEN"], "1,2")
    assert env["A_TOKEN"] == "value of A_TOKEN"
    assert "B_TOKEN" not in env
    assert "VLLM_LOGGING_CONFIG_PATH" not in env
    assert env["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert secrets == ["value of A_TOKEN"]


@pytest.mark.parametrize("other", [without_secrets, lambda: scoped_env("A_SWITCH", "on")])
def test_server_environment_does_not_depend_on_an_engine_that_starts_meanwhile(
    monkeypatch: pytest.MonkeyPatch, other: Callable[[], AbstractContextManager[None]]
) -> None:
    for name in ("A_TOKEN", "B_TOKEN"):
        monkeypatch.setenv(name, f"value of {name}")
    config = CommandConfig(run=command(), memory_bytes=1, secret_env=("A_TOKEN",))
    alone = server_environment(config, [])
    with other():
        same = server_environment(config, []) == alone
    assert same  # a failure must not print the environment
    assert "B_TOKEN" not in alone[0]


async def test_start_port_taken_by_another_process_tries_another_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = port_owner.free_port
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ports = iter([other.getsockname()[1]])
        monkeypatch.setattr(port_owner, "free_port", lambda host: next(ports, 0) or free(host))
        async with started(make(tmp_path)) as engine:
            assert (await ask(engine, chat("hello"))).status == 200
        assert next(ports, None) is None


async def test_start_answer_of_another_process_is_not_taken_for_the_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = port_owner.free_port
    theirs = make(tmp_path, name="theirs")
    async with started(theirs):
        connections = theirs._connections
        assert connections is not None
        ports = iter([connections._port])
        monkeypatch.setattr(port_owner, "free_port", lambda host: next(ports, 0) or free(host))
        # Its server goes on without the port, so that only the look at the listener tells.
        mine = make(tmp_path, "--start-s", "0.3", "--model", "mine", name="mine")
        async with started(mine):
            assert mine._connections is not None
            assert mine._connections._port != connections._port


# --- ends


@pytest.mark.parametrize("fork", ["child", "session", "double"])
@pytest.mark.parametrize("how", ["stop", "crash", "ignores SIGTERM"])
async def test_stop_ends_every_process(tmp_path: Path, fork: str, how: str) -> None:
    pids = tmp_path / "pids"
    arguments = ["--fork", fork, "--pids", str(pids)]
    if how == "ignores SIGTERM":
        arguments.append("--ignore-sigterm")
    engine = make(tmp_path, *arguments, stop_timeout_s=0.3)
    async with started(engine):
        await until(lambda: len(pids_in(pids)) == 2, "it has forked")
        found = pids_in(pids)
        assert len(running(found)) == 2
        if how == "crash":
            os.kill(found[0], signal.SIGKILL)
            await until(lambda: engine.failure() is not None, "its end is noticed")
            await until(lambda: not running(found), "all its processes end")
    assert not running(found)


async def test_stop_twice_and_before_start_does_nothing(tmp_path: Path) -> None:
    engine = make(tmp_path)
    await engine.stop()
    engine = make(tmp_path)
    await engine.start()
    await asyncio.gather(engine.stop(), engine.stop())
    assert engine.failure() == "it was stopped"
    with pytest.raises(EngineRestartingError):
        await ask(engine, chat("hello"))


async def test_start_cancelled_leaves_nothing(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    for wait_s in (0.0, 0.02, 0.1, 0.4):
        engine = make(tmp_path, "--never-ready", "--pids", str(pids))
        task = asyncio.create_task(engine.start())
        await asyncio.sleep(wait_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.stop()
    await until(lambda: not running(pids_in(pids)), "all its processes end")


async def test_pool_that_is_killed_takes_its_server_along(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = (
        "import asyncio, pathlib, sys\n"
        "from tests.unit.engine.command.test_engine import make\n"
        "async def main():\n"
        f"    engine = make(pathlib.Path({str(tmp_path)!r}), '--fork', 'double', '--pids', "
        f"{str(pids)!r})\n"
        "    await engine.start()\n"
        "    print('started', flush=True)\n"
        "    await asyncio.sleep(3600)\n"
        "asyncio.run(main())\n"
    )
    pool = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert pool.stdout is not None
        assert await pool.stdout.readline() == b"started\n"
        await until(lambda: len(pids_in(pids)) == 2, "it has forked")
    finally:
        pool.kill()
        await pool.wait()
    await until(lambda: not running(pids_in(pids)), "all its processes end")


async def test_swaps_twenty_leave_no_process_port_or_file_open(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    ports = []

    async def once() -> None:
        engine = make(tmp_path, "--fork", "session", "--pids", str(pids), stop_timeout_s=0.2)
        async with started(engine):
            await ask(engine, chat("hello"))
            assert engine._connections is not None
            ports.append(engine._connections._port)
            await until(lambda: len(pids_in(pids)) == 2 * len(ports), "it has forked")

    await once()  # the loop's own files
    before = set(os.listdir("/proc/self/fd"))
    threads = psutil.Process().num_threads()
    for _ in range(20):
        await once()
    await asyncio.sleep(0)
    assert len(set(os.listdir("/proc/self/fd"))) <= len(before)
    assert psutil.Process().num_threads() <= threads + 4  # the loop's pool of threads
    assert len(pids_in(pids)) == 42
    assert not running(pids_in(pids))
    assert not [port for port in ports if port_owner.is_taken(port)]
    children = psutil.Process().children(recursive=True)
    assert not [child for child in children if str(tmp_path) in " ".join(child.cmdline())]
    assert len(list((tmp_path / "logs").iterdir())) <= 3


# --- the log


async def test_log_flood_is_bounded_and_does_not_hold_the_server(tmp_path: Path) -> None:
    async with started(make(tmp_path, "--flood", str(20 * 1024**2))) as engine:
        assert (await ask(engine, chat("hello"))).status == 200
    files = list((tmp_path / "logs").iterdir())
    assert sum(file.stat().st_size for file in files) <= 3 * 4 * 1024**2
    assert (tmp_path / "logs" / "e.log").read_bytes().endswith(b"the flood ends\n")


async def test_log_that_cannot_be_written_is_a_typed_failure(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("no folder")
    with pytest.raises(ExpertFailedError, match="its log can't be written"):
        await make(tmp_path).start()


# --- health


async def test_health_server_that_falls_silent_is_dead(tmp_path: Path) -> None:
    async with started(make(tmp_path, health_timeout_s=1.5)) as engine:
        for _ in range(2):
            alive_s = engine._alive_s
            await until(lambda before_s=alive_s: engine._alive_s > before_s, "it is asked")
        assert engine.failure() is None
        await engine._ask("GET", "/health", 1.0)
        with contextlib.suppress(Exception):
            await engine._ask("GET", "/sick", 1.0)
        await until(lambda: engine.failure() is not None, "its end is noticed")
        assert "did not answer /health: status 503" in (engine.failure() or "")


async def test_health_long_answer_counts_as_alive(tmp_path: Path) -> None:
    arguments = ("--tokens", "1000", "--step-s", "0.1")
    async with started(make(tmp_path, *arguments, health_timeout_s=1.5)) as engine:
        with contextlib.suppress(Exception):
            await engine._ask("GET", "/sick", 1.0)
        got = Collected()
        task = asyncio.create_task(engine.run(chat("hello", stream=True), got))
        await asyncio.sleep(2.0)
        assert engine.failure() is None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


# --- sleep

SLEEP: dict[str, Any] = {"sleep": {"url": "/sleep?level=1"}, "wake": {"url": "/wake_up"}}


async def test_sleep_and_wake_serve_again(tmp_path: Path) -> None:
    async with started(make(tmp_path, **SLEEP, health_timeout_s=1.0)) as engine:
        await engine.sleep()
        await asyncio.sleep(1.3)  # its health is nobody's business while it sleeps
        assert engine.failure() is None
        assert (await ask(engine, chat("hello"))).status == 500
        await engine.wake()
        assert (await ask(engine, chat("hello"))).status == 200


@pytest.mark.parametrize(
    ("argument", "act"),
    [("--refuse-sleep", CommandEngine.sleep), ("--refuse-wake", CommandEngine.wake)],
)
async def test_sleep_refused_is_an_engine_that_is_dead(
    tmp_path: Path, argument: str, act: Callable[[CommandEngine], Awaitable[None]]
) -> None:
    async with started(make(tmp_path, argument, **SLEEP)) as engine:
        with pytest.raises(EngineDeadError, match=r"refused /.*: status 500"):
            await act(engine)


async def test_sleep_server_that_hangs_is_an_engine_that_is_dead(tmp_path: Path) -> None:
    sleep = {"url": "/sleep", "timeout_s": 0.2}
    calls: dict[str, Any] = {"sleep": sleep, "wake": {"url": "/wake_up"}}
    async with started(make(tmp_path, "--sleep-s", "30", **calls)) as engine:
        with pytest.raises(EngineDeadError, match=r"no answer within 0\.2 s"):
            await engine.sleep()
