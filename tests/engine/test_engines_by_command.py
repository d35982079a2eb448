"""vLLM's own server as another project's: a process of its own that a command starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import orjson
import psutil
import pytest

from service.config import CommandConfig
from service.engine.command.engine import CommandEngine, default_endpoints, server_environment
from service.engine.engine_interface import EngineRequest, Message
from tests.support import tiny_dense_family
from tests.support.engine.real_engines import ENVIRONMENT

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

CHAT = "/v1/chat/completions"


async def ask(engine: CommandEngine, **fields: object) -> list[Message]:
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "e", "messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await engine.run(EngineRequest(CHAT, "e", orjson.dumps(body), "id", cache_salt="salt"), send)
    return sent


async def test_vllm_s_own_server_answers_streams_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tiny_dense_family.base(tmp_path / "model")
    run = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    run += ["--port", "{port}", "--host", "127.0.0.1", "--served-model-name", "tiny"]
    run += ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "2"]
    run += ["--dtype", "float32", "--kv-cache-memory-bytes", "16777216"]
    command = CommandConfig(
        run=tuple(run),
        memory_bytes=2 * 1024**3,
        model="tiny",
        cache_salt=True,
        env={name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()},
        ready_timeout_s=200,
    )
    env, secrets = server_environment(command, [])
    engine = CommandEngine(
        "e", command, default_endpoints(("chat",)), env, secrets, tmp_path / "logs"
    )
    try:
        await engine.start()
        assert engine._process is not None
        keeper = psutil.Process(engine._process.keeper_pid)
        processes = keeper.children(recursive=True)
        # The server, and its engine core at least.
        assert len(processes) >= 2
        start, body = await ask(engine)
        answer = orjson.loads(body["body"])
        assert start["status"] == 200
        assert answer["model"] == "e"
        assert answer["usage"]["completion_tokens"] == 8
        pieces = await ask(engine, stream=True, stream_options={"include_usage": True})
        lines = b"".join(one.get("body", b"") for one in pieces).split(b"\n\n")
        events = [orjson.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        assert lines[-2] == b"data: [DONE]"
        assert {event["model"] for event in events} == {"e"}
        said = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
        assert said == answer["choices"][0]["message"]["content"]
        usage = {k: n for k, n in answer["usage"].items() if n is not None}
        assert events[-1]["usage"] == usage
        # An error of its own arrives in the form of OpenAI's, with its status.
        refused, _ = await ask(engine, max_tokens=-1)
        assert refused["status"] == 400
    finally:
        await engine.stop()
    assert not [process for process in processes if process.is_running()]
    keeper.wait(5)
