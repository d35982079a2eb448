"""`coe top`: the console in a terminal."""

from __future__ import annotations

import json
import time
from typing import Any, ClassVar

import click

from service.cli.http import admin_headers, url_option
from service.cli.output import size
from service.cli.sse import events, open_stream
from service.errors import CoeError


@click.command()
@url_option
@click.option("--json", "as_json", is_flag=True, help="Print the state once, as one JSON object.")
def top(url: str, as_json: bool) -> None:
    """Experts, queues, swaps and recent routes, live. q quits; l, e, p move the chosen expert."""
    if as_json:
        with open_stream(url, "/console/events", admin_headers(url)) as reply:
            for name, data in events(reply):
                if name in ("hello", "progress"):
                    click.echo(json.dumps(json.loads(data)))
                    return
        raise CoeError(f"{url}: the stream of events ended before it began")
    make_app(url).run()


def rows_of(hello: dict[str, Any], state: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each expert: name, kind, tier, bytes, running, waiting, tokens/s, last swap."""
    rows: list[tuple[str, ...]] = []
    for expert in hello["experts"]:
        name = expert["name"]
        held = [pool["experts"][name] for pool in state["pools"] if name in pool["experts"]]
        nowhere: dict[str, Any] = {"state": "disk"}
        best = min(held, key=lambda one: _TIERS.index(one["state"]), default=nowhere)
        best = {**best, **state["remotes"].get(name, {})}
        tier = best["state"]
        if tier == "loading" and best.get("eta_s", 0) >= 1:
            tier = f"in {best['eta_s']:.0f} s"
        held_bytes = best.get("host_bytes") or best.get("weight_bytes") or 0
        swap = best.get("last_swap")
        rate = sum(one.get("tokens_per_s", 0.0) for one in held)
        rows.append(
            (
                name + (" (pinned)" if best.get("pinned") else ""),
                expert["kind"],
                tier,
                size(held_bytes) if held_bytes else "",
                str(sum(one.get("running", 0) for one in held)),
                str(sum(one.get("waiting", 0) for one in held)),
                f"{rate:.1f}" if rate else "",
                f"{swap['swap_s'] * 1000:.0f} ms, {swap['ago_s']:.0f} s ago" if swap else "",
            )
        )
    return rows


_TIERS = ("device", "host", "loading", "draining", "disk", "failed")
_EXPERTS = ("expert", "kind", "tier", "bytes", "running", "waiting", "tokens/s", "last swap")
_ROUTES = ("time", "asked", "category", "answered by", "queue", "swap", "first byte", "in all", "")


def route_row(one: dict[str, Any]) -> tuple[str, ...]:
    """A row for one recent request."""
    sure = f"{one['category']} {one['confidence']:.0%}" if one["category"] else "named"
    by = one["expert"] or "nobody"
    if one["recipe"] not in ("", by):
        by = one["recipe"]
    times = (one["queue_ms"] - one["swap_ms"], one["swap_ms"], one["first_ms"], one["total_ms"])
    clock = time.strftime("%H:%M:%S", time.localtime(one["at_s"]))
    shown = tuple(f"{max(0.0, value):.0f} ms" if value else "–" for value in times)
    return (clock, one["asked"], sure, by, *shown, one["outcome"])


def make_app(url: str) -> Any:
    """The terminal application. Here, so that `coe --help` needs no textual."""
    from textual.app import App, ComposeResult
    from textual.containers import Vertical
    from textual.widgets import DataTable, Footer, Static

    class Top(App[None]):
        """Follows one service until q."""

        TITLE = "coe top"
        CSS = """
        #head { padding: 0 1; height: 1; color: $text; background: $primary; }
        #said { padding: 0 1; height: 1; color: $text-muted; }
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
            """Two tables between a line of figures and one of what was done."""
            yield Static(f"{url}: connecting", id="head", markup=False)
            with Vertical():
                yield DataTable(id="experts", cursor_type="row", zebra_stripes=True)
                yield Static("", id="said", markup=False)
                yield DataTable(id="routes", cursor_type="none")
            yield Footer()

        def on_mount(self) -> None:
            """Start following."""
            self.query_one("#experts", DataTable).add_columns(*_EXPERTS)
            self.query_one("#routes", DataTable).add_columns(*_ROUTES)
            self.run_worker(self._follow, thread=True, exit_on_error=False)

        def _follow(self) -> None:
            """In a thread: read events for ever, again after a moment where they end."""
            while self.is_running:
                try:
                    with open_stream(url, "/console/events", admin_headers(url)) as reply:
                        for name, data in events(reply):
                            self.call_from_thread(self.show, name, json.loads(data))
                except (CoeError, OSError, ValueError) as error:
                    words = error.message if isinstance(error, CoeError) else str(error)
                    if not self.is_running:
                        return
                    self.call_from_thread(self.say, words)
                time.sleep(1)

        def say(self, words: str) -> None:
            """In the line between the tables."""
            self.query_one("#said", Static).update(words)

        def show(self, name: str, told: dict[str, Any]) -> None:
            """One event."""
            if name == "progress":
                now = next((step["name"] for step in told["steps"] if step["now"]), "")
                self.query_one("#head", Static).update(
                    f"{url}: starting, {told['elapsed_s']:.0f} s: {now}"
                )
            elif name == "hello":
                self.hello = told
                self.query_one("#routes", DataTable).clear()
                self._add_routes(told["routes"])
                self._draw(told["state"])
            elif name == "routes":
                self._add_routes(told["routes"])
            elif name == "state" and self.hello:
                self._draw(told)

        def _draw(self, state: dict[str, Any]) -> None:
            totals = state["totals"]
            self.query_one("#head", Static).update(
                f"{url}   {totals['requests']} answers a minute   {state['in_flight']} in flight"
                f"   first byte {totals['first_ms']:.0f} ms   "
                f"{len([pool for pool in state['pools'] if pool['boot']])} pools"
            )
            table = self.query_one("#experts", DataTable)
            at = table.cursor_row
            table.clear()
            for row in rows_of(self.hello, state):
                table.add_row(*row)
            if at:
                table.move_cursor(row=at)

        def _add_routes(self, routes: list[dict[str, Any]]) -> None:
            table = self.query_one("#routes", DataTable)
            kept = [table.get_row(key) for key in table.rows]
            table.clear()
            for row in ([route_row(one) for one in reversed(routes)] + kept)[:100]:
                table.add_row(*row)

        def action_operate(self, act: str) -> None:
            """Load, evict, pin or unpin the expert under the cursor."""
            table = self.query_one("#experts", DataTable)
            if not self.hello or table.cursor_row is None:
                return
            name = self.hello["experts"][table.cursor_row]["name"]
            self.run_worker(lambda: self._operate(act, name), thread=True, exit_on_error=False)

        def _operate(self, act: str, name: str) -> None:
            from urllib.parse import quote

            from service.cli.http import admin

            try:
                done = admin(url, "POST", f"/admin/experts/{quote(name)}/{act}")
                words = f"{act} {name}: done in {done['pools']} pool(s)"
            except CoeError as error:
                words = f"{act} {name}: {error.message}"
            self.call_from_thread(self.say, words)

    return Top()
