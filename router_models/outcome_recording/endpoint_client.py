"""Calls of an endpoint with OpenAI's API. The only place of a recording that does network I/O."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from router_models.outcome_reader import OutcomeError
from service.broker.token_prices import Price

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_MAX_REPLY_BYTES = 16 * 1024**2
_MESSAGE_CHARS = 300


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer.

    Attributes:
        text: The answer's text.
        prompt_tokens: Tokens of the prompt; None where the endpoint does not say.
        completion_tokens: Tokens of the answer; None where the endpoint does not say.
        reasoning_tokens: Those of them that are thinking; None where the endpoint does not say.
        cost: Cost in units of price, as this service tells it in `usage.coe`; else None.
        seconds: Time from sending the request to the end of the answer.
        finish_reason: `stop`, `length`, …
    """

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    reasoning_tokens: int | None
    cost: float | None
    seconds: float
    finish_reason: str | None


class CallError(Exception):
    """A call that failed.

    Attributes:
        code: The endpoint's code of the error, else a word for what happened.
        retried: Whether another try may help.
        charged: Whether the call may have cost something.
        final: Whether no other call can succeed either: a wrong key, or a spent quota.
        reached: Whether the endpoint has replied.
        retry_after_s: When the endpoint wants to be asked again.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retried: bool = False,
        charged: bool = False,
        final: bool = False,
        reached: bool = True,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retried = retried
        self.charged = charged
        self.final = final
        self.reached = reached
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Listed:
    """A model as the endpoint lists it.

    Attributes:
        kind: What it is in this service: `full`, `lora`, …, `auto`, or a recipe; empty elsewhere.
        price: Its price; None where the endpoint does not say.
    """

    kind: str
    price: Price | None


class Endpoint:
    """An endpoint, as an asynchronous context manager.

    Args:
        base_url: Its URL, with or without `/v1` at the end.
        key: The API key; None for none.
        timeout_s: Longest time of one call.
        concurrency: Most calls at once.
    """

    def __init__(
        self, base_url: str, *, key: str | None, timeout_s: float, concurrency: int
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OutcomeError(f"{base_url!r} is no URL; expected such as http://127.0.0.1:8000")
        base = base_url.rstrip("/")
        # OpenAI's clients name the folder of the version, this project's commands do not.
        self.url = base if parts.path.strip("/") else f"{base}/v1"
        self._timeout_s = timeout_s
        self._concurrency = concurrency
        self._headers = {
            # The service lets all others go first, and asks no cache.
            "x-coe-priority": "low",
            "x-coe-cache": "off",
            "x-coe-deadline-ms": str(math.ceil(timeout_s * 1000)),
        }
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Endpoint:
        """Open a session."""
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout_s, connect=30),
            connector=aiohttp.TCPConnector(limit=self._concurrency + 1),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Close the session."""
        assert self._session is not None
        await self._session.close()

    async def models(self) -> dict[str, Listed]:
        """The models that the endpoint lists. Raises CallError."""
        data = await self._call("GET", "/models", None)
        entries = data.get("data")
        found: dict[str, Listed] = {}
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict) and isinstance(entry.get("id"), str):
                coe = _object(entry.get("coe"))
                found[entry["id"]] = Listed(str(coe.get("kind", "")), _price(coe.get("price")))
        return found

    async def ask(
        self, model: str, messages: list[dict[str, str]], *, max_tokens: int, temperature: float
    ) -> Reply:
        """Ask a model once. Raises CallError."""
        begun = time.monotonic()
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        data = await self._call("POST", "/chat/completions", body)
        seconds = time.monotonic() - begun
        try:
            choice = data["choices"][0]
            text = choice["message"].get("content") or ""
            assert isinstance(text, str)
        except (LookupError, TypeError, AttributeError, AssertionError):
            raise CallError("no_answer", "the reply has no answer", charged=True) from None
        usage = _object(data.get("usage"))
        coe = _object(usage.get("coe"))
        reason = choice.get("finish_reason")
        return Reply(
            _writable(text),
            _count(usage.get("prompt_tokens")),
            _count(usage.get("completion_tokens")),
            _count(_object(usage.get("completion_tokens_details")).get("reasoning_tokens")),
            _amount(coe.get("cost")),
            seconds,
            _writable(reason) if isinstance(reason, str) else None,
        )

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        assert self._session is not None
        sent = method == "POST"
        try:
            async with self._session.request(
                method, self.url + path, json=body, allow_redirects=False
            ) as reply:
                raw = b""
                async for piece in reply.content.iter_any():
                    raw += piece
                    if len(raw) > _MAX_REPLY_BYTES:
                        raise CallError("reply_too_large", "the reply is too large", charged=sent)
                if reply.status != 200:
                    raise _failure(reply.status, raw, reply.headers.get("retry-after", ""))
        except TimeoutError:
            raise CallError(
                "timeout",
                f"no answer within {self._timeout_s:g} s",
                retried=True,
                charged=sent,
                reached=False,
            ) from None
        except aiohttp.ClientConnectorError as error:
            raise CallError(
                "unreachable", f"cannot reach {self.url}: {error}", retried=True, reached=False
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise CallError(
                "broken_off",
                f"the reply broke off ({type(error).__name__})",
                retried=True,
                charged=sent,
                reached=False,
            ) from None
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise CallError("no_json", "the reply is no JSON object", charged=sent)
        return data


def _failure(status: int, raw: bytes, retry_after: str) -> CallError:
    """The error of a reply, with the endpoint's own message where it has OpenAI's form."""
    code, message = f"status_{status}", f"the endpoint replied with status {status}"
    try:
        error = json.loads(raw)["error"]
        message = _writable(str(error["message"]))[:_MESSAGE_CHARS]
        code = _writable(str(error.get("code") or error.get("type") or code))[:100]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    spent = code in ("insufficient_quota", "billing_hard_limit_reached")
    return CallError(
        code,
        message,
        retried=status in _RETRIED and not spent,
        final=spent or status in (401, 403),
        retry_after_s=float(retry_after) if retry_after.isdecimal() else 0.0,
    )


def _price(data: Any) -> Price | None:
    if not isinstance(data, dict):
        return None
    prompt, completion = _amount(data.get("prompt")), _amount(data.get("completion"))
    return Price(prompt, completion) if prompt is not None and completion is not None else None


def _writable(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can name and UTF-8 can't write."""
    return text.encode(errors="replace").decode()


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _amount(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


async def backoff(attempt: int, asked_s: float, jitter: float) -> None:
    """Wait before the next attempt: 1, 2, 4, … s up to 30 s, or as the endpoint asked.

    Args:
        attempt: How many attempts have failed.
        asked_s: What the endpoint asked for; no more than 60 s are waited.
        jitter: In [0, 1), how much of the last half is waited.
    """
    wait_s = min(30.0, 2.0 ** (attempt - 1)) * (0.5 + 0.5 * jitter)
    await asyncio.sleep(max(wait_s, min(asked_s, 60.0)))
