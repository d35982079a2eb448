"""`coe moe place`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.cli.table_output import table

if TYPE_CHECKING:
    from router_models.moe.placement_plan import Plan

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option("--loads", type=_FILE, required=True, help="Reply of GET /admin/experts/NAME/moe.")
@click.option("--devices", type=click.IntRange(2, 1024), required=True, help="GPUs of one engine.")
@click.option(
    "--replicas",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Redundant copies of busy routed experts in each layer.",
)
@click.option("--out", type=_FILE, help="New file for the placement, as JSON.")
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Time limit of the exact solver.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def place(
    loads: Path, devices: int, replicas: int, out: Path | None, seconds: float, as_json: bool
) -> None:
    """Spread routed experts over devices by recorded loads. The result is simulated."""
    from router_models.moe import placement_plan as work

    if out is not None and out.exists():
        raise work.PlacementError(f"{out} exists already; placements do not overwrite files")
    layers, recorded = work.read_loads(loads)
    plan = work.make_plan(
        layers,
        recorded,
        devices=devices,
        replicas=replicas,
        time_limit_s=seconds,
        clock=time.monotonic,
    )
    payload = work.as_json(plan)
    if out is not None:
        out.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(payload))
    else:
        _print(plan, payload["vllm"])


def _print(plan: Plan, options: dict[str, object]) -> None:
    import yaml

    experts = len(plan.loads[0])
    copies = f", {plan.replicas} copies" if plan.replicas else ""
    click.echo(
        f"{experts} experts{copies} on {plan.devices} devices, {len(plan.layers)} layers; "
        "time of a step against perfectly shared work, simulated from the loads:\n"
    )
    table(
        ("placement", "all layers", "worst layer", "nothing better possible"),
        [
            (
                placement.name + (" (best)" if placement is plan.best else ""),
                f"{placement.cost:.3f}",
                f"{placement.worst:.3f}",
                f"{placement.exact} of {len(plan.layers)} layers" if placement.exact else "",
            )
            for placement in plan.ways
        ],
    )
    click.echo("\nvLLM takes no map of experts to devices. The pool's options for vLLM:\n")
    click.echo(yaml.safe_dump({"vllm": options}, sort_keys=False).rstrip())
    if options.get("enable_eplb"):
        click.echo(
            "\nEPLB starts with neighbouring experts on one device, and moves them by their loads."
        )
