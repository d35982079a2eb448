"""The command `coe`. Every subcommand imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service import __version__
from service.errors import CoeError, ConfigError, ModelStoreError

if TYPE_CHECKING:
    from service.config import Config

_CONFIG = click.Path(path_type=Path, dir_okay=False)


class _Lazy(click.Group):
    """A group that lives in another package and is imported when it is used."""

    def __init__(self, name: str, where: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self._where = where

    def _real(self) -> click.Group:
        import importlib

        module, _, attribute = self._where.partition(":")
        group = getattr(importlib.import_module(module), attribute)
        assert isinstance(group, click.Group)
        self.help = group.help
        return group

    def list_commands(self, ctx: click.Context) -> list[str]:
        return self._real().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self._real().get_command(ctx, cmd_name)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="coe")
def cli() -> None:
    """Serve a composition of expert language models behind one OpenAI-compatible endpoint."""


@cli.command()
@click.option("--config", "-c", "path", type=_CONFIG, required=True, help="The config file.")
@click.option("--host", help="Address to listen on, instead of the config's.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port, instead of the config's.")
def serve(path: Path, host: str | None, port: int | None) -> None:
    """Start the service on this machine and run until Ctrl-C or SIGTERM."""
    from service.config import load_config
    from service.run import run

    config = load_config(path)
    changed: dict[str, Any] = {}
    if port is not None:
        changed["port"] = port
    if host is not None:
        changed["host"] = host
    if changed:
        config = config.model_copy(update={"server": config.server.model_copy(update=changed)})
    run(_with_models(config), source=path)


@cli.command()
@click.argument("path", type=_CONFIG)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(path: Path, as_json: bool) -> None:
    """Validate a config and print its memory plan. Starts nothing, fetches nothing."""
    from service.config import load_config

    config = load_config(path)
    _check_artifacts(config)
    plans = _plans(config)
    if as_json:
        click.echo(json.dumps({"config": str(path), "pools": [_plan_json(p) for p in plans]}))
        return
    _print_plans(config, plans)


@cli.group()
def models() -> None:
    """The models on this machine."""


@models.command()
@click.argument("name")
@click.option("--models-dir", type=click.Path(path_type=Path), help="Where models are kept.")
def pull(name: str, models_dir: Path | None) -> None:
    """Fetch NAME: a name of the built-in catalogue, a folder, or ORG/REPO on the hub."""
    from service.models import pull as fetch

    click.echo(fetch(name, dest_root=models_dir))


@models.command(name="list")
@click.option("--models-dir", type=click.Path(path_type=Path), help="Where models are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_(models_dir: Path | None, as_json: bool) -> None:
    """What is here, and what the built-in catalogue has."""
    from service.models import CATALOGUE, list_models

    stored = list_models(models_dir)
    names = {model.name for model in stored}
    rows = [
        {
            "name": model.name,
            "state": "complete" if model.complete else "damaged",
            "bytes": model.bytes,
            "licence": model.licence,
            "source": model.source,
            "path": str(model.path),
        }
        for model in stored
    ]
    rows += [
        {"name": name, "state": "not here", "licence": entry.licence, "source": "catalogue"}
        for name, entry in CATALOGUE.items()
        if name not in names
    ]
    if as_json:
        click.echo(json.dumps({"models": rows}))
        return
    _table(
        ("name", "state", "size", "licence", "source"),
        [
            (
                str(row["name"]),
                str(row["state"]),
                _size(row["bytes"]) if "bytes" in row else "",
                str(row["licence"] or "unknown"),
                str(row["source"]),
            )
            for row in rows
        ],
    )


cli.add_command(
    _Lazy("router", "router_models.cli:group", "Fit and judge routers on recorded outcomes.")
)


@cli.command()
@click.argument("prompt")
@click.option(
    "--config",
    "-c",
    "path",
    type=_CONFIG,
    default=Path("deploy/config/demo.yaml"),
    show_default=True,
    help="The config whose experts and router decide.",
)
@click.option("--url", help="Ask this running service instead: with its queues and swaps.")
@click.option("--model", default="auto", show_default=True, help="auto, auto:fast, auto/code, …")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def route(prompt: str, path: Path, url: str | None, model: str, as_json: bool) -> None:
    """Show which expert would answer PROMPT, and why. Without --url it needs no service."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    told = _route_there(url, body) if url is not None else _route_here(path, body)
    if as_json:
        click.echo(json.dumps(told))
        return
    click.echo(f"expert    {told['chosen']}  ({told['reason']})")
    click.echo(f"category  {told['category']}  (confidence {told['confidence']:.2f})")
    if told["posterior"]:
        ranked = sorted(told["posterior"].items(), key=lambda pair: -pair[1])
        click.echo("posterior " + ", ".join(f"{label} {p:.3f}" for label, p in ranked))
    columns = ("quality", "wait_s", "answer_s", "displaced_s", "utility", "behind")
    rows = [
        (one["expert"], one["pool"] or "", *(f"{one[name]:.3f}" for name in columns))
        for one in told["candidates"]
    ]
    _table(("candidate", "pool", *columns), rows)


def _route_there(url: str, body: dict[str, Any]) -> Any:
    return _ask(url, "POST", "/v1/route", {"content-type": "application/json"}, json.dumps(body))


def _route_here(path: Path, body: dict[str, Any]) -> dict[str, Any]:
    """The decision as if every expert were resident and idle."""
    from service.api.body import read_asked
    from service.api.plan import Planner, explain
    from service.app import load_classifier
    from service.broker.choice import Option
    from service.config import load_config

    config = load_config(path)
    raw = json.dumps(body).encode()
    asked = read_asked("/v1/chat/completions", raw, {}, config.server.deadline_ms)
    plan = Planner(config, load_classifier(config)).plan(asked)
    idle = [
        Option(name, None, quality, 0.0, 0.0, 0.0, quality)
        for name, quality in zip(plan.preference, plan.quality, strict=True)
    ]
    return explain(plan, idle)


@cli.group(invoke_without_command=True)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The service.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Go on showing it, until Ctrl-C.")
@click.pass_context
def experts(ctx: click.Context, url: str, as_json: bool, watch: bool) -> None:
    """Where each expert's weights are, its queue and its last swap. Reads the admin key's file."""
    ctx.obj = url
    if ctx.invoked_subcommand is not None:
        return
    if as_json:
        click.echo(json.dumps(_admin(url, "GET", "/admin/experts")))
        return
    from rich.console import Console
    from rich.live import Live

    if not watch:
        Console().print(_experts_table(_admin(url, "GET", "/admin/experts")))
        return
    import time

    with Live(refresh_per_second=2) as live:
        while True:
            live.update(_experts_table(_admin(url, "GET", "/admin/experts")))
            time.sleep(1)


def _operation(act: str, text: str) -> None:
    @experts.command(name=act, help=text)
    @click.argument("name")
    @click.pass_obj
    def operate(url: str, name: str) -> None:
        from urllib.parse import quote

        done = _admin(url, "POST", f"/admin/experts/{quote(name)}/{act}")
        click.echo(f"{act}: {name} in {done['pools']} pool(s)")


_operation("load", "Bring an expert's weights to host memory when there is room.")
_operation("evict", "Forget an expert's weights.")
_operation("pin", "Keep an expert's weights in host memory.")
_operation("unpin", "No longer keep them.")


# --- what they share


def _admin(url: str, method: str, path: str) -> Any:
    from service.link.secret import admin_key_path, read_secret

    try:
        key = read_secret(admin_key_path())
    except OSError:
        raise CoeError(
            f"no admin key in {admin_key_path()}: `coe serve` makes one at its first start"
        ) from None
    return _ask(url, method, path, {"authorization": f"Bearer {key}"})


def _ask(url: str, method: str, path: str, headers: dict[str, str], body: str | None = None) -> Any:
    """Ask a running service. Raises CoeError with its own words."""
    import urllib.error
    import urllib.request

    data = body.encode() if body is not None else None
    request = urllib.request.Request(
        url.rstrip("/") + path, data=data, method=method, headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=130) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        try:
            message = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"status {error.code}"
        raise CoeError(f"{url}: {message}") from None
    except OSError as error:
        raise CoeError(f"{url} can't be reached: {getattr(error, 'reason', error)}") from None


def _experts_table(told: Any) -> Any:
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
                _size(one["host_bytes"]) if one.get("host_bytes") else "",
                str(one["waiting"]),
                str(one["running"]),
                f"{one['swap_s'] * 1000:.0f} ms" if "swap_s" in one else "",
                f"{last['method']}, {last['reason']}, {last['ago_s']:.0f} s ago" if last else "",
            )
    return table


def _with_models(config: Config) -> Config:
    """Fetch what is missing, then hold the plan against the machine.

    A model that can't be had costs its own experts only: they are shown as failed.
    """
    from service.models import locate, pull

    root = Path(config.models_dir) if config.models_dir else None
    _check_artifacts(config)
    try:
        for name, source in config.model_sources().items():
            if locate(source, root=root) is None:
                click.echo(f"expert {name}: fetching {source}", err=True)
                pull(source, dest_root=root)
        _plans(config)
    except ModelStoreError as error:
        click.echo(f"coe: warning: {error.message}", err=True)
        click.echo("coe: warning: starting without a memory plan", err=True)
    return config


def _check_artifacts(config: Config) -> None:
    from service.app import load_classifier

    load_classifier(config)


def _plans(config: Config) -> list[Any]:
    import psutil

    from service.memory import check_plan, folders_of, plan_pool
    from service.models import inspect_model, locate

    root = Path(config.models_dir) if config.models_dir else None
    sources = set(config.model_sources().values())
    found = {
        source: folder for source in sources if (folder := locate(source, root=root)) is not None
    }
    machine_bytes = psutil.virtual_memory().total
    plans = []
    folders = folders_of(config, found) if sources else {}
    for kind in config.pools:
        plan = plan_pool(config, kind, lambda name: inspect_model(folders[name]))
        check_plan(plan, machine_bytes)
        plans.append(plan)
    return plans


def _plan_json(plan: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(plan), "total_bytes": plan.total_bytes, "fits": plan.fits}


def _print_plans(config: Config, plans: list[Any]) -> None:
    rows = []
    for plan in plans:
        for engine in plan.engines:
            names = ", ".join((engine.base, *engine.adapters))
            kv = (
                f"{_size(engine.kv_bytes)} ({engine.kv_tokens} tokens)"
                if engine.kv_bytes
                else "vLLM's share"
            )
            rows.append(
                (
                    plan.kind,
                    names,
                    _size(engine.weight_bytes + engine.adapter_bytes),
                    kv,
                    _size(engine.total_bytes),
                )
            )
        bound = _size(plan.bound_bytes) if plan.bound_bytes is not None else "no bound"
        rows.append((plan.kind, "(a replica)", "", "", f"{_size(plan.total_bytes)} of {bound}"))
    _table(("pool", "experts", "weights", "KV cache", "in all"), rows)
    remote = [name for name, expert in config.experts.items() if expert.remote is not None]
    if remote:
        click.echo(f"remote: {', '.join(remote)}")
    click.echo("ok")


def _size(value: object) -> str:
    size = float(str(value))
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in head:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    """The console script: errors of ours become one line each and exit status 2 or 1."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except CoeError as error:
        click.echo(f"coe: {error.message}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
