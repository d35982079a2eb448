"""An OpenAI-like server whose models answer, review and aggregate by scripts."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from service.http.asgi_helpers import read_body

_FENCED = re.compile(r"(Answer \d+|Best answer so far|Correction \d+)\n<<(\w+)\n(.*?)\n\2>>", re.S)

# Reviews by the shown answers, in order: each a score from 0 to 10.
Judge = Callable[[str], float]


def text_of(body: Mapping[str, Any]) -> str:
    """The text of the last message."""
    content = body["messages"][-1]["content"]
    if isinstance(content, list):
        return "\n".join(part.get("text", "") for part in content)
    return str(content)


def shown_in(text: str) -> list[tuple[str, str]]:
    """The fenced texts of a prompt with their titles."""
    return [(found[0], found[2]) for found in _FENCED.findall(text)]


def role_of(body: Mapping[str, Any]) -> str:
    """What a call is for, by its prompt."""
    text = text_of(body)
    if "You review answers" in text:
        return "review"
    if "Several experts answered" in text:
        return "aggregate"
    return "revise" if "Best answer so far" in text else "answer"


@dataclass
class ScriptedExperts:
    """The server.

    Attributes:
        lines: What each model answers at first, and then in further rounds.
        judges: How each model scores an answer; others write no review.
        corrections: What each reviewer wants corrected.
        takes_s: Seconds that a model needs for a role.
        broken: Models and roles that fail.
        asked: Every body, in order.
    """

    lines: dict[str, list[str]]
    judges: dict[str, Judge] = field(default_factory=dict)
    corrections: dict[str, str] = field(default_factory=dict)
    takes_s: dict[tuple[str, str], float] = field(default_factory=dict)
    broken: set[tuple[str, str]] = field(default_factory=set)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def roles(self, role: str) -> list[dict[str, Any]]:
        """The bodies of the calls of one role."""
        return [body for body in self.asked if role_of(body) == role]

    def _text(self, model: str, role: str, body: Mapping[str, Any]) -> str:
        if role == "review":
            judge = self.judges.get(model)
            if judge is None:
                return "All of them are nice."
            said = self.corrections.get(model, "")
            return "\n".join(
                f"{title}: {judge(text):g} - {said}" for title, text in shown_in(text_of(body))
            )
        if role == "aggregate":
            return "together: " + " + ".join(sorted(text for _, text in shown_in(text_of(body))))
        lines = self.lines[model]
        return lines[0] if role == "answer" else lines[min(len(lines), 2) - 1]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one call."""
        body = json.loads(await read_body(receive, 10**6))
        model, role = body["model"], role_of(body)
        self.asked.append(body)
        text = self._text(model, role, body)
        if (takes_s := self.takes_s.get((model, role), 0.0)) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(receive(), takes_s)
                return  # the caller has left
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        head = {"id": "chatcmpl-x", "created": 1, "model": model}
        kind = b"application/json"
        if (model, role) in self.broken:
            data = b'{"error": {"message": "broken", "type": "server_error"}}'
        elif body.get("stream"):
            kind = b"text/event-stream"
            data = b""
            for word in text.split(" "):
                choice = {"index": 0, "delta": {"content": word + " "}, "finish_reason": None}
                data += b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"
            last = json.dumps({**head, "choices": [], "usage": usage}, separators=(",", ":"))
            data += b"data: " + last.encode() + b"\n\ndata: [DONE]\n\n"
        else:
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            data = json.dumps({**head, "choices": [choice], "usage": usage}).encode()
        status = 500 if (model, role) in self.broken else 200
        start = {"type": "http.response.start", "status": status}
        await send({**start, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": data})
