"""`coe keys`: the API keys of a running service, or of the store that --config names."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from service.cli.http_client import admin, url_option
from service.cli.table_output import table
from service.errors import CoeError

_DURATION = re.compile(r"^(\d+)([smhd])$")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class _Duration(click.ParamType[float]):
    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        match = _DURATION.match(str(value))
        if match is None:
            self.fail(f"{value!r} is not a duration such as 90d, 12h, 30m or 60s", param, ctx)
        return float(int(match[1]) * _UNIT_S[match[2]])


DURATION = _Duration()


class _KeyBackend:
    """The target of the commands: a running service, or the store that a config names."""

    def __init__(self, url: str, config: Path | None) -> None:
        self._url = url
        self._config = config

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Call an admin endpoint, or do the same in the store.

        Raises:
            CoeError: The call failed.
        """
        if self._config is None:
            return admin(self._url, method, path, body)
        import asyncio

        from service.config import load_config
        from service.gateway.store_setup import with_keys

        config = load_config(self._config)
        parts = path.strip("/").split("/")
        return asyncio.run(
            with_keys(config, lambda keys: _call_store(config, keys, method, parts, body))
        )


async def _call_store(config: Any, keys: Any, method: str, parts: list[str], body: Any) -> Any:
    """Do in the store what the admin endpoints do in a service."""
    from service.gateway.api_key_requests import NewKey, new_key_record, parse_key_body

    now_s = time.time()
    if method == "GET":
        return {"keys": [record.to_public(now_s) for record in await keys.records()]}
    if len(parts) == 2:
        new_record = new_key_record(
            config, parse_key_body(NewKey, json.dumps(body).encode()), now_s
        )
        record, key = await keys.create(new_record, now_s)
        return {**record.to_public(now_s), "key": key}
    if parts[3] == "rotate":
        record, key = await keys.rotate(parts[2], now_s, body["grace_s"])
        return {**record.to_public(now_s), "key": key}
    return (await keys.revoke(parts[2], now_s)).to_public(now_s)


@click.group()
@url_option
@click.option(
    "--config",
    "-c",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Use the key store of this config directly; no service has to run.",
)
@click.pass_context
def keys(ctx: click.Context, url: str, config: Path | None) -> None:
    """Create, list, rotate and revoke API keys. Reads the admin key's file, or a config."""
    ctx.obj = _KeyBackend(url, config)


@keys.command()
@click.option("--tenant", default="default", show_default=True, help="Tenant of the key.")
@click.option("--label", default="", help="Description, for people.")
@click.option("--expert", "experts", multiple=True, help="Allow this expert only; may be repeated.")
@click.option("--requests-per-min", type=click.IntRange(1), help="Limit of requests in 60 s.")
@click.option("--tokens-per-min", type=click.IntRange(1), help="Limit of tokens in 60 s.")
@click.option("--concurrent", type=click.IntRange(1), help="Limit of concurrent requests.")
@click.option("--budget", type=click.FloatRange(0, min_open=True), help="Units of cost per period.")
@click.option("--period", type=click.Choice(["day", "month"]), default="day", show_default=True)
@click.option(
    "--priority", type=click.Choice(["high", "normal", "low"]), help="Priority in queues."
)
@click.option("--expires", type=DURATION, help="Lifetime, such as 90d or 12h.")
@click.pass_obj
def create(
    backend: _KeyBackend,
    /,
    tenant: str,
    label: str,
    experts: tuple[str, ...],
    budget: float | None,
    period: str,
    expires: float | None,
    **limits: Any,
) -> None:
    """Create a key. It is printed once, on stdout; the store keeps a hash."""
    body: dict[str, Any] = {"tenant": tenant, "label": label}
    body |= {name: value for name, value in limits.items() if value is not None}
    if experts:
        body["experts"] = list(experts)
    if budget is not None:
        body["budget"] = {"amount": budget, "period": period}
    if expires is not None:
        body["expires_in_s"] = expires
    _show_key(backend.call("POST", "/admin/keys", body))


@keys.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def list_(backend: _KeyBackend, as_json: bool) -> None:
    """List all keys, including revoked and expired ones."""
    payload = backend.call("GET", "/admin/keys")
    if as_json:
        click.echo(json.dumps(payload))
        return
    rows = [
        (
            record["id"],
            record["tenant"],
            record["state"],
            _day(record["created_s"]),
            _day(record["expires_s"]),
            ", ".join(record["experts"]) if record["experts"] is not None else "all",
            _limits(record["limits"]),
            record["priority"] or "",
            record["label"],
        )
        for record in payload["keys"]
    ]
    head = ("id", "tenant", "state", "created", "expires", "experts", "limits", "priority", "label")
    table(head, rows)


@keys.command()
@click.argument("key_id")
@click.option("--grace", type=DURATION, default="0s", help="The old key stays valid for this time.")
@click.pass_obj
def rotate(backend: _KeyBackend, key_id: str, grace: float) -> None:
    """Replace a key by a new one with the same limits."""
    _show_key(backend.call("POST", f"/admin/keys/{_id(key_id)}/rotate", {"grace_s": grace}))


@keys.command()
@click.argument("key_id")
@click.pass_obj
def revoke(backend: _KeyBackend, key_id: str) -> None:
    """Revoke a key: at once at this gateway, within a second at the others."""
    record = backend.call("POST", f"/admin/keys/{_id(key_id)}/revoke", {})
    click.echo(f"revoked: {record['id']} of {record['tenant']}")


def _id(key_id: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", key_id):
        raise CoeError("give the key's id, as `coe keys list` shows it; never the key itself")
    return key_id


def _show_key(record: dict[str, Any]) -> None:
    click.echo(f"key {record['id']} of {record['tenant']}; it is not shown again:", err=True)
    click.echo(record["key"])


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
