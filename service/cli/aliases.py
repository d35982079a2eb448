"""`coe aliases`: shows how aliases share their requests, and undoes roll-backs."""

from __future__ import annotations

import json
from typing import Any

import click

from service.cli.http_client import admin, url_option
from service.cli.table_output import table


@click.group(invoke_without_command=True)
@url_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def aliases(ctx: click.Context, url: str, as_json: bool) -> None:
    """Show the aliases that share requests by weights, as one gateway has counted them.

    Reads the admin key from its file.
    """
    ctx.obj = url
    if ctx.invoked_subcommand is not None:
        return
    told = admin(url, "GET", "/admin/aliases")
    if as_json:
        click.echo(json.dumps(told))
        return
    head = ("alias", "target", "weight", "requests", "errors", "refusals", "")
    table(head, [row for name, targets in told["aliases"].items() for row in _rows(name, targets)])


def _rows(alias: str, targets: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            alias,
            target,
            f"{one['weight']:g}",
            *(str(one[count]) for count in ("requests", "errors", "refusals")),
            f"rolled back: {one['rolled_back']['text']}" if one["rolled_back"] else "",
        )
        for target, one in targets.items()
    ]


@aliases.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def restore(url: str, name: str, as_json: bool) -> None:
    """Give the targets of an alias that were rolled back their requests again."""
    from urllib.parse import quote

    result = admin(url, "POST", f"/admin/aliases/{quote(name)}/restore")
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(f"restored: {', '.join(result['restored']) or 'nothing was rolled back'}")
