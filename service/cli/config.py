"""`coe config`: the format of the config file."""

from __future__ import annotations

import json

import click


@click.group()
def config() -> None:
    """Describe the config file."""


@config.command()
def schema() -> None:
    """Print the JSON schema of the config file, for editors and other tools."""
    from service.config import Config

    json_schema = Config.model_json_schema()
    json_schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    json_schema["title"] = "coe config"
    click.echo(json.dumps(json_schema, indent=2))
