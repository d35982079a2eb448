"""`coe route`: who would answer, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from service.cli.http import ask
from service.cli.output import table
from service.cli.serve import CONFIG


@click.command()
@click.argument("prompt")
@click.option(
    "--config",
    "-c",
    "path",
    type=CONFIG,
    default=Path("deploy/config/demo.yaml"),
    show_default=True,
    help="The config whose experts and router decide.",
)
@click.option("--url", help="Ask this running service instead: with its queues and swaps.")
@click.option("--model", default="auto", show_default=True, help="auto, auto:fast, auto/code, …")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def route(prompt: str, path: Path, url: str | None, model: str, as_json: bool) -> None:
    """Show which expert would answer PROMPT, and why. Without --url it needs no service."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    told = _route_there(url, body) if url is not None else _route_here(path, body)
    if as_json:
        click.echo(json.dumps(told))
        return
    click.echo(f"chosen    {told['chosen']}  ({told['reason']})")
    click.echo(f"category  {told['category'] or '-'}  (confidence {told['confidence']:.2f})")
    if told["posterior"]:
        ranked = sorted(told["posterior"].items(), key=lambda pair: -pair[1])
        click.echo("posterior " + ", ".join(f"{label} {p:.3f}" for label, p in ranked))
    columns = ("quality", "cost", "wait_s", "swap_s", "answer_s", "displaced_s", "utility")
    rows = [
        (
            one["recipe"],
            one["pool"] or "",
            *("" if one[name] is None else f"{one[name]:.3g}" for name in columns),
            one["why"],
        )
        for one in told["candidates"]
    ]
    table(("candidate", "pool", *columns, "why"), rows)


def _route_there(url: str, body: dict[str, Any]) -> Any:
    return ask(url, "POST", "/v1/route", {"content-type": "application/json"}, json.dumps(body))


def _route_here(path: Path, body: dict[str, Any]) -> dict[str, Any]:
    """The decision as if every expert were resident and idle."""
    from service.broker.pool_state import PoolStateTable, idle_view
    from service.broker.selection import select
    from service.config import load_config
    from service.gateway.request.parsing import parse_request
    from service.gateway.routes.explain import explain
    from service.gateway.routing.selection_request import selection_request
    from service.gateway.routing.setup import RoutingSetup

    config = load_config(path)
    raw = json.dumps(body).encode()
    asked = parse_request("/v1/chat/completions", raw, {}, config.server.deadline_ms)
    routing = RoutingSetup(config)
    plan = routing.router.plan(asked)
    standing = PoolStateTable(routing.book.index).standing([idle_view(routing.book.experts)])
    return explain(
        plan, select(routing.book, standing, selection_request(routing.market, asked, plan))
    )
