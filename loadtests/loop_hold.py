"""`python -m loadtests.loop_hold`: Measures how long large requests block a pool's event loop.

It takes the largest allowed requests, and measures the processor time of the loop's thread with a
real vLLM engine on it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import math
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from loadtests.lib.child_processes import say
from loadtests.lib.command_line import parser, tell
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from loadtests.loop_hold_meter import HoldMeter
from service.config import Config
from service.engine.engine_interface import EngineRequest, Message
from service.errors import CoeError, InvalidRequestError
from service.gateway.request.body_limits import RequestLimitChecker
from service.gateway.request.parsing import parse_request
from service.http.error_formats import error_response
from service.models import locate

_MODEL = "smollm2-135m-instruct"
_MOST_S = 0.1
# vLLM's own bound (VLLM_MAX_IMAGE_PIXELS).
_MOST_PIXELS = 178_956_970
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Case:
    """The largest request of its kind."""

    name: str
    path: str
    body: dict[str, Any]
    image: str = ""
    """The data URL of an image, which vLLM only decodes: the model sees none."""


def _chat(text: str = "Hello.", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 2, **more}


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return _chat(response_format=form)


def cases(config: Config) -> Iterator[Case]:
    """The largest admissible request of each kind that costs an engine's front end something."""
    limits = config.server.limits
    pattern, properties = limits.max_pattern_bytes, limits.max_schema_properties
    body = config.server.max_body_bytes - 1000
    either = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    named = {f"p{i}": either for i in range(properties)}
    yield Case("schema: properties", CHAT, _schema({"type": "object", "properties": named}))
    words = [f"word number {i}" for i in range(limits.max_schema_bytes // 24)]
    yield Case("schema: values", CHAT, _schema({"enum": words}))
    patterns = {f"p{i}": {"type": "string", "pattern": "(a|b)c?" * 100} for i in range(64)}
    yield Case("schema: patterns", CHAT, _schema({"type": "object", "properties": patterns}))
    groups = "(" * limits.max_pattern_depth + "a" + ")?" * limits.max_pattern_depth
    yield Case("pattern: groups", CHAT, _schema({"type": "string", "pattern": groups}))
    long = "|".join(f"w{i}" for i in range(pattern // 6))
    yield Case("pattern: alternatives", CHAT, _schema({"type": "string", "pattern": long}))
    repeated = "^(((a|b|cd){1,60}c){1,60}d){1,60}$"
    yield Case("pattern: repeated", CHAT, _schema({"type": "string", "pattern": repeated}))
    yield Case("regex", CHAT, _chat(structured_outputs={"regex": "([a-z]{1,8}-)?" * 100}))
    rules = " | ".join(f'"w{i}"' for i in range(limits.max_grammar_bytes // 12))
    yield Case("grammar", CHAT, _chat(structured_outputs={"grammar": f"root ::= {rules}"}))
    yield Case("choices", CHAT, _chat(structured_outputs={"choice": words}))
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {}}}
    tag["format"] = {"type": "json_schema", "json_schema": {"type": "object", "properties": named}}
    yield Case("structural tag", CHAT, _chat(response_format=tag))
    tools = [
        {
            "type": "function",
            "function": {
                "name": f"f{i}",
                "strict": True,
                "parameters": {"type": "object", "properties": dict(list(named.items())[:12])},
            },
        }
        for i in range(limits.max_tools)
    ]
    yield Case("tools, required", CHAT, _chat(tools=tools, tool_choice="required"))
    yield Case("tools, auto", CHAT, _chat(tools=tools))
    yield Case("prompts", COMPLETIONS, {"prompt": ["a b c"] * limits.max_prompts, "max_tokens": 1})
    room = body // limits.max_prompts - 10
    yield Case("prompts, long", COMPLETIONS, {"prompt": ["a " * (room // 2)] * limits.max_prompts})
    tokens = [7] * (limits.max_json_values - 100)
    yield Case("prompt of token ids", COMPLETIONS, {"prompt": tokens})
    yield Case("choices, with probabilities", CHAT, _chat(n=limits.max_choices, logprobs=True))
    text = "some words " * (body // 11)
    yield Case("one long message", CHAT, _chat(text))
    yield Case("text to tokens", "/tokenize", {"prompt": text[: 4 * 1024 * 1024 - 1000]})
    yield Case("tokens to text", "/detokenize", {"tokens": tokens})
    turns = [{"role": "user", "content": "x"}] * limits.max_messages
    yield Case("messages", CHAT, {"messages": turns})
    yield Case("messages, to tokens", "/tokenize", {"messages": turns})
    parts = [{"type": "text", "text": "x"}] * (limits.max_messages - 2)
    yield Case("parts", CHAT, {"messages": [{"role": "user", "content": parts}]})
    yield Case("stop words", CHAT, _chat(stop=["some words " * 90] * 64))
    yield Case("bad words", CHAT, _chat(bad_words=[f"some words {i} " * 16 for i in range(256)]))
    biased = {str(i): 1.0 for i in range(1024)}
    yield Case("biases", CHAT, _chat(logit_bias=biased))
    yield Case("allowed tokens", CHAT, _chat(allowed_token_ids=list(range(40_000))))
    edge = math.isqrt((body * 3 // 4 - 4000) // 3)
    yield _image("image, decoded: bytes", edge, edge, "RGB")
    edge = math.isqrt(_MOST_PIXELS)
    yield _image("image, decoded: pixels", edge, edge, "1")
    yield Case("tools of Responses", "/v1/responses", {"input": "a", "tools": _flat(tools)})
    yield Case("tools of Messages", "/v1/messages", {**_chat(), "tools": _anthropic(tools)})


def _image(name: str, width: int, height: int, mode: str) -> Case:
    address = "data:image/png;base64," + base64.b64encode(png(width, height, mode)).decode()
    seen = [{"type": "image_url", "image_url": {"url": address}}]
    return Case(name, CHAT, _chat() | {"messages": [{"role": "user", "content": seen}]}, address)


def png(width: int, height: int, mode: str) -> bytes:
    """Make a PNG: noise in `RGB` that nothing compresses, or black in `1`, one bit for a pixel."""
    if mode == "RGB":
        raw = b"".join(b"\0" + os.urandom(3 * width) for _ in range(height))
        depth, colours, level = 8, 2, 0
    else:
        raw = bytes((1 + (width + 7) // 8) * height)
        depth, colours, level = 1, 0, 1
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, level)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _flat(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "function", **tool["function"]} for tool in tools]


def _anthropic(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]}
        for tool in tools
    ]


async def _ask(engine: Any, path: str, raw: bytes) -> int:
    status = 0

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    request = EngineRequest(path, "small", raw, f"hold-{next(_numbers)}")
    try:
        await asyncio.wait_for(engine.run(request, send), 120)
    except CoeError as error:
        return error_response(error).status
    except TimeoutError:
        return 504
    return status


async def _decode(address: str) -> int:
    """Decode an image as vLLM's front end does before it prepares it for a model."""
    from vllm.multimodal.media.connector import MediaConnector
    from vllm.multimodal.media.image import ImageMediaIO

    await MediaConnector().load_from_url_async(address, ImageMediaIO())
    return 200


async def measure(threads: int, only: str) -> Report:
    """Ask every case once, alone, and twice: what is kept from the first time holds less."""
    from service.engine.vllm.engine import VllmEngine, VllmModel

    folder = locate(_MODEL)
    if folder is None:
        raise RuntimeError(f"this needs: coe models pull {_MODEL}")
    options = {
        "dtype": "float32",
        "max_model_len": 2048,
        "kv_cache_bytes": "256MiB",
        "enforce_eager": True,
        "threads": threads,
        "tool_call_parser": "hermes",
    }
    config = Config.model_validate(
        {"experts": {"small": {"model": _MODEL}}, "pools": {"cpu": {"vllm": options}}}
    )
    limits = RequestLimitChecker(config)
    engine = VllmEngine(VllmModel("small", str(folder), {}), config.pools["cpu"].vllm, on_cpu=True)
    report = Report("loop_hold")
    table = Table(
        "How long the largest requests hold a pool's loop",
        ("request", "bytes", "status", "in the gateway, ms", "in the pool, ms", "where"),
    )
    worst = worst_gateway = 0.0
    await engine.start()
    try:
        await _ask(engine, CHAT, orjson.dumps({"model": "small", **_chat()}))
        for case in cases(config):
            if only not in case.name:
                continue
            raw = orjson.dumps({"model": "small", **case.body})
            began_s = time.thread_time()
            try:
                limits.shape(raw)
                limits.fields(parse_request(case.path, raw, {}, 60_000).data)
                fit = True
            except InvalidRequestError as error:
                say(f"{case.name}: the gateway refuses it: {error.message}")
                fit = False
            gateway_s = time.thread_time() - began_s
            held = HoldMeter()
            status = 400
            if fit:
                with held:
                    if case.image:
                        status = await _decode(case.image)
                    else:
                        status = await _ask(engine, case.path, raw)
            worst, worst_gateway = max(worst, held.longest_s), max(worst_gateway, gateway_s)
            row = (
                case.name,
                str(len(raw)),
                str(status),
                f"{gateway_s * 1000:.1f}",
                f"{held.longest_s * 1000:.1f}",
                held.where,
            )
            table.rows.append(row)
            say(" | ".join(row))
    finally:
        await engine.stop()
    report.tables.append(table)
    for name, value in (("a pool's", worst), ("a gateway's", worst_gateway)):
        report.reach.append(
            TargetCheck(
                f"ms that one request holds {name} loop, at most",
                _MOST_S * 1000,
                round(value * 1000, 1),
                value <= _MOST_S,
            )
        )
    wrong = [row for row in table.rows if row[2].startswith("5") and row[2] != "503"]
    report.reach.append(TargetCheck("untyped faults, at most", 0.0, float(len(wrong)), not wrong))
    return report


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("loop_hold", __doc__)
    words.add_argument("--threads", type=int, default=1, help="OMP threads (default 1)")
    words.add_argument("--only", default="", help="run only requests whose name contains this")
    given: argparse.Namespace = words.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(given.threads))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return tell(lambda _: asyncio.run(measure(given.threads, given.only)), as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
