"""`coe chat`: a conversation in the terminal, with the route under each answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from service.cli.http import url_option
from service.cli.sse import api_headers, events, open_stream
from service.errors import CoeError

_STEPS = ("route", "queue", "swap", "prefill", "decode")


@click.command()
@click.argument("prompt", required=False)
@url_option
@click.option("--model", "-m", default="auto", show_default=True, help="auto, auto:fast, code, …")
@click.option("--max-tokens", default=256, show_default=True, help="Longest answer, in tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per answer.")
def chat(prompt: str | None, url: str, model: str, max_tokens: int, as_json: bool) -> None:
    """Talk to the experts; under each answer, who gave it, why, and where the time went.

    With PROMPT, one answer; without, a conversation (Ctrl-D ends it). $COE_API_KEY is shown
    to a service that asks for keys.
    """
    messages: list[dict[str, str]] = []

    def ask(text: str) -> None:
        messages.append({"role": "user", "content": text})
        body = {"model": model, "messages": messages, "max_tokens": max_tokens}
        say: Callable[[str], None] = (lambda piece: None) if as_json else _say
        told = _answer(url, body, say)
        messages.append({"role": "assistant", "content": told["answer"]})
        if as_json:
            click.echo(json.dumps(told))
        else:
            click.echo("\n" + click.style(_route_line(told), dim=True))

    if prompt is not None:
        ask(prompt)
        return
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            try:
                text = click.prompt(click.style("you", bold=True), prompt_suffix=" › ")
            except click.Abort:
                click.echo()
                return
        else:
            text = sys.stdin.readline()
            if not text:
                return
        if text.strip():
            try:
                ask(text.strip())
            except CoeError as error:
                messages.pop()
                if not interactive:
                    raise
                click.echo(f"coe: {error.message}", err=True)


def _say(piece: str) -> None:
    click.echo(piece, nl=False)


def _answer(url: str, body: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Stream one answer. Raises CoeError."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with open_stream(url, "/v1/chat/completions", api_headers(), asked) as reply:
        head = {name.lower(): value for name, value in reply.headers.items()}
        text = ""
        usage: dict[str, Any] = {}
        for _, data in events(reply):
            if data == "[DONE]":
                break
            chunk = json.loads(data)
            if "error" in chunk:
                raise CoeError(chunk["error"]["message"])
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                piece = choice.get("delta", {}).get("content") or ""
                text += piece
                say(piece)
    coe = usage.pop("coe", {}) if usage else {}
    return {
        "answer": text,
        "expert": head.get("x-coe-expert", body["model"]),
        "category": head.get("x-coe-category"),
        "confidence": float(head["x-coe-confidence"]) if "x-coe-confidence" in head else None,
        "route": coe,
        "usage": usage,
    }


def _route_line(told: dict[str, Any]) -> str:
    """Who, why, and where the time went, in one line."""
    route = told["route"]
    parts = [str(told["expert"])]
    if route.get("recipe") and route["recipe"] != told["expert"]:
        parts[0] += f" by {route['recipe']}"
    if told["category"]:
        parts.append(f"{told['category']}, {told['confidence']:.0%} sure")
    times = [f"{step} {_ms(route[f'{step}_ms'])}" for step in _STEPS if f"{step}_ms" in route]
    if times:
        parts.append(", ".join(times))
    tokens = told["usage"].get("completion_tokens")
    if tokens is not None:
        parts.append(f"{tokens} tokens")
    if route.get("cost"):
        parts.append(f"cost {route['cost']:.3g}")
    return "↳ " + " · ".join(parts)


def _ms(value: float) -> str:
    return f"{value / 1000:.1f} s" if value >= 1000 else f"{value:.3g} ms"
