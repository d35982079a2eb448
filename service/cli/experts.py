"""`coe experts`: shows where experts' weights are, and moves them."""

from __future__ import annotations

import json
from typing import Any

import click

from service.cli.http_client import admin, url_option
from service.cli.table_output import size


@click.group(invoke_without_command=True)
@url_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Refresh the table until Ctrl-C.")
@click.pass_context
def experts(ctx: click.Context, url: str, as_json: bool, watch: bool) -> None:
    """Show where each expert's weights are, its queue and its last swap.

    Reads the admin key from its file.
    """
    ctx.obj = url
    if ctx.invoked_subcommand is not None:
        return
    if as_json:
        click.echo(json.dumps(admin(url, "GET", "/admin/experts")))
        return
    from rich.console import Console
    from rich.live import Live

    if not watch:
        Console().print(_experts_table(admin(url, "GET", "/admin/experts")))
        return
    import time

    with Live(refresh_per_second=2) as live:
        while True:
            live.update(_experts_table(admin(url, "GET", "/admin/experts")))
            time.sleep(1)


def _add_operation(operation: str, text: str) -> None:
    @experts.command(name=operation, help=text)
    @click.argument("name")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    @click.pass_obj
    def operate(url: str, name: str, as_json: bool) -> None:
        from urllib.parse import quote

        result = admin(url, "POST", f"/admin/experts/{quote(name)}/{operation}")
        if as_json:
            click.echo(json.dumps(result))
            return
        click.echo(f"{operation}: {name} in {result['pools']} pool(s)")


_add_operation("load", "Load an expert's weights into host memory when there is room.")
_add_operation("evict", "Drop an expert's weights from memory.")
_add_operation("pin", "Keep an expert's weights in host memory.")
_add_operation("unpin", "Let an expert's weights be evicted again.")


def _experts_table(payload: Any) -> Any:
    from rich.table import Table

    head = ("pool", "expert", "state", "bytes", "waiting", "running", "swap", "last swap")
    table = Table(*head, box=None, header_style="bold", pad_edge=False)
    for pool, states in payload["pools"].items():
        for name, state in states.items():
            last = state.get("last_swap")
            table.add_row(
                pool,
                name + (" (pinned)" if state.get("pinned") else ""),
                state["state"] + (f": {state['reason']}" if state["reason"] else ""),
                _bytes(state),
                str(state["waiting"]),
                str(state["running"]),
                f"{state['swap_s'] * 1000:.0f} ms" if "swap_s" in state else "",
                f"{last['method']}, {last['reason']}, {last['ago_s']:.0f} s ago" if last else "",
            )
    return table


def _bytes(state: Any) -> str:
    if "shares" in state:
        return f"none: has those of {state['shares']}"
    return size(state["host_bytes"]) if state.get("host_bytes") else ""
