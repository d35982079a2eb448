"""`coe chat`: a conversation in the terminal that shows the route of each answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from service.cli.http_client import url_option
from service.cli.sse_client import api_headers, events, open_stream
from service.errors import CoeError

_STEPS = ("route", "queue", "swap", "prefill", "decode")


@click.command()
@click.argument("prompt", required=False)
@url_option
@click.option(
    "--model", "-m", default="auto", show_default=True, help="Such as auto, auto:fast or code."
)
@click.option("--max-tokens", default=256, show_default=True, help="Longest answer, in tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per answer.")
def chat(prompt: str | None, url: str, model: str, max_tokens: int, as_json: bool) -> None:
    """Chat with the experts; under each answer stand its expert, the reason, and the times.

    PROMPT gets one answer. Without it a conversation starts; Ctrl-D ends it. $COE_API_KEY holds
    the API key for a service that needs one.
    """
    messages: list[dict[str, str]] = []

    def ask(text: str) -> None:
        messages.append({"role": "user", "content": text})
        body = {"model": model, "messages": messages, "max_tokens": max_tokens}
        write: Callable[[str], None] = (lambda piece: None) if as_json else _write
        reply = _answer(url, body, write)
        messages.append({"role": "assistant", "content": reply["answer"]})
        if as_json:
            click.echo(json.dumps(reply))
        else:
            click.echo("\n" + click.style(_route_line(reply), dim=True))

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


def _write(piece: str) -> None:
    click.echo(piece, nl=False)


def _answer(url: str, body: dict[str, Any], write: Callable[[str], None]) -> dict[str, Any]:
    """Stream one answer, and return it with its route.

    Raises:
        CoeError: The service refused, or the stream broke off.
    """
    request = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with open_stream(url, "/v1/chat/completions", api_headers(), request) as reply:
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
                write(piece)
    coe = usage.pop("coe", {}) if usage else {}
    return {
        "answer": text,
        "expert": head.get("x-coe-expert", body["model"]),
        "category": head.get("x-coe-category"),
        "confidence": float(head["x-coe-confidence"]) if "x-coe-confidence" in head else None,
        "route": coe,
        "usage": usage,
    }


def _route_line(reply: dict[str, Any]) -> str:
    """Format expert, recipe, category, times, tokens and cost as one line."""
    route = reply["route"]
    parts = [str(reply["expert"])]
    if route.get("recipe") and route["recipe"] != reply["expert"]:
        parts[0] += f" by {route['recipe']}"
    if reply["category"]:
        parts.append(f"{reply['category']}, {reply['confidence']:.0%} sure")
    times = [f"{step} {_ms(route[f'{step}_ms'])}" for step in _STEPS if f"{step}_ms" in route]
    if times:
        parts.append(", ".join(times))
    tokens = reply["usage"].get("completion_tokens")
    if tokens is not None:
        parts.append(f"{tokens} tokens")
    if route.get("cost"):
        parts.append(f"cost {route['cost']:.3g}")
    return "↳ " + " · ".join(parts)


def _ms(value: float) -> str:
    return f"{value / 1000:.1f} s" if value >= 1000 else f"{value:.3g} ms"
