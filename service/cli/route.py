"""`coe route`: shows which expert would answer a prompt, and why."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.check import CONFIG
from service.cli.http_client import ask
from service.cli.table_output import table

if TYPE_CHECKING:
    from service.gateway.request.parsing import InferenceRequest
    from service.gateway.routing.route_plan import RoutePlan
    from service.gateway.routing.routing_setup import RoutingSetup

_ENCODER_START_S = 30.0


@click.command()
@click.argument("prompt")
@click.option(
    "--config",
    "-c",
    "path",
    type=CONFIG,
    default=Path("deploy/config/demo.yaml"),
    show_default=True,
    help="Config with experts and router.",
)
@click.option("--url", help="Ask this running service instead, with its queues and swaps.")
@click.option(
    "--model",
    default="auto",
    show_default=True,
    help="Such as auto, auto:fast or auto/code, or an alias.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def route(prompt: str, path: Path, url: str | None, model: str, as_json: bool) -> None:
    """Show which expert would answer PROMPT, and why. Without --url no service is needed."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    decision = _remote_decision(url, body) if url is not None else _local_decision(path, body)
    if as_json:
        click.echo(json.dumps(decision))
        return
    if alias := decision.get("alias"):
        click.echo(f"alias     {alias['name']} → {alias['target']}")
    click.echo(f"chosen    {decision['chosen']}  ({decision['reason']})")
    click.echo(
        f"category  {decision['category'] or '-'}  (confidence {decision['confidence']:.2f}"
        + (f", by {decision['stage']})" if decision.get("stage") else ")")
    )
    if decision["posterior"]:
        ranked = sorted(decision["posterior"].items(), key=lambda pair: -pair[1])
        click.echo("posterior " + ", ".join(f"{label} {p:.3f}" for label, p in ranked))
    columns = ("quality", "cost", "wait_s", "swap_s", "answer_s", "displaced_s", "utility")
    rows = [
        (
            candidate["recipe"],
            candidate["pool"] or "",
            *("" if candidate[name] is None else f"{candidate[name]:.3g}" for name in columns),
            candidate["why"],
        )
        for candidate in decision["candidates"]
    ]
    table(("candidate", "pool", *columns, "why"), rows)


def _remote_decision(url: str, body: dict[str, Any]) -> Any:
    return ask(url, "POST", "/v1/route", {"content-type": "application/json"}, json.dumps(body))


async def _plan(routing: RoutingSetup, request: InferenceRequest) -> RoutePlan:
    """Plan a request by every stage, with a running encoder if the config has one."""
    from service.encoder.shared_encoders import SharedEncoders

    await routing.stages.start(SharedEncoders())
    try:
        await routing.stages.wait_prepared(_ENCODER_START_S)
        return await routing.planner.plan_by_all_stages(request)
    finally:
        await routing.stages.stop()


def _local_decision(path: Path, body: dict[str, Any]) -> dict[str, Any]:
    """Return the decision as if every expert were resident and idle."""
    from service.broker.pool_state import PoolStateTable, idle_view
    from service.broker.selection import select
    from service.config import load_config
    from service.default_prices import with_default_prices
    from service.gateway.request.expert_defaults import RequestDefaults
    from service.gateway.request.parsing import parse_request
    from service.gateway.routing.alias_resolution import AliasResolution
    from service.gateway.routing.candidate_planner import selection_request
    from service.gateway.routing.decision_explanation import explain
    from service.gateway.routing.routing_setup import RoutingSetup

    config = with_default_prices(load_config(path))
    raw = json.dumps(body).encode()
    request = parse_request("/v1/chat/completions", raw, {}, config.server.deadline_ms)
    request = AliasResolution(config).resolve(request)
    routing = RoutingSetup(config)
    plan = asyncio.run(_plan(routing, request))
    pool_matrix = PoolStateTable(routing.catalog.index).to_matrix(
        [idle_view(routing.catalog.experts)]
    )
    added = RequestDefaults(config).added(request, routing.catalog.experts)
    wanted = selection_request(routing.cost_model, request, plan, added=added)
    selection = select(routing.catalog, pool_matrix, wanted)
    left_out = routing.planner.left_out(request, plan)
    return explain(plan, selection, request.alias, left_out)
