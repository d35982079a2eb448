"""`coe keys`: the API keys of a running service, or with --config where they are kept."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from service.cli.http import admin, url_option
from service.cli.output import table
from service.errors import CoeError

_SPAN = re.compile(r"^(\d+)([smhd])$")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class _Span(click.ParamType[float]):
    name = "span"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        match = _SPAN.match(str(value))
        if match is None:
            self.fail(f"{value!r} is no span of time; 90d, 12h, 30m and 60s are", param, ctx)
        return float(int(match[1]) * _UNIT_S[match[2]])


SPAN = _Span()


class _Place:
    """Where the commands act: a running service, or the store that a config names."""

    def __init__(self, url: str, config: Path | None) -> None:
        self._url = url
        self._config = config

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Raises CoeError with what went wrong."""
        if self._config is None:
            return admin(self._url, method, path, body)
        import asyncio

        from service.config import load_config
        from service.gateway.store_setup import with_keys

        config = load_config(self._config)
        parts = path.strip("/").split("/")
        return asyncio.run(with_keys(config, lambda keys: _act(config, keys, method, parts, body)))


async def _act(config: Any, keys: Any, method: str, parts: list[str], body: Any) -> Any:
    """What the admin endpoints do, without a service."""
    from service.gateway.routes.keys_and_usage import NewKey, parsed, record_of

    now_s = time.time()
    if method == "GET":
        return {"keys": [one.to_public(now_s) for one in await keys.records()]}
    if len(parts) == 2:
        wanted = record_of(config, parsed(NewKey, json.dumps(body).encode()), now_s)
        made, key = await keys.create(wanted, now_s)
        return {**made.to_public(now_s), "key": key}
    if parts[3] == "rotate":
        made, key = await keys.rotate(parts[2], now_s, body["grace_s"])
        return {**made.to_public(now_s), "key": key}
    return (await keys.revoke(parts[2], now_s)).to_public(now_s)


@click.group()
@url_option
@click.option(
    "--config",
    "-c",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Act where this config's keys are kept, with no service running.",
)
@click.pass_context
def keys(ctx: click.Context, url: str, config: Path | None) -> None:
    """API keys: make, list, rotate, revoke. Reads the admin key's file, or a config."""
    ctx.obj = _Place(url, config)


@keys.command()
@click.option("--tenant", default="default", show_default=True, help="Whose key it is.")
@click.option("--label", default="", help="A line for people.")
@click.option("--expert", "experts", multiple=True, help="May ask for this expert only; repeat.")
@click.option("--requests-per-min", type=click.IntRange(1), help="Requests in any 60 s.")
@click.option("--tokens-per-min", type=click.IntRange(1), help="Tokens in any 60 s.")
@click.option("--concurrent", type=click.IntRange(1), help="Requests at once.")
@click.option("--budget", type=click.FloatRange(0, min_open=True), help="Units of cost a period.")
@click.option("--period", type=click.Choice(["day", "month"]), default="day", show_default=True)
@click.option("--priority", type=click.Choice(["high", "normal", "low"]), help="In the queues.")
@click.option("--expires", type=SPAN, help="Good for so long: 90d, 12h.")
@click.pass_obj
def create(
    place: _Place,
    /,
    tenant: str,
    label: str,
    experts: tuple[str, ...],
    budget: float | None,
    period: str,
    expires: float | None,
    **limits: Any,
) -> None:
    """Make a key. It is shown once, on stdout, and kept as a hash."""
    body: dict[str, Any] = {"tenant": tenant, "label": label}
    body |= {name: value for name, value in limits.items() if value is not None}
    if experts:
        body["experts"] = list(experts)
    if budget is not None:
        body["budget"] = {"amount": budget, "period": period}
    if expires is not None:
        body["expires_in_s"] = expires
    _show_key(place.ask("POST", "/admin/keys", body))


@keys.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def list_(place: _Place, as_json: bool) -> None:
    """All keys, revoked and expired ones included."""
    told = place.ask("GET", "/admin/keys")
    if as_json:
        click.echo(json.dumps(told))
        return
    rows = [
        (
            one["id"],
            one["tenant"],
            one["state"],
            _day(one["created_s"]),
            _day(one["expires_s"]),
            ", ".join(one["experts"]) if one["experts"] is not None else "all",
            _limits(one["limits"]),
            one["priority"] or "",
            one["label"],
        )
        for one in told["keys"]
    ]
    head = ("id", "tenant", "state", "made", "expires", "experts", "limits", "priority", "label")
    table(head, rows)


@keys.command()
@click.argument("key_id")
@click.option("--grace", type=SPAN, default="0s", help="The old key is good for so long still.")
@click.pass_obj
def rotate(place: _Place, key_id: str, grace: float) -> None:
    """Another key in the place of one, with the same limits."""
    _show_key(place.ask("POST", f"/admin/keys/{_id(key_id)}/rotate", {"grace_s": grace}))


@keys.command()
@click.argument("key_id")
@click.pass_obj
def revoke(place: _Place, key_id: str) -> None:
    """A key is worth nothing any more: at once here, within a second at other gateways."""
    told = place.ask("POST", f"/admin/keys/{_id(key_id)}/revoke", {})
    click.echo(f"revoked: {told['id']} of {told['tenant']}")


def _id(key_id: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", key_id):
        raise CoeError("a key's id is needed, as `coe keys list` shows it; never the key itself")
    return key_id


def _show_key(told: dict[str, Any]) -> None:
    click.echo(f"key {told['id']} of {told['tenant']}; it is not shown again:", err=True)
    click.echo(told["key"])


def _day(at_s: float | None) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d") if at_s else ""


def _limits(limits: dict[str, Any]) -> str:
    words = {
        "requests_per_min": "{} requests/min",
        "tokens_per_min": "{} tokens/min",
        "concurrent": "{} at once",
        "budget": "{} units/" + str(limits["period"]),
    }
    return ", ".join(text.format(limits[n]) for n, text in words.items() if limits[n] is not None)
