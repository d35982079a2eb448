"""`coe init`: from a machine to a config that fits it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from service.cli.output import size, table
from service.errors import CoeError


@click.command()
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("coe.yaml"),
    show_default=True,
    help="The config file to write.",
)
@click.option("--yes", "-y", is_flag=True, help="Take the best that fits, and ask nothing.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found, as one JSON object.")
def init(output: Path, yes: bool, force: bool, as_json: bool) -> None:
    """Look at this machine, propose a composition that fits, write a commented config.

    Fetches nothing: `coe serve` fetches what the config names.
    """
    import router_models
    from service.cli.machine import look
    from service.cli.presets import config_text, describe, propose
    from service.models import model_root

    if output.exists() and not force:
        raise CoeError(f"{output} is there already; --force writes over it, -o names another")
    machine = look(model_root())
    proposals = propose(machine)
    chosen = proposals[0]
    if not as_json:
        click.echo(f"this machine: {describe(machine)}")
        rows = [
            (
                str(i),
                one.name,
                one.licence,
                "GPU" if one.on_gpu else "CPU",
                "all at once" if one.slots is None else "take turns",
                size(one.download_bytes),
                size(one.needs_bytes),
            )
            for i, one in enumerate(proposals, start=1)
        ]
        table(("", "composition", "licence", "on", "experts", "to fetch", "memory"), rows)
    if not yes and not as_json:
        number = click.prompt("which", type=click.IntRange(1, len(proposals)), default=1)
        chosen = proposals[number - 1]
    artifacts = Path(router_models.__file__).resolve().parent
    output.write_text(config_text(chosen, machine, artifacts), encoding="utf-8")
    if as_json:
        found = {"machine": asdict(machine), "proposals": [asdict(one) for one in proposals]}
        click.echo(json.dumps({**found, "chosen": chosen.name, "config": str(output)}))
        return
    click.echo(f"wrote {output}: coe serve -c {output}")
