"""The command `coe compose`."""

from __future__ import annotations

import difflib
import json
import math
import re
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from router_models.cli import OutcomeFilesCommand
from service.errors import CoeError, ConfigError

if TYPE_CHECKING:
    from router_models.composition.composition_problem import Accelerators, Problem
    from router_models.composition.composition_value import Composition
    from router_models.composition.recipe_estimates import Estimates
    from service.cli.compose.candidate_units import Candidates, Size
    from service.config import Config, PoolConfig

_FILE = click.Path(dir_okay=False, path_type=Path)
_ACCELERATORS = re.compile(r"^(\d+)\s*x\s*(.+)$")
_GIB = 1024**3
# vLLM's default share of a GPU's memory, and its workspace for each engine.
_GPU_SHARE = 0.9
_GPU_ENGINE_BYTES = 2 * _GIB
_DEFAULT_KV_BYTES = 2 * _GIB


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    from service.cli.compose.candidate_units import bytes_of

    if value is None:
        return None
    try:
        return bytes_of(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _accelerators(
    _: click.Context, __: click.Parameter, values: tuple[str, ...]
) -> list[tuple[int, int]]:
    from service.cli.compose.candidate_units import bytes_of

    found = []
    for value in values:
        match = _ACCELERATORS.match(value)
        try:
            if match is None or int(match[1]) < 1:
                raise ValueError("expected a number and the memory of each, such as 2x24GiB")
            found.append((int(match[1]), bytes_of(match[2])))
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return found


def _tokens(_: click.Context, __: click.Parameter, value: str) -> tuple[float, float]:
    try:
        prompt, answer = (float(part) for part in value.split(","))
    except ValueError:
        prompt = answer = math.nan
    if not (0 <= prompt < 1e9 and 0 <= answer < 1e9):
        raise click.BadParameter("expected the tokens of a prompt and an answer, such as 500,300")
    return prompt, answer


def _alternatives(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for value in values:
        original, equals, alternative = value.partition("=")
        if not (equals and original and alternative) or original == alternative:
            raise click.BadParameter("expected EXPERT=OTHER")
        found[alternative] = original
    return found


@click.command(cls=OutcomeFilesCommand)
@click.option(
    "--outcomes",
    type=_FILE,
    multiple=True,
    metavar="FILE...",
    help="Recorded outcomes of the experts, one JSON object a line, gzipped or not.",
)
@click.option(
    "--map",
    "artifact",
    type=click.Path(file_okay=False, path_type=Path),
    help="Instead of outcomes: a router artifact with an expert map.",
)
@click.option(
    "--config",
    "-c",
    "base",
    type=_FILE,
    required=True,
    help="The base config: its experts are the candidates, all other sections stay.",
)
@click.option(
    "--memory",
    callback=_bytes,
    metavar="SIZE",
    help="Memory for experts: of the machine on a CPU; beside accelerators, host memory for "
    "weights that wait (default: no bound).",
)
@click.option(
    "--accelerators",
    multiple=True,
    callback=_accelerators,
    metavar="NxSIZE",
    help="Accelerators and the memory of each, such as 2x24GiB; may be repeated.",
)
@click.option(
    "--traffic",
    metavar="FILE|URL",
    help="Shares by category: a JSON file, or the URL of a gateway's metrics. Default: as in the "
    "outcomes.",
)
@click.option("--budget", type=click.FloatRange(0), help="Most mean cost of a request.")
@click.option(
    "--slo-s",
    type=click.FloatRange(0),
    help="Longest mean wait for swaps that any category may have, in s.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0),
    help="Requests per second to keep up with; copies of experts are bought for it. --sizes then "
    "gives busy_s, the seconds of an accelerator that a request takes. Default: 0, any; with "
    "--live as measured, and busy_s, too.",
)
@click.option(
    "--window-s",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="With --live and without --rate: seconds to measure the rate for; 0 bounds no rate.",
)
@click.option("--sizes", type=_FILE, help="JSON: {expert: bytes, or {bytes, swap_s, busy_s, …}}.")
@click.option(
    "--costs",
    type=_FILE,
    help="JSON: {expert: cost of one call}. Default: the config's prices and --tokens.",
)
@click.option(
    "--tokens",
    callback=_tokens,
    default="500,300",
    show_default=True,
    help="Tokens of a usual prompt and answer, for costs.",
)
@click.option("--pool", "kind", help="The pool of the base config that is the model for pools.")
@click.option("--keep", multiple=True, metavar="EXPERT", help="Buy this expert in any case.")
@click.option(
    "--alternative",
    "alternatives",
    multiple=True,
    callback=_alternatives,
    metavar="EXPERT=OTHER",
    help="OTHER, an expert of the config, is an alternative to EXPERT, such as quantised weights: "
    "one of the two at most is bought, and OTHER has EXPERT's outcomes if it has none.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(1, min_open=False),
    default=60.0,
    show_default=True,
    help="Longest search, in s. The gap is told where it was too short.",
)
@click.option(
    "--analysis-s",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Longest time for the frontier, prices and worth of experts, in s; 0: none.",
)
@click.option("--out", "-o", type=_FILE, required=True, help="The config to write.")
@click.option("--report", "report_to", type=_FILE, help="Write the report to this JSON file.")
@click.option("--plot", "plot_to", type=_FILE, help="Draw the frontiers into this SVG file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option(
    "--live",
    metavar="URL",
    help="Take traffic and swap times from this running service, and print how --out, the config "
    "that it runs from, would change. Nothing is written without --apply.",
)
@click.option("--apply", is_flag=True, help="With --live: write --out and reload the service.")
def compose(**options: Any) -> None:
    """Buy the best composition for some memory and cost, and write it as a config.

    It chooses experts and their forms, their places in pools and slots, pins, copies and a recipe
    for each category, by an exact mixed-integer program.
    """
    if options["apply"] and not options["live"]:
        raise click.UsageError("--apply needs --live: without it --out is written at once")
    if bool(options["outcomes"]) == bool(options["artifact"]):
        raise click.UsageError("give either --outcomes or --map")
    try:
        run(options)
    except ValueError as error:  # outcomes that can't be used, or bounds that nothing fits
        raise ConfigError(str(error)) from None


def run(options: Mapping[str, Any]) -> Composition:
    """Run the command.

    With the option `quiet` nothing but the config is written, and with `use_idle` accelerators that
    are left over run more of what was bought.
    """
    from router_models.composition.composition_report import Report, analyse, readable, to_json
    from router_models.composition.composition_value import use_idle_accelerators
    from router_models.composition.highs_solver import solve
    from service.cli.compose.candidate_units import candidates, read_sizes
    from service.config import load_config, read_config
    from service.default_prices import with_default_prices

    base: Path = options["base"]
    config = with_default_prices(load_config(base))
    sizes = read_sizes(options["sizes"]) if options["sizes"] else {}
    measured = _measured(options["live"])
    kind, template = _template(config, options["kind"], bool(options["accelerators"]))
    on_gpu = bool(options["accelerators"])
    estimates = _estimates(config, options)
    required = _required(config, options)
    asked = {expert for recipe in estimates.recipes for expert in recipe.experts}
    found = candidates(
        config,
        sizes,
        template.vllm,
        on_gpu=on_gpu,
        merge=not on_gpu,
        wanted=(asked & config.experts.keys()) | required,
        measured_swap_s={n: s["swap_s"] for n, s in measured.items() if s["swap_s"]},
    )
    options, sizes = _with_rate(options, sizes, found, measured)
    time_price = config.router.presets.of("").time_price
    problem = _problem(options, estimates, found, sizes, template, required, time_price)
    quiet = options.get("quiet", False)
    for line in () if quiet else (*found.notes, *_unknown_categories(config, problem)):
        click.echo(f"coe: note: {line}", err=True)
    missing = sorted(set(config.experts) - set(problem.experts) - problem.required - problem.local)
    if missing and not quiet:
        click.echo(f"coe: note: without outcomes, and left out: {', '.join(missing)}", err=True)
    bought = solve(problem, time_limit_s=options["time_limit"])
    if options.get("use_idle", False):
        bought = use_idle_accelerators(problem, bought)
    data = _composed(base, config, options, problem, bought, found, kind, template)
    out: Path = options["out"]
    read_config(data, str(out), out.resolve().parent)
    report = (
        analyse(problem, bought, time_limit_s=options["analysis_s"])
        if options["analysis_s"]
        else Report(bought, (), (), (), {}, (), (), ())
    )
    # Costs of a file may be in any unit.
    unit = "units of --costs" if options.get("costs") else config.prices.unit
    _write_reports(options, to_json(problem, report, unit), report)
    if not options["as_json"] and not quiet:
        click.echo("\n".join(readable(problem, report, unit)))
    _put(out, data, options)
    return bought


def _unknown_categories(config: Config, problem: Problem) -> list[str]:
    """Return a note where prompts of some categories would not be recognised."""
    from service.classifier.router_artifact import load_artifact

    if config.router.artifact is None:
        return ["the base config has no router.artifact, so that auto always means the fallback"]
    artifact = load_artifact(Path(config.router.artifact))
    known = {str(name) for name in artifact.section("classifier")["categories"]}
    strange = [name for name in problem.categories if name not in known]
    if not strange:
        return []
    return [f"categories that the base config's classifier does not know: {', '.join(strange)}"]


def _template(config: Config, kind: str | None, on_gpu: bool) -> tuple[str | None, PoolConfig]:
    """Return the pool that is the model for pools, with its name in the base config."""
    from service.config import PoolConfig

    if kind is not None:
        if kind not in config.pools:
            raise ConfigError(f"no pool {kind!r}; pools: {', '.join(config.pools) or 'none'}")
        if (config.pools[kind].gpus > 0) != on_gpu:
            raise ConfigError(
                f"pools.{kind} is for {'GPUs; give --accelerators' if not on_gpu else 'a CPU'}"
            )
        return kind, config.pools[kind]
    alike = [name for name, pool in config.pools.items() if (pool.gpus > 0) == on_gpu]
    if alike:
        return alike[0], config.pools[alike[0]]
    if config.pools and not on_gpu:
        raise ConfigError("the base config's pools are for GPUs: give --accelerators NxSIZE")
    return None, PoolConfig(gpus=1 if on_gpu else 0)


def _measured(url: str | None) -> dict[str, dict[str, float]]:
    """Return a running service's measured `swap_s` and `busy_s` by expert; 0 where unmeasured."""
    from service.cli.http_client import admin

    if url is None:
        return {}
    found: dict[str, dict[str, float]] = {}
    for states in admin(url, "GET", "/admin/experts")["pools"].values():
        for name, state in states.items():
            known = found.setdefault(name, {"swap_s": 0.0, "busy_s": 0.0})
            for key in known:
                known[key] = max(known[key], float(state.get(key) or 0.0))
    return found


def _with_rate(
    options: Mapping[str, Any],
    sizes: Mapping[str, Size],
    found: Candidates,
    measured: Mapping[str, Mapping[str, float]],
) -> tuple[dict[str, Any], dict[str, Size]]:
    """Return the options with the rate to keep up with, and sizes with all that it needs.

    An expert that has not been measured counts like the slowest one that has.
    """
    from service.cli.compose.candidate_units import Size
    from service.cli.compose.traffic_shares import fetch_metrics, measure_rate

    rate, window_s = options["rate"], options["window_s"]
    if rate is not None or not options["live"]:
        return {**options, "rate": rate or 0.0}, dict(sizes)
    busy = {name: one["busy_s"] for name, one in measured.items() if one["busy_s"]}
    busy |= {name: one.busy_s for name, one in sizes.items() if one.busy_s is not None}
    if not busy or not window_s:
        return {**options, "rate": 0.0}, dict(sizes)
    click.echo(f"coe: measuring the rate of requests for {window_s:g} s", err=True)
    rate = measure_rate(options["live"], window_s, time.sleep, fetch_metrics)
    names = {expert for unit in found.units for expert in unit.experts}
    slowest = max(busy.values())
    told = {name: busy.get(name, slowest) for name in sorted(names)}
    if missing := sorted(names - busy.keys()):
        click.echo(
            f"coe: note: never measured, so that {slowest:g} s of an engine are taken for a "
            f"request: {', '.join(missing)}",
            err=True,
        )
    click.echo(f"coe: note: {rate:.3g} requests/s; --rate 0 ignores it", err=True)
    timed = {name: replace(sizes.get(name, Size()), busy_s=told[name]) for name in told}
    return {**options, "rate": rate}, {**sizes, **timed}


def _estimates(config: Config, options: Mapping[str, Any]) -> Estimates:
    from router_models.composition.recipe_estimates import (
        estimate,
        from_map,
        with_alternatives,
        with_named_recipes,
    )
    from router_models.outcome_reader import read_costs, read_outcomes
    from service.broker.token_prices import cost, prices_of
    from service.classifier.expert_map import ExpertMap
    from service.classifier.router_artifact import load_artifact
    from service.cli.compose.traffic_shares import read_traffic

    source = options["traffic"] or options["live"]
    traffic = read_traffic(source) if source else None
    live = bool(source) and str(source).startswith(("http://", "https://"))
    recipes = {name: recipe.recipe() for name, recipe in config.recipes.items()}
    if options["artifact"]:
        known = ExpertMap.from_artifact(load_artifact(options["artifact"]))
        shares = _smoothed(traffic, known.categories) if live else traffic
        return with_named_recipes(from_map(known, shares), recipes)
    prompt, answer = options["tokens"]
    costs = {name: cost(p, prompt, answer) for name, p in prices_of(config).items()}
    if options["costs"]:
        given = read_costs(options["costs"], options["outcomes"])
        costs = {name: given[name] for name in (*costs, *recipes) if name in given}
    elif recipes:
        costs |= _recorded_costs(options["outcomes"], recipes)
    table, skipped = read_outcomes(options["outcomes"], costs)
    for line in skipped.lines():
        click.echo(f"coe: note: {line}", err=True)
    alternatives = options["alternatives"]
    for alternative in alternatives:
        if alternative not in costs:
            raise ConfigError(f"--alternative: no expert {alternative!r} with a cost in the config")
    if live:
        traffic = _smoothed(traffic, {c for c in table.categories if c is not None})
    found = estimate(with_alternatives(table, alternatives, costs), traffic)
    return with_named_recipes(found, recipes)


def _recorded_costs(files: Sequence[Path], names: Collection[str]) -> dict[str, float]:
    """The mean recorded cost of these recipes, as far as it was recorded."""
    from router_models.outcome_reader import OutcomeError, costs_of

    try:
        recorded = costs_of(None, files)
    except OutcomeError:
        return {}
    return {name: recorded[name] for name in names if name in recorded}


def _smoothed(counts: Mapping[str, float] | None, categories: Iterable[str]) -> dict[str, float]:
    """Count one more request of each category: what has not come yet may still come."""
    return {c: (counts or {}).get(c, 0.0) + 1.0 for c in {*(counts or {}), *categories}}


def _required(config: Config, options: Mapping[str, Any]) -> set[str]:
    """Return the experts that are bought in any case: the fallback, embedders and --keep's."""
    for name in options["keep"]:
        if name not in config.experts:
            raise ConfigError(f"--keep: no expert {name!r}; experts: {', '.join(config.experts)}")
    embedding = {name for name in config.experts if config.uses_pooling_runner(name)}
    return {config.fallback, *options["keep"]} | embedding


def _problem(
    options: Mapping[str, Any],
    estimates: Estimates,
    found: Candidates,
    sizes: Mapping[str, Size],
    template: PoolConfig,
    required: set[str],
    time_price: float,
) -> Problem:
    from router_models.composition.composition_problem import Bounds, Problem
    from router_models.composition.recipe_estimates import only

    local = {expert for unit in found.units for expert in unit.experts}
    estimates = only(estimates, [*local, *found.remote])
    if not estimates.recipes:
        raise ConfigError("no outcomes of any expert of the config")
    groups: dict[str, set[str]] = {}
    for alternative, original in options["alternatives"].items():
        groups.setdefault(original, {original}).add(alternative)
    on_gpu = bool(options["accelerators"])
    host = options["memory"] if on_gpu and options["memory"] is not None else math.inf
    return Problem(
        categories=estimates.categories,
        recipes=estimates.recipes,
        share=estimates.share,
        quality=estimates.quality,
        cost=estimates.cost,
        reach=estimates.reach,
        units=tuple(found.units),
        accelerators=_kinds(options, template),
        bounds=Bounds(
            cost=math.inf if options["budget"] is None else options["budget"],
            wait_s=math.inf if options["slo_s"] is None else options["slo_s"],
            host_bytes=host,
            rate_per_s=options["rate"],
        ),
        remote=frozenset(found.remote),
        required=frozenset(required),
        exclusive=tuple(frozenset(group) for group in groups.values()),
        busy_s={name: one.busy_s for name, one in sizes.items() if one.busy_s is not None},
        time_price=time_price,
    )


def _kinds(options: Mapping[str, Any], template: PoolConfig) -> tuple[Accelerators, ...]:
    from router_models.composition.composition_problem import Accelerators, SwapMethod
    from service.pool.memory_plan import ENGINE_BYTES, REPLICA_BYTES

    method = template.swap.method
    kv_bytes = template.vllm.kv_cache_bytes or _DEFAULT_KV_BYTES
    if options["accelerators"]:
        # Only the machine with the accelerators knows which faster method is proven there.
        swap = SwapMethod.RESPAWN if method == "auto" else SwapMethod(method)
        return tuple(
            Accelerators(
                f"gpu-{i}" if len(options["accelerators"]) > 1 else "gpu",
                count,
                int(size * _GPU_SHARE),
                engine_bytes=kv_bytes + _GPU_ENGINE_BYTES,
                method=swap,
            )
            for i, (count, size) in enumerate(options["accelerators"], start=1)
        )
    if options["memory"] is None:
        raise ConfigError("give --memory SIZE, the memory for experts on this machine")
    return (
        Accelerators(
            "cpu",
            1,
            options["memory"],
            engine_bytes=kv_bytes + ENGINE_BYTES,
            replica_bytes=REPLICA_BYTES,
            unified=True,
            method=SwapMethod.INPLACE if method == "auto" else SwapMethod(method),
        ),
    )


def _composed(
    base: Path,
    config: Config,
    options: Mapping[str, Any],
    problem: Problem,
    bought: Composition,
    found: Candidates,
    kind: str | None,
    template: PoolConfig,
) -> dict[str, Any]:
    from service.cli.compose.composed_config import compose_config, rebased

    out: Path = options["out"]
    running = _data(out).get("pools") if options["live"] and out.exists() else None
    data = compose_config(
        _data(base),
        problem,
        bought,
        forms=found.forms,
        fallback=config.fallback,
        template=kind,
        kv_cache_bytes=template.vllm.kv_cache_bytes or _DEFAULT_KV_BYTES,
        running=running,
    )
    return rebased(data, base.parent, out.parent)


def _data(path: Path) -> dict[str, Any]:
    import yaml

    from service.config.strict_yaml_loader import ConfigLoader

    with path.open(encoding="utf-8") as file:
        data: dict[str, Any] = yaml.load(file, ConfigLoader)  # a safe loader, made stricter
    return data


def _text(data: Mapping[str, Any], notes: str = "") -> str:
    """Write a config's data as YAML; lists, and objects of numbers, take one line."""
    import yaml

    from service.config.strict_yaml_loader import ConfigDumper

    class Dumper(ConfigDumper):
        def represent_sequence(self, tag: str, sequence: Any, flow_style: Any = None) -> Any:
            return super().represent_sequence(tag, sequence, flow_style=True)

        def represent_mapping(self, tag: str, mapping: Any, flow_style: Any = None) -> Any:
            numbers = bool(mapping) and all(isinstance(v, float) for v in mapping.values())
            return super().represent_mapping(tag, mapping, flow_style=numbers)

        def ignore_aliases(self, _: Any) -> bool:
            return True

    body = yaml.dump(dict(data), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)
    return f"{notes}{body}"


def _write_reports(options: Mapping[str, Any], found: Mapping[str, Any], report: Any) -> None:
    from router_models.composition.frontier_plot import frontier_svg

    text = json.dumps(found, allow_nan=False)
    if options["report_to"]:
        options["report_to"].write_text(text + "\n", encoding="utf-8")
    if options["plot_to"]:
        options["plot_to"].write_text(frontier_svg(report), encoding="utf-8")
    if options["as_json"]:
        click.echo(text)


def _put(out: Path, data: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Write the config, or show how it would change."""
    notes = (
        "# Written by `coe compose`, which keeps no comments of its base config. The planner\n"
        "# moves weights by demand. With --live URL it is solved again for a service's traffic.\n"
    )
    if options["live"]:
        before = _text(_data(out)).splitlines() if out.exists() else []
        after = _text(data).splitlines()
        names = (f"{out} (now)", f"{out} (proposed)")
        changes = list(difflib.unified_diff(before, after, *names, lineterm=""))
        click.echo("\n".join(changes) if changes else f"{out}: nothing to change", err=True)
        if changes and out.exists():
            click.echo("\n".join(_effects(out, data)), err=True)
        if not options["apply"] or not changes:
            return
    previous = out.read_bytes() if out.exists() else None
    _replace(out, _text(data, notes).encode())
    if options.get("quiet"):
        return
    if not options["live"]:
        click.echo(f"wrote {out}: coe check {out}", err=True)
        return
    from service.cli.http_client import admin

    try:
        done = admin(options["live"], "POST", "/admin/reload")
    except CoeError:
        # The service goes on with the config that it has, and so should its file.
        if previous is not None:
            _replace(out, previous)
        raise
    click.echo(f"reloaded: {json.dumps(done)}", err=True)


def _effects(out: Path, data: Mapping[str, Any]) -> list[str]:
    """Return what a reload would do to the running service, and what it can't do, a line each."""
    from service.config import load_config, read_config
    from service.deployment.live_changes import fixed_sections, pool_changes

    old, new = load_config(out), read_config(data, str(out), out.resolve().parent)
    lines = [f"while the service runs: {line}" for line in pool_changes(old, new).sentences()]
    if fixed := fixed_sections(old, new):
        lines.append(
            f"needs a restart of the service: {', '.join(fixed)} changed, so that a reload refuses "
            "this config"
        )
    return lines or ["while the service runs: no pool is added, removed or replaced"]


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    if path.exists():
        shutil.copymode(path, part)
    part.replace(path)
