"""`coe moe place`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.cli.output import table

if TYPE_CHECKING:
    from router_models.moe.placement_plan import Plan

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option(
    "--loads", type=_FILE, required=True, help="What GET /admin/experts/NAME/moe answered."
)
@click.option("--devices", type=click.IntRange(2, 1024), required=True, help="GPUs of one engine.")
@click.option(
    "--replicas",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Copies of hot experts in each layer.",
)
@click.option("--out", type=_FILE, help="Write the placement here, as JSON; a new file.")
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Time for the exact solver.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def place(
    loads: Path, devices: int, replicas: int, out: Path | None, seconds: float, as_json: bool
) -> None:
    """Spread routed experts over devices, by recorded loads. The outcome is simulated."""
    from router_models.moe import placement_plan as work

    if out is not None and out.exists():
        raise work.PlacementError(f"{out}: exists already; placements are not written over")
    layers, recorded = work.read_loads(loads)
    plan = work.make_plan(
        layers,
        recorded,
        devices=devices,
        replicas=replicas,
        time_limit_s=seconds,
        clock=time.monotonic,
    )
    told = work.as_json(plan)
    if out is not None:
        out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(told))
    else:
        _print(plan, told["vllm"])


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
                way.name + (" (best)" if way is plan.best else ""),
                f"{way.cost:.3f}",
                f"{way.worst:.3f}",
                f"{way.exact} of {len(plan.layers)} layers" if way.exact else "",
            )
            for way in plan.ways
        ],
    )
    click.echo("\nvLLM takes no map of experts to devices; what it takes, for the pool:\n")
    click.echo(yaml.safe_dump({"vllm": options}, sort_keys=False).rstrip())
    if options.get("enable_eplb"):
        click.echo(
            "\nEPLB starts with neighbours together, and moves experts by the loads that it sees."
        )
