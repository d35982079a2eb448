"""The commands of `coe batch`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from service.cli.batch.batch_client import ENDED, BatchClient
from service.cli.batch.progress import Progress, duration, watch
from service.cli.http_client import url_option
from service.cli.table_output import table
from service.errors import CoeError

_FILE = click.argument("path", metavar="FILE", type=click.Path(exists=True, path_type=Path))
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def _terms_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a batch's endpoint and terms."""
    for option in (
        click.option("--quality", help='"best", or a part of it such as 0.9 at the least cost.'),
        click.option("--deadline", help="Time until the last answer, such as 90m or 24h."),
        click.option("--max-cost", type=float, help="Most units of cost for all lines."),
        click.option(
            "--endpoint",
            default="/v1/chat/completions",
            show_default=True,
            help="Endpoint of the lines.",
        ),
    ):
        command = option(command)
    return command


def _terms(max_cost: float | None, deadline: str | None, quality: str | None) -> dict[str, Any]:
    given: dict[str, Any] = {"max_cost": max_cost, "deadline": deadline}
    if quality is not None:
        try:
            given["quality"] = quality if quality == "best" else float(quality)
        except ValueError:
            raise CoeError('--quality takes "best" or a number from 0 to 1') from None
    return {name: value for name, value in given.items() if value is not None}


@click.group()
@url_option
@click.option(
    "--key", envvar="COE_API_KEY", help="API key, where the service needs one.  [env: COE_API_KEY]"
)
@click.pass_context
def batch(ctx: click.Context, url: str, key: str | None) -> None:
    """Plan, submit, watch and fetch batches of requests.

    FILE has a JSON object a line, as in OpenAI's Batch API: custom_id, method, url and body.
    """
    ctx.obj = BatchClient(url, key)


@batch.command()
@_FILE
@_terms_options
@click.option("--budget", "budgets", type=float, multiple=True, help="A budget of the curve.")
@_JSON
@click.pass_obj
def plan(
    client: BatchClient,
    path: Path,
    endpoint: str,
    max_cost: float | None,
    deadline: str | None,
    quality: str | None,
    budgets: tuple[float, ...],
    as_json: bool,
) -> None:
    """Tell quality, cost and time of FILE for several budgets, without running it."""
    terms = _terms(max_cost, deadline, quality)
    file_id = client.upload(path)
    try:
        found = client.plan(file_id, endpoint, terms, list(budgets))
    finally:
        client.delete(file_id)
    if as_json:
        click.echo(json.dumps(found))
        return
    invalid = found["invalid"] + found["unplanned"]
    click.echo(f"{found['lines']} lines" + (f", {invalid} more can't run" if invalid else ""))
    unit = found["cost_unit"] or "units"
    head = ("", f"budget ({unit})", "quality", "cost", "time", "shares")
    rows = [_row("", point) for point in found["curve"]]
    if found["plan"] is not None:
        rows.append(_row("these terms", found["plan"]))
    table(head, rows)
    if found["problem"] is not None:
        raise CoeError(found["problem"])


def _row(name: str, point: dict[str, Any]) -> tuple[str, ...]:
    shares = sorted(point["shares"].items(), key=lambda pair: -pair[1])
    return (
        name,
        "none" if point["max_cost"] is None else f"{point['max_cost']:.6g}",
        f"{point['quality']:.4f}",
        f"{point['cost']:.6g}",
        duration(point["seconds"]),
        ", ".join(f"{model} {share:.0%}" for model, share in shares),
    )


@batch.command()
@_FILE
@_terms_options
@click.option("--watch", "watches", is_flag=True, help="Watch it until it has ended.")
@_JSON
@click.pass_obj
def submit(
    client: BatchClient,
    path: Path,
    endpoint: str,
    max_cost: float | None,
    deadline: str | None,
    quality: str | None,
    watches: bool,
    as_json: bool,
) -> None:
    """Upload FILE and start a batch of it; prints the batch's id."""
    terms = _terms(max_cost, deadline, quality)
    made = client.create(client.upload(path), endpoint, terms)
    if not as_json or watches:
        click.echo(made["id"])
    if watches:
        made = watch(lambda: client.batch(made["id"]))
    if as_json:
        click.echo(json.dumps(made))
    if watches:
        _check(made)


@batch.command(name="watch")
@click.argument("batch_id", metavar="ID")
@_JSON
@click.pass_obj
def watch_batch(client: BatchClient, batch_id: str, as_json: bool) -> None:
    """Watch a batch until it has ended: lines, tokens, cost and time to go, in all and by expert.

    With --json it prints the batch as it is now.
    """
    if as_json:
        click.echo(json.dumps(client.batch(batch_id)))
        return
    _check(watch(lambda: client.batch(batch_id)))


@batch.command(name="list")
@_JSON
@click.pass_obj
def list_batches(client: BatchClient, as_json: bool) -> None:
    """List the newest batches."""
    found = client.batches()
    if as_json:
        click.echo(json.dumps({"data": found}))
        return
    rows = []
    for one in found:
        now = Progress.of(one)
        rows.append(
            (one["id"], now.status, f"{now.done}/{now.total}", str(now.tokens), f"{now.cost:.6g}")
        )
    table(("batch", "status", "lines", "tokens", "cost"), rows)


@batch.command()
@click.argument("batch_id", metavar="ID")
@click.option("--errors", is_flag=True, help="The lines that failed instead.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="File to write to.")
@click.pass_obj
def result(client: BatchClient, batch_id: str, errors: bool, output: Path | None) -> None:
    """Print the answers of a batch that has ended, one JSON object a line."""
    found = client.batch(batch_id)
    if found["status"] not in ENDED:
        raise CoeError(f"{batch_id} is {found['status']}: `coe batch watch {batch_id}` follows it")
    file_id = found["error_file_id" if errors else "output_file_id"]
    if file_id is None:
        what = "errors" if errors else "answers"
        raise CoeError(f"{batch_id} is {found['status']} and has no {what}{_why(found)}")
    with client.content(file_id) as reply:
        if output is None:
            shutil.copyfileobj(reply, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        else:
            with output.open("wb") as file:
                shutil.copyfileobj(reply, file)


@batch.command()
@click.argument("batch_id", metavar="ID")
@_JSON
@click.pass_obj
def cancel(client: BatchClient, batch_id: str, as_json: bool) -> None:
    """Stop a batch; `result` has the answers that are there."""
    found = client.cancel(batch_id)
    click.echo(json.dumps(found) if as_json else f"{batch_id}: {found['status']}")


def _check(found: dict[str, Any]) -> None:
    """Raise CoeError where a batch has not ended well."""
    if found["status"] != "completed":
        raise CoeError(f"{found['id']} is {found['status']}{_why(found)}")


def _why(found: dict[str, Any]) -> str:
    errors = (found.get("errors") or {}).get("data") or []
    return f": {errors[0]['message']}" if errors else ""
