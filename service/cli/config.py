"""`coe config`: what a config file may say."""

from __future__ import annotations

import json

import click


@click.group()
def config() -> None:
    """What a config file may say."""


@config.command()
def schema() -> None:
    """Print the JSON schema of the config file, for editors and other tools."""
    from service.config import Config

    described = Config.model_json_schema()
    described["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    described["title"] = "coe config"
    click.echo(json.dumps(described, indent=2))
