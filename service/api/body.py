"""Reading a request: what of its body the gateway has to know.

Everything else in the body is the engine's business and is passed through as it came.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from service.errors import InvalidRequest
from service.link.call import trace_of
from service.types import NOBODY, Tenant

AUTO = "auto"
GENERAL = "general"
_GIVEN_ID = re.compile(rb"^[A-Za-z0-9._:-]{1,128}$")
# Where the prompt of each endpoint stands, and what type it must be.
_PROMPTS: dict[str, tuple[str, tuple[type, ...]]] = {
    "/v1/chat/completions": ("messages", (list,)),
    "/v1/messages": ("messages", (list,)),
    "/v1/messages/count_tokens": ("messages", (list,)),
    "/v1/completions": ("prompt", (str, list)),
    "/v1/embeddings": ("input", (str, list)),
    "/v1/responses": ("input", (str, list)),
    "/tokenize": ("", ()),
    "/detokenize": ("", ()),
}
ENDPOINTS = tuple(_PROMPTS)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the gateway understands it.

    `deadline_ms`: to the first token when `stream`, else to the end. `needs`: the
    capabilities that an expert must have to answer it. `trace`: its W3C trace context.
    """

    endpoint: str
    model: str
    stream: bool
    needs: frozenset[str]
    data: dict[str, Any]
    raw: bytes
    request_id: str
    client_id: str
    deadline_ms: int
    tenant: Tenant = NOBODY
    trace: Mapping[str, str] = field(default_factory=dict)

    def body_for(self, expert: str) -> bytes:
        """The body to send on: untouched where the client named this expert itself."""
        if self.data.get("model") == expert:
            return self.raw
        try:
            return orjson.dumps({**self.data, "model": expert})
        except orjson.JSONEncodeError:
            # Reading takes 1024 levels, writing 254.
            raise InvalidRequest("the body is nested too deep") from None


def read_asked(
    endpoint: str,
    raw: bytes,
    headers: dict[bytes, bytes],
    default_deadline_ms: int,
    tenant: Tenant = NOBODY,
) -> Asked:
    """Understand a request. Raises InvalidRequest, naming the field."""
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {_kind(data)}")
    model = data.get("model", AUTO)
    if not isinstance(model, str) or not model:
        what = "an empty one" if model == "" else _kind(model)
        raise InvalidRequest(f"`model` must be a non-empty string, not {what}", param="model")
    stream = data.get("stream", False)
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequest(f"`stream` must be true or false, not {_kind(stream)}", param="stream")
    _check_prompt(endpoint, data)
    request_id = secrets.token_hex(12)
    given = headers.get(b"x-request-id", b"")
    return Asked(
        endpoint=endpoint,
        model=model,
        stream=bool(stream),
        needs=_needs(endpoint, data),
        data=data,
        raw=raw,
        request_id=request_id,
        client_id=given.decode() if _GIVEN_ID.match(given) else request_id,
        deadline_ms=_deadline_ms(headers, default_deadline_ms),
        tenant=tenant,
        trace=trace_of(headers),
    )


def _check_prompt(endpoint: str, data: dict[str, Any]) -> None:
    name, kinds = _PROMPTS[endpoint]
    if not name:
        return
    if data.get(name) is None:
        raise InvalidRequest(f"`{name}` is needed", param=name)
    prompt = data[name]
    if not isinstance(prompt, kinds):
        allowed = " or ".join("a string" if kind is str else "a list" for kind in kinds)
        raise InvalidRequest(f"`{name}` must be {allowed}, not {_kind(prompt)}", param=name)
    if name == "messages" and isinstance(prompt, list):
        if not prompt:
            raise InvalidRequest("`messages` must hold at least one message", param=name)
        for i, message in enumerate(prompt):
            if not isinstance(message, dict):
                raise InvalidRequest(
                    f"`messages[{i}]` must be an object, not {_kind(message)}",
                    param=f"messages[{i}]",
                )


def _needs(endpoint: str, data: dict[str, Any]) -> frozenset[str]:
    needs: set[str] = set()
    if endpoint == "/v1/embeddings":
        needs.add("embeddings")
    elif endpoint == "/v1/completions":
        needs.add("completions")
    elif endpoint not in ("/tokenize", "/detokenize"):
        needs.add("chat")
    if data.get("tools") and data.get("tool_choice") != "none":
        needs.add("tools")
    form = data.get("response_format")
    if isinstance(form, dict) and form.get("type") in ("json_object", "json_schema"):
        needs.add("json")
    return frozenset(needs)


def _deadline_ms(headers: dict[bytes, bytes], default_ms: int) -> int:
    given = headers.get(b"x-coe-deadline-ms")
    if given is None:
        return default_ms
    if len(given) > 8 or not given.isdigit() or not 1 <= int(given) <= 86_400_000:
        raise InvalidRequest(
            "the header x-coe-deadline-ms must be an integer from 1 to 86400000",
            param="x-coe-deadline-ms",
        )
    return int(given)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")
