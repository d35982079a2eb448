"""`coe moe`: experts within one model, chosen for each token."""

from __future__ import annotations

import click

from service.cli.late import Commands

_COMMANDS: dict[str, tuple[str, str]] = {}


@click.group(cls=Commands, table=_COMMANDS)
def moe() -> None:
    """Look inside mixtures of experts, steer, build and place them."""
