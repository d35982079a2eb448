"""Refuses requests that are too large or nested too deep, or that name files, URLs or code.

The gateway checks this for all experts. A local vLLM would refuse some of these requests by its own
settings, but a remote endpoint may accept them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from service.config import Config
from service.errors import DisallowedFieldError, HeadersTooLargeError, InvalidRequestError
from service.gateway.request.media_tokens import INNER, PARTS_DEEP, inner_parts, top_parts
from service.gateway.request.structured_outputs import StructuredOutputBounds

# Fields that make an engine load, fetch or run what the client names.
_FORBIDDEN = {
    "chat_template": "the expert's own chat template is used",
    "mm_processor_kwargs": "how media are processed is the operator's to set",
    "media_io_kwargs": "how media are read is the operator's to set",
    "prompt_embeds": "embeddings in place of a prompt are not accepted",
    "kv_transfer_params": "where caches are moved to is the operator's to set",
    "ec_transfer_params": "where caches are moved to is the operator's to set",
    "vllm_xargs": "arguments for plug-ins are the operator's to set",
    "logits_processors": "code in a request is not accepted",
    "lora_path": "adapters are the operator's to load; name an expert instead",
    "lora_request": "adapters are the operator's to load; name an expert instead",
    "mcp_servers": "the service calls no servers that a request names",
    "container": "the service runs no code for a request",
    "background": "a request runs while its client waits; `POST /v1/batches` runs others",
    "previous_response_id": "no responses are stored for it; send the conversation as `input`",
    "conversation": "no conversations are stored for it; send the conversation as `input`",
    "priority": "a request's priority is its tenant's",
    "return_mm_kwargs": "an engine's insides are not given out",
    "include_server_logs": "an engine's insides are not given out",
}
# Tools that the client runs itself. Other tools would make the service fetch or run something.
_CLIENT_TOOLS = frozenset({"function", "custom", "namespace", None})
# Keys of a content part that hold an address (`_ADDRESSES`), or that name a file or an object in
# memory (`_FILES`). The part's type does not matter, because vLLM decides by the keys if the part
# has a uuid or no type.
_ADDRESSES = (
    *("image_url", "audio_url", "video_url", "file_url", "url", "input_image"),
    # The processors of some servers use these names, and also accept paths.
    *("image", "audio", "video", "input_video"),
)
# In a part of these types, `url` is never fetched. It may be the source of a quotation.
_TEXT = frozenset({"text", "input_text", "output_text", "refusal", "thinking", "reasoning_text"})
_EMBEDDED = ("image_embeds", "audio_embeds", "video_embeds", "prompt_embeds", "image_pil")
_FILES = ("file_id", "file", "path", *_EMBEDDED)
# A JSON string. A string without an end matches up to the end of the body. Otherwise the search
# would begin again at each of its quotes, and take quadratic time.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
# Characters that URL parsers interpret in different ways.
_ODD = re.compile(r"[\s\\@\x00-\x20\x7f]|[^\x00-\x7f]")
_BRACKETS = b"[]{}"
_NO_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))
_TURN = np.zeros(256, np.int8)
_TURN[list(b"[{")] = 1
_TURN[list(b"]}")] = -1


class RequestLimitChecker:
    """Checks requests against the limits of a config."""

    def __init__(self, config: Config) -> None:
        self._limits = config.server.limits
        self._structured_outputs = StructuredOutputBounds(config.server.limits)
        self._hosts = frozenset(
            host.lower() for pool in config.pools.values() for host in pool.vllm.media_domains
        )

    def headers(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Check the number and size of the headers.

        Raises:
            HeadersTooLargeError: There are too many headers, or they have too many bytes.
        """
        count = size = 0
        for name, value in headers:
            count += 1
            size += len(name) + len(value)
        most = self._limits
        if count > most.max_headers:
            raise HeadersTooLargeError(
                f"the request has {count} headers; at most {most.max_headers} are allowed"
            )
        if size > most.max_header_bytes:
            raise HeadersTooLargeError(
                f"the headers have {size} bytes; at most {most.max_header_bytes} are allowed"
            )

    def shape(self, raw: bytes, wrapped: int = 0) -> None:
        """Check the depth and the number of values of a body before it is parsed.

        Args:
            raw: The body.
            wrapped: The levels of JSON around it that are not its own, as in a line of a batch.

        Raises:
            InvalidRequestError: The body is nested too deep, or has too many values.
        """
        most = self._limits
        deepest, values = most.max_json_depth + wrapped, most.max_json_values + 8 * wrapped
        opened = raw.count(b"[") + raw.count(b"{")
        if opened <= deepest and raw.count(b",") + opened <= values:
            return
        bare = _STRING.sub(b"", raw)
        count = bare.count(b",") + bare.count(b"[") + bare.count(b"{")
        if count > values:
            raise InvalidRequestError(
                f"the body has about {count} values; at most {most.max_json_values} are allowed"
            )
        turns = _TURN[np.frombuffer(bare.translate(None, _NO_BRACKETS), np.uint8)]
        depth = int(turns.cumsum(dtype=np.int64).max(initial=0))
        if depth > deepest:
            raise InvalidRequestError(
                f"the body is nested {depth} levels deep; at most {most.max_json_depth} are allowed"
            )

    def fields(self, data: Mapping[str, Any]) -> None:
        """Check the fields of a parsed body.

        Raises:
            DisallowedFieldError: A field would open a file or URL, or run code.
            InvalidRequestError: A constraint is too large, or a part is nested too deep.
        """
        for name in _FORBIDDEN.keys() & data.keys():
            # vLLM's clients send some of these fields with default values.
            if data[name] not in (None, False, 0, {}, []):
                raise DisallowedFieldError(
                    f"`{name}` is not allowed: {_FORBIDDEN[name]}", param=name
                )
        self._structured_outputs.check(data)
        self._template_kwargs(data.get("chat_template_kwargs"))
        for i, tool in enumerate(_list(data.get("tools"))):
            # A namespace contains further tools.
            inner = _list(tool.get("tools")) if isinstance(tool, dict) else []
            for entry in (tool, *inner):
                if isinstance(entry, dict) and _type_of(entry) not in _CLIENT_TOOLS:
                    raise DisallowedFieldError(
                        f"`tools[{i}]`: the service runs no tools of its own; only tools of type "
                        "function, custom or namespace, which the client runs, are allowed",
                        param="tools",
                    )
        for where, item in top_parts(data):
            self._part(item, where, PARTS_DEEP)

    def _template_kwargs(self, given: object) -> None:
        if not isinstance(given, dict):
            return  # The engine refuses it with its own error.
        allowed = self._limits.chat_template_kwargs
        for name, value in given.items():
            if name not in allowed:
                raise DisallowedFieldError(
                    f"`chat_template_kwargs.{name[:64]}` is not allowed; "
                    f"allowed: {', '.join(allowed) or 'none'}",
                    param="chat_template_kwargs",
                )
            if not isinstance(value, (str, int, float, bool, type(None))):
                raise DisallowedFieldError(
                    f"`chat_template_kwargs.{name}` must be a string, a number or a boolean",
                    param="chat_template_kwargs",
                )

    def _part(self, part: Mapping[str, Any], where: str, deep: int) -> None:
        """Check a message, a part of its content, or a part within a part."""
        for name in _ADDRESSES:
            if name in part and (name != "url" or _type_of(part) not in _TEXT):
                self._address(part[name], f"{where}.{name}")
        if _type_of(part) in _EMBEDDED:
            raise DisallowedFieldError(
                f"`{where}` is not allowed: embeddings in place of a prompt are not accepted",
                param=where,
            )
        for name in _FILES:
            if part.get(name) is not None:
                raise DisallowedFieldError(
                    f"`{where}.{name}` is not allowed: a request can't name files", param=where
                )
        if deep == 0:
            if any(isinstance(part.get(name), (dict, list)) for name in INNER):
                raise InvalidRequestError(
                    f"`{where}` has parts within parts more than {PARTS_DEEP} levels deep",
                    param=where.partition("[")[0],
                )
            return
        for name, inner in inner_parts(part):
            self._part(inner, f"{where}.{name}", deep - 1)

    def _address(self, given: object, where: str) -> None:
        if isinstance(given, dict):
            given = given.get("url")
        if given is None:
            return
        if not isinstance(given, str):
            raise DisallowedFieldError(f"`{where}` must be a string", param=where)
        # This check comes before the URL is parsed, because a data URL may have megabytes.
        if given[:5].lower() == "data:":
            return
        if _host(given) in self._hosts:
            return
        allowed = ", ".join(sorted(self._hosts))
        raise DisallowedFieldError(
            f"`{where}` is not allowed: "
            + (f"data URLs and the hosts {allowed} are" if allowed else "only data URLs are"),
            param=where,
        )


def _type_of(part: Mapping[str, Any]) -> str | None:
    """The type of a part; None if it has none, and empty if its type is no string."""
    given = part.get("type")
    return given if given is None or isinstance(given, str) else ""


def _host(url: str) -> str | None:
    """The host of an http or https URL; None if URL parsers may disagree about it."""
    if len(url) > 4096 or _ODD.search(url):
        return None
    try:
        parts = urlsplit(url)
        return parts.hostname if parts.scheme in ("http", "https") else None
    except ValueError:
        return None


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
