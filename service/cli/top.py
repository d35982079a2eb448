"""`coe top`: the console in a terminal."""

from __future__ import annotations

import json
import time
from typing import Any, ClassVar

import click

from service.cli.http_client import admin_headers, url_option
from service.cli.sse_client import events, open_stream
from service.cli.table_output import size
from service.errors import CoeError


@click.command()
@url_option
@click.option("--json", "as_json", is_flag=True, help="Print the state once, as one JSON object.")
def top(url: str, as_json: bool) -> None:
    """Watch experts, queues, swaps and recent routes live.

    q quits. l, e, p and u load, evict, pin and unpin the selected expert.
    """
    if as_json:
        with open_stream(url, "/console/events", admin_headers(url)) as reply:
            for name, data in events(reply):
                if name in ("hello", "progress"):
                    click.echo(json.dumps(json.loads(data)))
                    return
        raise CoeError(f"{url}: the event stream ended without an event")
    make_app(url).run()


def rows_of(hello: dict[str, Any], state: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row per expert: name, kind, tier, bytes, running, waiting, tokens/s, last swap."""
    rows: list[tuple[str, ...]] = []
    for expert in hello["experts"]:
        name = expert["name"]
        entries = [pool["experts"][name] for pool in state["pools"] if name in pool["experts"]]
        nowhere: dict[str, Any] = {"state": "disk"}
        best = min(entries, key=lambda entry: _TIERS.index(entry["state"]), default=nowhere)
        best = {**best, **state["remotes"].get(name, {})}
        tier = best["state"]
        if tier == "loading" and best.get("eta_s", 0) >= 1:
            tier = f"in {best['eta_s']:.0f} s"
        if best.get("released"):
            tier += " (unloaded)"
        held_bytes = best.get("host_bytes") or best.get("weight_bytes") or 0
        swap = best.get("last_swap")
        rate = sum(entry.get("tokens_per_s", 0.0) for entry in entries)
        rows.append(
            (
                name + (" (pinned)" if best.get("pinned") else ""),
                expert["kind"],
                tier,
                size(held_bytes) if held_bytes else "",
                str(sum(entry.get("running", 0) for entry in entries)),
                str(sum(entry.get("waiting", 0) for entry in entries)),
                f"{rate:.1f}" if rate else "",
                f"{swap['swap_s'] * 1000:.0f} ms, {swap['ago_s']:.0f} s ago" if swap else "",
            )
        )
    return rows


def gpu_lines(state: dict[str, Any]) -> list[str]:
    """Return a line for each GPU. Pools that share one both count it; their shares add up."""
    found: dict[str, dict[str, Any]] = {}
    for pool in state["pools"]:
        for gpu in pool.get("gpus", ()):
            before = found.get(gpu["uuid"], {}).get("reserved_bytes", 0)
            found[gpu["uuid"]] = {**gpu, "reserved_bytes": gpu["reserved_bytes"] + before}
    return [
        f"GPU {gpu['index']}, {gpu['name']}: {size(gpu['used_bytes'])} used of "
        f"{size(gpu['total_bytes'])}, {size(gpu['reserved_bytes'])} reserved, "
        f"{size(gpu['free_bytes'])} free"
        for gpu in sorted(found.values(), key=lambda gpu: gpu["index"])
    ]


_TIERS = ("device", "host", "loading", "draining", "disk", "failed")
_EXPERTS = ("expert", "kind", "tier", "bytes", "running", "waiting", "tokens/s", "last swap")


def route_columns(hello: dict[str, Any]) -> tuple[str, ...]:
    """Return the heads of the columns of recent requests; that of costs names their unit."""
    times = ("queue", "swap", "first byte", "total")
    return ("time", "model", "category", "answered by", *times, f"cost, {hello['cost_unit']}", "")


def route_row(route: dict[str, Any]) -> tuple[str, ...]:
    """Return the row of one recent request."""
    category = f"{route['category']} {route['confidence']:.0%}" if route["category"] else "named"
    answered_by = route["expert"] or "nobody"
    if route["recipe"] not in ("", answered_by):
        answered_by = route["recipe"]
    times = (
        route["queue_ms"] - route["swap_ms"],
        route["swap_ms"],
        route["first_ms"],
        route["total_ms"],
    )
    clock = time.strftime("%H:%M:%S", time.localtime(route["at_s"]))
    shown = tuple(f"{max(0.0, value):.0f} ms" if value else "–" for value in times)
    cost = f"{route['cost']:.3g}" if route["cost"] else "–"
    return (clock, route["asked"], category, answered_by, *shown, cost, route["outcome"])


def make_app(url: str) -> Any:
    """Make the terminal application; defined in here so that `coe --help` needs no textual."""
    from rich.text import Text
    from textual.app import App, ComposeResult
    from textual.containers import Vertical
    from textual.widgets import DataTable, Footer, Static

    class Top(App[None]):
        """Shows one service until q is pressed."""

        TITLE = "coe top"
        CSS = """
        #head { padding: 0 1; height: 1; color: $text; background: $primary; }
        #gpus { padding: 0 1; height: auto; color: $text-muted; }
        #message { padding: 0 1; height: 1; color: $text-muted; }
        #experts { height: auto; max-height: 60%; }
        """
        BINDINGS: ClassVar = [
            ("q", "quit", "Quit"),
            ("l", "operate('load')", "Load"),
            ("e", "operate('evict')", "Evict"),
            ("p", "operate('pin')", "Pin"),
            ("u", "operate('unpin')", "Unpin"),
        ]

        def __init__(self) -> None:
            super().__init__()
            self.hello: dict[str, Any] = {}

        def compose(self) -> ComposeResult:
            """Build the figures, the experts, the message line and the routes."""
            yield Static(f"{url}: connecting", id="head", markup=False)
            with Vertical():
                yield Static("", id="gpus", markup=False)
                yield DataTable(id="experts", cursor_type="row", zebra_stripes=True)
                yield Static("", id="message", markup=False)
                yield DataTable(id="routes", cursor_type="none")
            yield Footer()

        def on_mount(self) -> None:
            """Start to read events."""
            self.query_one("#experts", DataTable).add_columns(*_EXPERTS)
            self.run_worker(self._follow, thread=True, exit_on_error=False)

        def _follow(self) -> None:
            """Read events in a thread; connect again after 1 s whenever the stream ends."""
            while self.is_running:
                try:
                    with open_stream(url, "/console/events", admin_headers(url)) as reply:
                        for name, data in events(reply):
                            self.call_from_thread(self.show, name, json.loads(data))
                except (CoeError, OSError, ValueError) as error:
                    message = error.message if isinstance(error, CoeError) else str(error)
                    if not self.is_running:
                        return
                    self.call_from_thread(self.show_message, message)
                time.sleep(1)

        def show_message(self, text: str) -> None:
            """Show a text in the line between the tables."""
            self.query_one("#message", Static).update(text)

        def show(self, name: str, event: dict[str, Any]) -> None:
            """Show one event."""
            if name == "progress":
                now = next((step["name"] for step in event["steps"] if step["now"]), "")
                self.query_one("#head", Static).update(
                    f"{url}: starting, {event['elapsed_s']:.0f} s: {now}"
                )
            elif name == "hello":
                self.hello = event
                table = self.query_one("#routes", DataTable)
                table.clear(columns=True)
                table.add_columns(*map(Text, route_columns(event)))
                self._add_routes(event["routes"])
                self._draw(event["state"])
            elif name == "routes":
                self._add_routes(event["routes"])
            elif name == "state" and self.hello:
                self._draw(event)

        def _draw(self, state: dict[str, Any]) -> None:
            totals = state["totals"]
            self.query_one("#head", Static).update(
                f"{url}   {totals['requests']} answers per minute   {state['in_flight']} in flight"
                f"   first byte {totals['first_ms']:.0f} ms   "
                f"{len([pool for pool in state['pools'] if pool['boot']])} pools"
            )
            gpus = self.query_one("#gpus", Static)
            lines = gpu_lines(state)
            gpus.display = bool(lines)
            gpus.update("\n".join(lines))
            table = self.query_one("#experts", DataTable)
            cursor = table.cursor_row
            table.clear()
            for row in rows_of(self.hello, state):
                table.add_row(*map(Text, row))
            if cursor:
                table.move_cursor(row=cursor)

        def _add_routes(self, routes: list[dict[str, Any]]) -> None:
            table = self.query_one("#routes", DataTable)
            kept = [table.get_row(key) for key in table.rows]
            table.clear()
            # As Text, so that brackets are not taken for markup.
            new = [tuple(map(Text, route_row(route))) for route in reversed(routes)]
            for row in [*new, *kept][:100]:
                table.add_row(*row)

        def action_operate(self, operation: str) -> None:
            """Load, evict, pin or unpin the expert under the cursor."""
            table = self.query_one("#experts", DataTable)
            if not self.hello or table.cursor_row is None:
                return
            name = self.hello["experts"][table.cursor_row]["name"]
            self.run_worker(
                lambda: self._operate(operation, name), thread=True, exit_on_error=False
            )

        def _operate(self, operation: str, name: str) -> None:
            from urllib.parse import quote

            from service.cli.http_client import admin

            try:
                result = admin(url, "POST", f"/admin/experts/{quote(name)}/{operation}")
                message = f"{operation} {name}: done in {result['pools']} pool(s)"
            except CoeError as error:
                message = f"{operation} {name}: {error.message}"
            self.call_from_thread(self.show_message, message)

    return Top()
