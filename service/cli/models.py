"""`coe models`: lists the models on this machine, and fetches more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click

from service.cli.table_output import size, table


@click.group()
def models() -> None:
    """List and fetch models."""


@models.command()
@click.argument("name", required=False)
@click.option(
    "--config",
    "-c",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Fetch the missing models of this config, instead of NAME.",
)
@click.option("--pool", "kind", help="With --config: only models for pools of this kind.")
@click.option("--pin", is_flag=True, help="With --config: write the fetched commits into it.")
@click.option("--encoder", is_flag=True, help="NAME is a sentence encoder of the hub, as ONNX.")
@click.option("--models-dir", type=click.Path(path_type=Path), help="Folder of the model store.")
def pull(
    name: str | None,
    config_path: Path | None,
    kind: str | None,
    pin: bool,
    encoder: bool,
    models_dir: Path | None,
) -> None:
    """Fetch NAME: a name of the built-in catalogue, a folder (./NAME) or ORG/REPO[@COMMIT]."""
    from service.models import locate, pinned_source
    from service.models import pull as fetch
    from service.models.encoder_store import is_encoder, pull_encoder

    if encoder and name is None:
        raise click.UsageError("--encoder needs NAME")
    if (name is None) == (config_path is None):
        raise click.UsageError("give NAME or --config")
    if pin and config_path is None:
        raise click.UsageError("--pin needs --config: it writes into that file")
    if name is not None:
        if encoder or is_encoder(name):
            click.echo(pull_encoder(name, root=models_dir))
        else:
            click.echo(fetch(name, dest_root=models_dir))
        return
    assert config_path is not None
    pinned = {}
    for source, root in _needed(config_path, kind, models_dir):
        folder = locate(source, root=root) or fetch(source, dest_root=root)
        click.echo(folder)
        if (found := pinned_source(source, folder)) is not None:
            pinned[source] = found
    if kind is None and (needed := _needed_encoder(config_path, models_dir)) is not None:
        click.echo(pull_encoder(needed[0], root=needed[1]))
    if pin:
        _pin(config_path, pinned)


def _pin(path: Path, pinned: dict[str, str]) -> None:
    """Write the commits into the file, atomically."""
    from service.config.model_pin_writer import pin_models

    with path.open(encoding="utf-8", newline="") as file:  # keeps the line ends
        text = file.read()
    changed = pin_models(text, pinned)
    if changed == text:
        click.echo(f"{path}: nothing to pin")
        return
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        file.write(changed)
    shutil.copymode(path, part)
    part.replace(path)
    for source, found in pinned.items():
        if source != found:
            click.echo(f"{path}: {source} is now {found}")


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


def _needed_encoder(config_path: Path, models_dir: Path | None) -> tuple[str, Path | None] | None:
    from service.config import load_config
    from service.gateway.routing.routing_setup import encoder_of

    config = load_config(config_path)
    encoder = encoder_of(config)
    if encoder is None:
        return None
    root = models_dir or (Path(config.models_dir) if config.models_dir else None)
    return encoder, root


@models.command(name="list")
@click.option("--models-dir", type=click.Path(path_type=Path), help="Folder of the model store.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_(models_dir: Path | None, as_json: bool) -> None:
    """List the models on this machine and those of the built-in catalogue."""
    from service.models import CATALOGUE, list_models
    from service.models.builtin_models import ENCODERS

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
        for name, entry in {**CATALOGUE, **ENCODERS}.items()
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
