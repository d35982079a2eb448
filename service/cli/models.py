"""`coe models`: what is on this machine, and fetching more."""

from __future__ import annotations

import json
from pathlib import Path

import click

from service.cli.show import size, table


@click.group()
def models() -> None:
    """The models on this machine."""


@models.command()
@click.argument("name", required=False)
@click.option(
    "--config",
    "-c",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Fetch what this config needs and is not here, instead of NAME.",
)
@click.option("--pool", "kind", help="With --config: only what pools of this kind need.")
@click.option("--models-dir", type=click.Path(path_type=Path), help="Where models are kept.")
def pull(
    name: str | None, config_path: Path | None, kind: str | None, models_dir: Path | None
) -> None:
    """Fetch NAME: a name of the built-in catalogue, a folder, or ORG/REPO on the hub."""
    from service.models import locate
    from service.models import pull as fetch

    if (name is None) == (config_path is None):
        raise click.UsageError("give NAME or --config")
    if name is not None:
        click.echo(fetch(name, dest_root=models_dir))
        return
    assert config_path is not None
    for source, root in _needed(config_path, kind, models_dir):
        click.echo(locate(source, root=root) or fetch(source, dest_root=root))


def _needed(
    config_path: Path, kind: str | None, models_dir: Path | None
) -> list[tuple[str, Path | None]]:
    from service.config import load_config

    config = load_config(config_path)
    if kind is not None and kind not in config.pools:
        kinds = ", ".join(sorted(config.pools))
        raise click.UsageError(f"{config_path}: no pools of kind {kind!r}; it has: {kinds}")
    sources = config.model_sources(kind)
    root = models_dir or (Path(config.models_dir) if config.models_dir else None)
    return [(source, root) for source in dict.fromkeys(sources.values())]


@models.command(name="list")
@click.option("--models-dir", type=click.Path(path_type=Path), help="Where models are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_(models_dir: Path | None, as_json: bool) -> None:
    """What is here, and what the built-in catalogue has."""
    from service.models import CATALOGUE, list_models

    stored = list_models(models_dir)
    names = {model.name for model in stored}
    rows = [
        {
            "name": model.name,
            "state": "complete" if model.complete else "damaged",
            "bytes": model.bytes,
            "licence": model.licence,
            "source": model.source,
            "path": str(model.path),
        }
        for model in stored
    ]
    rows += [
        {"name": name, "state": "not here", "licence": entry.licence, "source": "catalogue"}
        for name, entry in CATALOGUE.items()
        if name not in names
    ]
    if as_json:
        click.echo(json.dumps({"models": rows}))
        return
    table(
        ("name", "state", "size", "licence", "source"),
        [
            (
                str(row["name"]),
                str(row["state"]),
                size(row["bytes"]) if "bytes" in row else "",
                str(row["licence"] or "unknown"),
                str(row["source"]),
            )
            for row in rows
        ],
    )
