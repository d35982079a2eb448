"""`coe check`: validates a config, and prints its prices and its memory plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.table_output import size, table

if TYPE_CHECKING:
    from service.config import Config
    from service.engine.swap_proof import SwapMethodChoice
    from service.gateway.routing.routing_setup import RoutingSetup
    from service.pool.memory_plan import PoolPlan

CONFIG = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("path", type=CONFIG)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(path: Path, as_json: bool) -> None:
    """Validate a config and print its memory plan; starts and fetches nothing."""
    from service.config import load_config
    from service.default_prices import with_default_prices
    from service.engine.command.program_check import check_programs

    config = load_config(path)
    priced = with_default_prices(config)
    prices, routing = _prices(config, priced), _routing(priced, check_artifacts(priced))
    if not as_json:
        _print_prices(prices)
        if len(config.experts) > 1:
            told = ", ".join(f"{n} {100 * cost:.3g} %" for n, cost in routing["presets"].items())
            click.echo(f"a point of quality may cost, of the best expert's answer: {told}")
        for line in routing["warnings"]:
            click.echo(f"warning: {line}", err=True)
    build_fault = torch_fault(config)
    for fault in () if as_json else filter(None, (build_fault, *gpu_faults(config))):
        click.echo(f"warning: {fault}", err=True)
    check_programs(config)
    plans = plans_of(config)
    unchecked = engine_arguments_unchecked(config)
    if as_json:
        found = {"config": str(path), "pools": [_plan_json(p) for p in plans], "prices": prices}
        if unchecked is not None:
            found["unchecked"] = unchecked
        if build_fault:
            found["torch"] = build_fault
        if faults := gpu_faults(config):
            found["gpus"] = faults
        click.echo(json.dumps(found | {"routing": routing}))
        return
    if unchecked is not None:
        click.echo(f"warning: {unchecked}", err=True)
    _print_plans(config, plans)


def check_artifacts(config: Config) -> RoutingSetup:
    """Read the router's artifact and the model folders, which raise where they can't be used."""
    from service.expert_capabilities import with_capabilities
    from service.gateway.routing.routing_setup import RoutingSetup

    setup = RoutingSetup(config)
    with_capabilities(config)
    return setup


def engine_arguments_unchecked(config: Config) -> str | None:
    """Let vLLM check its arguments; return why it could not, see `check_arguments`."""
    from service.engine.vllm.argument_check import check_arguments

    return check_arguments(config)


def gpu_faults(config: Config) -> list[str]:
    """Tell which pools need more GPUs than this machine has; none where it has none at all."""
    from service.deployment.gpu_check import node_faults
    from service.gpu_devices import gpus

    if not any(pool.gpus > 1 for pool in config.pools.values()):
        return []
    return node_faults(config, [float(len(gpus()))])


def torch_fault(config: Config) -> str:
    """Tell which pools could not run with the torch of this environment; empty if all can.

    A config may be checked on another machine than it runs on, so this is a warning here, and an
    error where a pool starts.
    """
    from service.torch_build import gpu_fault, torch_build

    kinds = [
        kind for kind, pool in config.pools.items() if pool.gpus > 0 and config.model_sources(kind)
    ]
    fault = gpu_fault(torch_build()) if kinds else ""
    return f"pools {', '.join(kinds)} can't run here: {fault}" if fault else ""


def plans_of(config: Config) -> list[Any]:
    """Return the checked memory plan of each pool."""
    from service import host_memory
    from service.gpu_devices import largest_gpu_bytes
    from service.models import inspect_model, locate
    from service.pool.memory_plan import check_plan, folders_of, plan_pool
    from service.pool.swap_method import resolve_swap_method, with_swap_method

    root = Path(config.models_dir) if config.models_dir else None
    sources = set(config.model_sources().values())
    found = {
        source: folder for source in sources if (folder := locate(source, root=root)) is not None
    }
    machine_bytes = host_memory.total_bytes()
    on_gpu = any(pool.gpus > 0 for pool in config.pools.values())
    gpu_bytes = largest_gpu_bytes() if on_gpu else None
    plans = []
    folders = folders_of(config, found) if sources else {}
    for kind in config.pools:
        resolved = resolve_swap_method(config, kind) if sources else None
        planned = config
        if resolved is not None and config.pools[kind].swap.method == "auto":
            planned = with_swap_method(config, kind, resolved.choice.method)
        plan = plan_pool(
            planned, kind, lambda name: inspect_model(folders[name]), gpu_bytes=gpu_bytes
        )
        check_plan(plan, machine_bytes)
        if resolved is not None:
            plan = _with_choice(plan, resolved.choice)
        plans.append(plan)
    return plans


def _with_choice(plan: PoolPlan, choice: SwapMethodChoice) -> PoolPlan:
    """Return the plan with a line on the pool's swap method."""
    from dataclasses import replace

    line = f"swap.method {choice.method} ({choice.reason})"
    if choice.source != "fallback":
        return replace(plan, notes=(*plan.notes, line))
    warning = (
        f"pools.{plan.kind}: {line}; a change of expert then restarts the engine, which may take "
        "40 to 120 s for a model of 7B. `coe doctor --config FILE` proves the faster methods on "
        "this machine"
    )
    return replace(plan, warnings=(*plan.warnings, warning))


def warnings_of(plans: list[Any]) -> list[str]:
    """Return the distinct warnings of all plans."""
    return list(dict.fromkeys(line for plan in plans for line in plan.warnings))


def _plan_json(plan: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(plan), "total_bytes": plan.total_bytes, "fits": plan.fits}


def _prices(config: Config, priced: Config) -> dict[str, Any]:
    """Return the unit of cost, the price of every expert, and what makes prices useless."""
    from service.broker.token_prices import prices_of
    from service.default_prices import price_warnings

    prices = prices_of(priced)
    return {
        "unit": config.prices.unit,
        "experts": {
            name: {"prompt": price.prompt, "completion": price.completion}
            for name, price in prices.items()
        },
        "warnings": list(price_warnings(config)),
    }


def _routing(priced: Config, setup: RoutingSetup) -> dict[str, Any]:
    """Return what a point may cost in each preset, and what makes `auto` do less than it could."""
    from service.gateway.routing.quality_cost_frontier import routing_warnings
    from service.gateway.routing.routing_setup import category_warnings

    warnings = category_warnings(priced, setup.stages.labels)
    presets = {"auto:fast": setup.presets.fast, "auto": setup.presets.auto}
    presets["auto:best"] = setup.presets.best
    return {
        "presets": {name: preset.point_cost for name, preset in presets.items()},
        "warnings": [*warnings, *routing_warnings(priced, setup)],
    }


def _print_prices(prices: dict[str, Any]) -> None:
    rows = [
        (name, f"{price['prompt']:.4g}", f"{price['completion']:.4g}")
        for name, price in prices["experts"].items()
    ]
    table((f"{prices['unit']} per million tokens", "prompt", "answer"), rows)
    for line in prices["warnings"]:
        click.echo(f"warning: {line}", err=True)


def _gpu_lines(plan: Any) -> list[str]:
    """Describe this machine's GPUs, and what the plan's engines reserve of those of a replica."""
    from service.gpu_devices import gpu_memory

    reserved: dict[str, float] = {}
    for share in plan.gpu_shares:
        # An engine without ids takes all GPUs of its replica.
        for gpu in [f"GPU {index}" for index in share.device_ids] or ["each GPU"]:
            reserved[gpu] = reserved.get(gpu, 0.0) + share.utilization
    lines = [f"{gpu} of a replica: {100 * share:.1f} % reserved" for gpu, share in reserved.items()]
    if reserved:
        lines += [
            f"this machine's GPU {memory.index}, {memory.name}: {size(memory.used_bytes)} of "
            f"{size(memory.total_bytes)} used now, {size(memory.free_bytes)} free"
            for memory in gpu_memory()
        ]
    return lines


def _print_plans(config: Config, plans: list[Any]) -> None:
    rows = []
    for plan in plans:
        for engine in plan.engines:
            names = ", ".join((engine.base, *engine.adapters))
            kv = (
                f"{size(engine.kv_bytes)} ({engine.kv_tokens} tokens)"
                if engine.kv_bytes
                else ("in its memory" if engine.by_command else "vLLM's share")
            )
            rows.append(
                (
                    plan.kind,
                    names,
                    size(engine.weight_bytes + engine.adapter_bytes + engine.draft_bytes),
                    kv,
                    size(engine.total_bytes),
                )
            )
        bound = size(plan.bound_bytes) if plan.bound_bytes is not None else "no bound"
        rows.append((plan.kind, "(a replica)", "", "", f"{size(plan.total_bytes)} of {bound}"))
        if plan.host_bytes:
            rows.append((plan.kind, "(its host memory)", size(plan.host_bytes), "", ""))
    table(("pool", "experts", "weights", "KV cache", "in all"), rows)
    for plan in plans:
        for engine, share in zip(plan.engines, plan.gpu_shares, strict=False):
            where = f" on GPU {', '.join(map(str, share.device_ids))}" if share.device_ids else ""
            beside = (
                f", and {size(share.layer_bytes)} beside it to make a layer of another expert ready"
                if share.layer_bytes
                else ""
            )
            click.echo(
                f"{plan.kind}: {engine.base}{where}: gpu_memory_utilization {share.utilization:g}"
                f"{beside}"
            )
        for line in _gpu_lines(plan):
            click.echo(f"{plan.kind}: {line}")
        for line in (*plan.moe, *plan.notes):
            click.echo(f"{plan.kind}: {line}")
        for name, other in plan.shared.items():
            click.echo(f"{plan.kind}: {name} has the weights of {other} and takes no memory")
    for line in warnings_of(plans):
        click.echo(f"warning: {line}", err=True)
    remote = [name for name, expert in config.experts.items() if expert.remote is not None]
    if remote:
        click.echo(f"remote: {', '.join(remote)}")
    click.echo("ok")
