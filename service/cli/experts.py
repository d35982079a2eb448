"""`coe experts`: shows where experts' weights are, and moves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from service.cli.http_client import admin, url_option
from service.cli.table_output import size
from service.errors import ConfigError


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
        told = admin(url, "GET", "/admin/experts")
        Console().print(_experts_table(told))
        for name, one in told.get("added", {}).items():
            if one["state"] != "served":
                why = f": {one['reason']}" if one["reason"] else ""
                click.echo(f"added {name}: {one['state']}{why}")
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


@experts.command()
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="Unload every expert that nobody asks for now.")
@click.option(
    "--keep",
    type=click.Choice(["host", "disk"]),
    help="With --all: where weights stay. Default: as the config says.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def unload(url: str, name: str | None, every: bool, keep: str | None, as_json: bool) -> None:
    """Give an expert's memory back, until its next request.

    Where it runs, its engine ends or sleeps. Experts with running or waiting requests stay.
    """
    from urllib.parse import quote

    if every == (name is not None):
        raise click.UsageError("give the name of an expert, or --all")
    if keep is not None and not every:
        raise click.UsageError("--keep goes with --all")
    if name is not None:
        result = admin(url, "POST", f"/admin/experts/{quote(name)}/unload")
        click.echo(
            json.dumps(result) if as_json else f"unload: {name} in {result['pools']} pool(s)"
        )
        return
    result = admin(url, "POST", "/admin/release", {"keep": keep} if keep else None)
    if as_json:
        click.echo(json.dumps(result))
        return
    for pool, told in result["pools"].items():
        click.echo(f"{pool}: unloaded {', '.join(told['released']) or 'nothing'}")
        for busy, why in told["busy"].items():
            click.echo(f"{pool}: {busy} stays: {why}")


@experts.command(name="add")
@click.argument("name")
@click.option("--base", required=True, help="Expert of the config that it builds on.")
@click.option("--adapter", help="Its LoRA adapter: a folder of the service, or ORG/NAME@COMMIT.")
@click.option("--form", type=click.Choice(["adapter", "merged"]), help="How it is served.")
@click.option("--system", help="System prompt of requests that have none.")
@click.option("--category", "categories", multiple=True, help="Category that it answers.")
@click.option(
    "--file",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML with more of its fields, such as price, quality and examples.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def add_expert(
    url: str,
    name: str,
    base: str,
    adapter: str | None,
    form: str | None,
    system: str | None,
    categories: tuple[str, ...],
    file: Path | None,
    as_json: bool,
) -> None:
    """Add an expert while the service runs: a LoRA adapter, or another way of asking a base."""
    body: dict[str, Any] = _fields_of(file) if file is not None else {}
    body |= {"name": name, "base": base}
    if adapter is not None:
        # The service may run elsewhere in the file system, so that only a name stays as it is.
        is_local = adapter.startswith((".", "~"))
        body["adapter"] = str(Path(adapter).expanduser().resolve()) if is_local else adapter
    if form is not None:
        body["form"] = form
    if system is not None:
        body["defaults"] = {**(body.get("defaults") or {}), "system": system}
    if categories:
        body["categories"] = list(categories)
    result = admin(url, "POST", "/admin/experts", body)
    click.echo(json.dumps(result) if as_json else f"added: {name}")


def _fields_of(file: Path) -> dict[str, Any]:
    import yaml

    from service.config.strict_yaml_loader import ConfigLoader

    try:
        data = yaml.load(file.read_text(encoding="utf-8"), ConfigLoader)  # a safe loader
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: a mapping with fields of an expert is needed")
    return data


@experts.command(name="remove")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def remove_expert(url: str, name: str, as_json: bool) -> None:
    """Remove an expert that was added while the service ran. Its running requests finish."""
    from urllib.parse import quote

    result = admin(url, "DELETE", f"/admin/experts/{quote(name)}")
    click.echo(json.dumps(result) if as_json else f"removed: {name}")


_add_operation("pin", "Keep an expert's weights in host memory.")
_add_operation("unpin", "Let an expert's weights be evicted again.")


def _experts_table(payload: Any) -> Any:
    from rich.table import Table

    head = ("pool", "expert", "state", "bytes", "waiting", "running", "swap", "last swap", "can do")
    table = Table(*head, box=None, header_style="bold", pad_edge=False)
    for pool, states in payload["pools"].items():
        for name, state in states.items():
            last = state.get("last_swap")
            table.add_row(
                pool,
                name + (" (pinned)" if state.get("pinned") else ""),
                _state(state),
                _bytes(state),
                str(state["waiting"]),
                str(state["running"]),
                f"{state['swap_s'] * 1000:.0f} ms" if "swap_s" in state else "",
                f"{last['method']}, {last['reason']}, {last['ago_s']:.0f} s ago" if last else "",
                ", ".join(state.get("capabilities", ())),
            )
    return table


def _state(state: Any) -> str:
    if state["reason"]:
        return f"{state['state']}: {state['reason']}"
    return f"{state['state']} (unloaded)" if state.get("released") else str(state["state"])


def _bytes(state: Any) -> str:
    if "shares" in state:
        return f"none: has those of {state['shares']}"
    return size(state["host_bytes"]) if state.get("host_bytes") else ""
