"""`coe serve`: fetches missing models, and starts the service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.check import (
    CONFIG,
    check_artifacts,
    engine_arguments_unchecked,
    plans_of,
    warnings_of,
)
from service.errors import ModelStoreError

if TYPE_CHECKING:
    from service.config import Config


@click.command()
@click.option("--config", "-c", "path", type=CONFIG, required=True, help="The config file.")
@click.option("--host", help="Address to listen on, instead of the config's.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port, instead of the config's.")
def serve(path: Path, host: str | None, port: int | None) -> None:
    """Start the service on this machine; it runs until Ctrl-C or SIGTERM."""
    from service.config import load_config
    from service.launch.supervisor import run

    config = load_config(path)
    changed: dict[str, Any] = {}
    if port is not None:
        changed["port"] = port
    if host is not None:
        changed["host"] = host
    if changed:
        config = config.model_copy(update={"server": config.server.model_copy(update=changed)})
    run(_with_models(config), source=path)


def _with_models(config: Config) -> Config:
    """Fetch missing models, then check the memory plan against the machine.

    A model that can't be fetched fails only its own experts.
    """
    from service.models import locate, pull

    root = Path(config.models_dir) if config.models_dir else None
    check_artifacts(config)
    if (unchecked := engine_arguments_unchecked(config)) is not None:
        click.echo(f"coe: warning: {unchecked}", err=True)
    _fetch_encoder(config, root)
    try:
        for name, source in config.model_sources().items():
            if locate(source, root=root) is None:
                click.echo(f"expert {name}: fetching {source}", err=True)
                pull(source, dest_root=root)
        for line in warnings_of(plans_of(config)):
            click.echo(f"coe: warning: {line}", err=True)
    except ModelStoreError as error:
        click.echo(f"coe: warning: {error.message}", err=True)
        click.echo("coe: warning: starting without a memory plan", err=True)
    return config


def _fetch_encoder(config: Config, root: Path | None) -> None:
    """Fetch the router's encoder. Without it the router goes on with its first stage."""
    from service.gateway.routing.routing_setup import encoder_of
    from service.models.encoder_store import locate_encoder, pull_encoder

    source = encoder_of(config)
    if source is None:
        return
    try:
        if locate_encoder(source, root=root) is None:
            click.echo(f"router: fetching the encoder {source}", err=True)
            pull_encoder(source, root=root)
    except ModelStoreError as error:
        click.echo(f"coe: warning: the router does without its encoder: {error.message}", err=True)
