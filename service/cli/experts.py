"""`coe experts`: where weights are, and moving them."""

from __future__ import annotations

import json
from typing import Any

import click

from service.cli.http import admin, url_option
from service.cli.output import size


@click.group(invoke_without_command=True)
@url_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Go on showing it, until Ctrl-C.")
@click.pass_context
def experts(ctx: click.Context, url: str, as_json: bool, watch: bool) -> None:
    """Where each expert's weights are, its queue and its last swap. Reads the admin key's file."""
    ctx.obj = url
    if ctx.invoked_subcommand is not None:
        return
    if as_json:
        click.echo(json.dumps(admin(url, "GET", "/admin/experts")))
        return
    from rich.console import Console
    from rich.live import Live

    if not watch:
        Console().print(_expertstable(admin(url, "GET", "/admin/experts")))
        return
    import time

    with Live(refresh_per_second=2) as live:
        while True:
            live.update(_expertstable(admin(url, "GET", "/admin/experts")))
            time.sleep(1)


def _operation(act: str, text: str) -> None:
    @experts.command(name=act, help=text)
    @click.argument("name")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    @click.pass_obj
    def operate(url: str, name: str, as_json: bool) -> None:
        from urllib.parse import quote

        done = admin(url, "POST", f"/admin/experts/{quote(name)}/{act}")
        if as_json:
            click.echo(json.dumps(done))
            return
        click.echo(f"{act}: {name} in {done['pools']} pool(s)")


_operation("load", "Bring an expert's weights to host memory when there is room.")
_operation("evict", "Forget an expert's weights.")
_operation("pin", "Keep an expert's weights in host memory.")
_operation("unpin", "No longer keep them.")


def _expertstable(told: Any) -> Any:
    from rich.table import Table

    head = ("pool", "expert", "state", "bytes", "waiting", "running", "swap", "last swap")
    table = Table(*head, box=None, header_style="bold", pad_edge=False)
    for pool, experts_ in told["pools"].items():
        for name, one in experts_.items():
            last = one.get("last_swap")
            table.add_row(
                pool,
                name + (" (pinned)" if one.get("pinned") else ""),
                one["state"] + (f": {one['reason']}" if one["reason"] else ""),
                size(one["host_bytes"]) if one.get("host_bytes") else "",
                str(one["waiting"]),
                str(one["running"]),
                f"{one['swap_s'] * 1000:.0f} ms" if "swap_s" in one else "",
                f"{last['method']}, {last['reason']}, {last['ago_s']:.0f} s ago" if last else "",
            )
    return table
