"""`coe init`: writes a config that fits this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from service.cli.table_output import size, table
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
@click.option("--yes", "-y", is_flag=True, help="Take the first proposal without a question.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print machine and proposals as JSON.")
def init(output: Path, yes: bool, force: bool, as_json: bool) -> None:
    """Inspect this machine, propose compositions that fit, and write a commented config.

    It fetches nothing; `coe serve` fetches the models that the config names.
    """
    import router_models
    from service.cli.compose.shipped_composition import shipped_map, write_composed
    from service.cli.init_proposals import config_text, describe, propose, unused_gpus
    from service.cli.machine_resources import inspect_machine
    from service.models import model_root

    if output.exists() and not force:
        raise CoeError(f"{output} exists; --force overwrites it, -o names another file")
    machine = inspect_machine(model_root())
    if unused := unused_gpus(machine):
        click.echo(f"coe: note: {unused}", err=True)
    artifacts = Path(router_models.__file__).resolve().parent
    shipped = shipped_map(artifacts / "artifacts")
    if shipped is not None and (told := write_composed(shipped, machine, output)) is not None:
        if as_json:
            about = {"machine": asdict(machine), "composed": told, "config": str(output)}
            click.echo(json.dumps(about))
            return
        click.echo(f"this machine: {describe(machine)}\nbought: {told}")
        click.echo(f"wrote {output}: coe serve -c {output}")
        return
    proposals = propose(machine)
    chosen = proposals[0]
    if not as_json:
        click.echo(f"this machine: {describe(machine)}")
        rows = [
            (
                str(i),
                proposal.name,
                proposal.licence,
                "GPU" if proposal.on_gpu else "CPU",
                "all resident" if proposal.slots is None else "take turns",
                size(proposal.download_bytes),
                size(proposal.required_bytes),
            )
            for i, proposal in enumerate(proposals, start=1)
        ]
        table(("", "composition", "licence", "device", "experts", "download", "memory"), rows)
    if not yes and not as_json:
        number = click.prompt("which", type=click.IntRange(1, len(proposals)), default=1)
        chosen = proposals[number - 1]
    output.write_text(config_text(chosen, machine, artifacts), encoding="utf-8")
    if as_json:
        found = {"machine": asdict(machine), "proposals": [asdict(p) for p in proposals]}
        click.echo(json.dumps({**found, "chosen": chosen.name, "config": str(output)}))
        return
    click.echo(f"wrote {output}: coe serve -c {output}")
