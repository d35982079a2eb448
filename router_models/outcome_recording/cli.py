"""`coe outcomes`: the commands that record, show and join outcomes of one's own experts."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import urlsplit

import click

from service.types import Kind

if TYPE_CHECKING:
    from router_models.outcome_recording.recorder import Progress, RecorderSettings
    from router_models.outcome_recording.task_reader import Task
    from service.broker.token_prices import Price

_FILE = click.Path(dir_okay=False, path_type=Path)
_PLAIN_EVERY_S = 15.0
_SHOWN = 5


# What `GET /v1/models` calls recipes of several experts.
_RECIPE_KINDS = frozenset(get_args(Kind)) - {"single"}


@click.group(name="outcomes")
def group() -> None:
    """Record what your own experts answer, and how well, for `coe router fit`."""


@group.command()
@click.option("--prompts", type=_FILE, multiple=True, help="Prompts with checks, a JSON a line.")
@click.option("--builtin", is_flag=True, help="The prompts that come with coe.")
@click.option("--experts", required=True, help="Names with commas between, or all.")
@click.option("--out", type=_FILE, required=True, help="The file; an existing one is continued.")
@click.option(
    "--base-url",
    envvar="COE_URL",
    default="http://127.0.0.1:8000",
    show_default=True,
    help="The service, or any endpoint with OpenAI's API.",
)
@click.option(
    "--key-env",
    help="Environment variable with the API key. Default: COE_API_KEY, for $COE_URL and this "
    "machine only.",
)
@click.option("--categories", help="Only these categories, with commas between.")
@click.option("--limit", type=click.IntRange(1), help="At most so many prompts of a category.")
@click.option("--judge", help="The expert that judges prompts with a judge's check.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@click.option("--concurrency", type=click.IntRange(1, 1000), default=8, show_default=True)
@click.option("--attempts", type=click.IntRange(1, 20), default=5, show_default=True)
@click.option("--timeout", "timeout_s", type=click.FloatRange(1), default=600.0, show_default=True)
@click.option("--max-cost", type=click.FloatRange(0), help="The most that the file may cost.")
@click.option(
    "--prices",
    type=_FILE,
    help='JSON: {expert: {"prompt", "completion"}}, units of price per million tokens. Default: '
    "as the service tells.",
)
def record(
    prompts: tuple[Path, ...],
    builtin: bool,
    experts: str,
    out: Path,
    base_url: str,
    key_env: str | None,
    categories: str | None,
    limit: int | None,
    prices: Path | None,
    max_cost: float | None,
    timeout_s: float,
    **given: Any,
) -> None:
    """Ask experts prompts with known answers, score them, and write the rows of outcomes.

    Every expert gets every prompt, behind all other requests. Calls that are in the file already
    are not repeated, so the same command continues after a stop. Failed calls are recorded as
    errors, and repeated by the next run.
    """
    from router_models.outcome_recording.recorder import RecorderSettings
    from router_models.outcome_recording.task_reader import builtin_files, read_tasks

    files = [*(builtin_files() if builtin else ()), *prompts]
    if not files:
        raise click.UsageError("give --prompts FILE or --builtin")
    if out.suffix == ".gz":
        raise click.UsageError("--out is written line by line and can't be compressed")

    def work() -> None:
        tasks = _chosen(read_tasks(files), _names(categories), limit)
        settings = RecorderSettings(
            experts=tuple(_names(experts) or ()),
            max_cost=math.inf if max_cost is None else max_cost,
            **given,
        )
        access = _Access(base_url, key_for(base_url, key_env), timeout_s, prices)
        try:
            asyncio.run(_record(tasks, settings, access, out))
        except KeyboardInterrupt:
            _note(f"stopped; the same command continues {out}")
            sys.exit(130)

    _guarded(work)


def key_for(base_url: str, key_env: str | None) -> str | None:
    """The API key. The key of this service is sent to no other host that is named by hand."""
    if key_env is not None:
        if not os.environ.get(key_env):
            raise click.UsageError(f"--key-env: the environment variable {key_env} is not set")
        return os.environ[key_env]
    host = urlsplit(base_url).hostname
    own = host in ("localhost", "127.0.0.1", "::1") or base_url == os.environ.get("COE_URL")
    return os.environ.get("COE_API_KEY") or None if own else None


class _Access:
    """Where to ask, and what it costs."""

    def __init__(
        self, base_url: str, key: str | None, timeout_s: float, prices: Path | None
    ) -> None:
        self.base_url = base_url
        self.key = key
        self.timeout_s = timeout_s
        self.prices = prices


async def _record(
    tasks: list[Task], settings: RecorderSettings, access: _Access, out: Path
) -> None:
    from dataclasses import replace

    from router_models.outcome_reader import OutcomeError
    from router_models.outcome_recording.endpoint_client import CallError, Endpoint
    from router_models.outcome_recording.outcome_file import OutcomeFile
    from router_models.outcome_recording.recorder import Recorder

    tasks = await _possible(tasks, settings.judge)
    endpoint = Endpoint(
        access.base_url,
        key=access.key,
        timeout_s=access.timeout_s,
        concurrency=settings.concurrency,
    )
    async with endpoint:
        try:
            listed = await endpoint.models()
        except CallError as error:
            if not error.reached or error.final:
                raise OutcomeError(str(error)) from None
            listed = {}
        settings = replace(settings, experts=_experts(settings.experts, listed))
        recipes = frozenset(name for name, item in listed.items() if item.kind in _RECIPE_KINDS)
        settings = replace(settings, recipes=recipes & frozenset(settings.experts))
        wanted = [*settings.experts, *([settings.judge] if settings.judge else ())]
        # Presets and categories of `auto` are not listed.
        names = {name: "auto" if name.startswith(("auto:", "auto/")) else name for name in wanted}
        if listed and (unknown := [name for name in wanted if names[name] not in listed]):
            raise OutcomeError(
                f"{endpoint.url} has no {', '.join(unknown)}; it has {', '.join(listed)}"
            )
        prices = {name: item.price for name, item in listed.items() if item.price is not None}
        if access.prices is not None:
            prices |= _read_prices(access.prices)
        _check_bound(settings.max_cost, prices, wanted)
        if settings.judge in settings.experts:
            _note(f"note: {settings.judge} judges its own answers too; judges favour themselves")
        with OutcomeFile(out) as file, _ShownProgress(settings.max_cost) as say:
            recorder = Recorder(
                endpoint,
                file,
                tasks,
                settings,
                prices=prices,
                jitter=random.Random(),
                say=say,
            )
            progress = await recorder.run()
    _report(progress, out)


async def _possible(tasks: list[Task], judge: str | None) -> list[Task]:
    """The tasks whose checks can be made here; tells which can't, and why.

    Raises:
        OutcomeError: None can.
    """
    from router_models.outcome_reader import OutcomeError
    from router_models.outcome_recording.sandboxed_unit_tests import probe

    kinds = {task.check.kind for task in tasks}
    reasons = {}
    if "judge" in kinds and judge is None:
        reasons["judge"] = "give --judge EXPERT"
    if "unit_tests" in kinds and (reason := await probe()):
        reasons["unit_tests"] = f"there is no sandbox on this machine: {reason}"
    for kind, reason in reasons.items():
        count = sum(task.check.kind == kind for task in tasks)
        _note(f"left out {count} prompts with the check {kind}: {reason}")
    possible = [task for task in tasks if task.check.kind not in reasons]
    if not possible:
        raise OutcomeError("no prompt is left")
    return possible


def _chosen(tasks: list[Task], categories: Sequence[str] | None, limit: int | None) -> list[Task]:
    """The tasks of these categories, at most `limit` of each."""
    from router_models.outcome_reader import OutcomeError

    known = {task.category for task in tasks}
    if categories and (unknown := [name for name in categories if name not in known]):
        raise OutcomeError(
            f"no prompt has the category {', '.join(unknown)}; there are "
            + ", ".join(sorted(name for name in known if name))
        )
    counts: dict[str | None, int] = {}
    chosen = []
    for task in tasks:
        if categories and task.category not in categories:
            continue
        counts[task.category] = counts.get(task.category, 0) + 1
        if limit is None or counts[task.category] <= limit:
            chosen.append(task)
    return chosen


def _experts(given: tuple[str, ...], listed: Mapping[str, Any]) -> tuple[str, ...]:
    """The experts' names; `all` stands for all that the endpoint lists by themselves."""
    from router_models.outcome_reader import OutcomeError

    if given != ("all",):
        if not given:
            raise OutcomeError("--experts needs at least one name")
        return tuple(dict.fromkeys(given))
    alone = ("", "full", "lora", "steered", "remote")
    found = tuple(name for name, item in listed.items() if item.kind in alone)
    if not found:
        raise OutcomeError("the endpoint lists no experts; name them with --experts")
    return found


def _read_prices(path: Path) -> dict[str, Price]:
    from router_models.outcome_reader import OutcomeError
    from service.broker.token_prices import Price

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutcomeError(f"{path}: {error}") from None
    found = {}
    for name, price in data.items() if isinstance(data, dict) else ():
        values = price if isinstance(price, dict) else {}
        amounts = [values.get(side) for side in ("prompt", "completion")]
        if values.keys() != {"prompt", "completion"} or not all(
            isinstance(amount, int | float) and not isinstance(amount, bool) and 0 <= amount < 1e15
            for amount in amounts
        ):
            raise OutcomeError(
                f'{path}: {name}: expected {{"prompt": number, "completion": number}}, in units of '
                "price per million tokens"
            )
        found[str(name)] = Price(float(amounts[0]), float(amounts[1]))  # type: ignore[arg-type]
    if not found:
        raise OutcomeError(f"{path}: expected an object of expert names and prices")
    return found


def _check_bound(max_cost: float, prices: Mapping[str, Price], wanted: Sequence[str]) -> None:
    from router_models.outcome_reader import OutcomeError

    if math.isinf(max_cost):
        return
    if missing := [name for name in wanted if name not in prices]:
        raise OutcomeError(
            f"--max-cost needs the price of {', '.join(missing)}: the endpoint tells none, so give "
            "--prices FILE"
        )
    if free := [name for name in wanted if prices[name].prompt == prices[name].completion == 0]:
        _note(f"note: the price of {', '.join(free)} is 0, so --max-cost does not bound their use")


def _report(progress: Progress, out: Path) -> None:
    _note(
        f"{out}: {progress.done} of {progress.total} outcomes, {progress.failed} failed, "
        f"cost {progress.cost:.6g}"
    )
    for code, count in sorted(progress.errors.items(), key=lambda item: -item[1])[:_SHOWN]:
        _note(f"  {count} x {code}")
    if progress.stopped is not None:
        raise click.ClickException(f"stopped: {progress.stopped}. The same command continues.")
    if progress.done < progress.total:
        raise click.ClickException("some calls failed; the same command asks them again.")


class _ShownProgress:
    """Shows the progress: a bar on a terminal, else a line every 15 s."""

    def __init__(self, max_cost: float) -> None:
        self._most = "" if math.isinf(max_cost) else f" of {max_cost:g}"
        self._bar: Any = None
        self._told_s = -math.inf

    def __enter__(self) -> Callable[[Progress], None]:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=None, figures="")
        self._begun_s = time.monotonic()
        self._first: int | None = None
        return self._say

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _say(self, progress: Progress) -> None:
        figures = f"{progress.tokens:,} tokens · cost {progress.cost:.4g}{self._most}"
        if progress.failed:
            figures += f" · {progress.failed} failed"
        finished = progress.done + progress.failed
        if self._bar is not None:
            self._bar.update(self._task, total=progress.total, completed=finished, figures=figures)
            return
        now_s = time.monotonic()
        self._first = finished - 1 if self._first is None else self._first
        if now_s - self._told_s >= _PLAIN_EVERY_S:
            self._told_s = now_s
            left = (progress.total - finished) * (now_s - self._begun_s)
            left /= max(1, finished - self._first)
            _note(f"{finished} of {progress.total} · {figures} · {left:.0f} s to go")


@group.command()
@click.argument("file", type=_FILE)
@click.option("--by", type=click.Choice(["category", "expert"]), default="category")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def show(file: Path, by: str, as_json: bool) -> None:
    """Show each expert's mean score by category, with 95 % intervals, tokens, cost and time."""
    from router_models.outcome_recording.outcome_file import join_rows, read_rows
    from router_models.outcome_recording.outcome_summary import ALL, summarise

    cells = _guarded(lambda: summarise(join_rows(read_rows(file)).values()))
    if by == "expert":
        cells = [cell for cell in cells if cell.category == ALL]
    if as_json:
        for cell in cells:
            click.echo(json.dumps(_without_nan(asdict(cell))))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    heads = (
        "expert",
        "category",
        "score",
        "95 %",
        "prompts",
        "failed",
        "tokens",
        "cost",
        "s",
        "cut",
    )
    for name in heads:
        table.add_column(name, justify="left" if name in heads[:2] else "right")
    for cell in cells:
        scored = cell.prompts > 0
        table.add_row(
            Text(cell.expert),
            Text(cell.category),
            f"{cell.score:.3f}" if scored else "–",
            f"{cell.low:.2f}–{cell.high:.2f}" if scored else "–",
            str(cell.prompts),
            str(cell.failed or ""),
            f"{_or_dash(cell.prompt_tokens, '.0f')} + {_or_dash(cell.completion_tokens, '.0f')}",
            _or_dash(cell.cost, ".3g"),
            _or_dash(cell.seconds, ".2f"),
            _or_dash(cell.cut, ".0%"),
            style="bold" if cell.category == ALL else "",
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _without_nan(data: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in data.items()}


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


@group.command()
@click.argument("files", type=_FILE, nargs=-1, required=True)
@click.option("--out", type=_FILE, required=True, help="The new file.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def merge(files: tuple[Path, ...], out: Path, force: bool) -> None:
    """Join files of outcomes: rows of one id become one; a later file's outcome wins."""
    from router_models.outcome_recording.outcome_file import merge as join
    from router_models.outcome_recording.outcome_file import read_rows, write_rows

    def work() -> None:
        if out.exists() and not force:
            raise click.UsageError(f"{out} exists; --force replaces it")
        rows, replaced = join({file: read_rows(file) for file in files})
        write_rows(out, rows.values())
        outcomes = sum(len(row["outcomes"]) for row in rows.values())
        _note(f"{out}: {len(rows)} rows, {outcomes} outcomes, {replaced} replaced by a later file")

    _guarded(work)


_folder_options = (
    click.option(
        "--config", type=_FILE, help="The service's config, for the folder that it names."
    ),
    click.option(
        "--folder",
        type=click.Path(file_okay=False, path_type=Path),
        help="The folder itself. Default: shadow-outcomes beside the admin key.",
    ),
    click.option("--tenant", help="Only this tenant's."),
)


def _of_traffic(command: Callable[..., None]) -> Callable[..., None]:
    for option in _folder_options:
        command = option(command)
    return command


@group.command()
@_of_traffic
@click.option("--out", type=_FILE, required=True, help="The new file; only you can read it.")
def export(tenant: str | None, folder: Path | None, config: Path | None, out: Path) -> None:
    """Write the outcomes that shadow evaluation recorded on this machine into one file.

    Rows of tenants that keep no prompts have a hash instead. `coe router refit` uses all rows,
    `coe router fit` those with prompts.
    """
    from router_models.outcome_recording import traffic_outcomes_export

    count, prompts = _guarded(
        lambda: traffic_outcomes_export.export(
            traffic_outcomes_export.folder_of(folder, config), out, tenant
        )
    )
    _note(f"{out}: {count} rows, {prompts} with their prompts")


@group.command()
@_of_traffic
@click.option("--all", "everybody", is_flag=True, help="The outcomes of all tenants.")
def forget(tenant: str | None, folder: Path | None, config: Path | None, everybody: bool) -> None:
    """Delete the outcomes that shadow evaluation recorded on this machine.

    Requests that were answered before are not recorded any more, also where a gateway evaluates
    them just now.
    """
    from router_models.outcome_recording import traffic_outcomes_export

    if (tenant is None) is not everybody:
        raise click.UsageError("give either --tenant NAME or --all")
    count = _guarded(
        lambda: traffic_outcomes_export.forget(
            traffic_outcomes_export.folder_of(folder, config), tenant
        )
    )
    _note(f"deleted {count} outcomes")


def _names(given: str | None) -> list[str] | None:
    if given is None:
        return None
    return [name.strip() for name in given.split(",") if name.strip()]


def _guarded(work: Callable[[], Any]) -> Any:
    """Run the command. An error that the user can correct becomes its message alone."""
    from service.errors import CoeError

    try:
        return work()
    except CoeError as error:
        raise click.ClickException(error.message) from error
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _note(line: str) -> None:
    click.echo(line, err=True)
