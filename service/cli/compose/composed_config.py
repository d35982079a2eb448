"""Writes a bought composition as a config: experts, pins, qualities, recipes and pools. Pure.

All other sections stay as they are in the base config, but for names of what is not bought. At run
time the result is where the service starts from: the planner keeps and moves weights by demand, and
feedback shifts qualities.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from router_models.composition.composition_problem import Problem, SwapMethod, Unit
from router_models.composition.composition_value import Composition, Holding, shortest_waits
from service.config.aliases import alias_section
from service.config.name_and_path_fields import TEXT_FIELDS, Meaning, holders, move_paths
from service.config.recipes import RecipeConfig
from service.errors import ConfigError
from service.types import Recipe

_GENERAL = "general"
_MOST_NAME = 31
_MIB = 1024**2
# Sections whose names the composition decides.
_WRITTEN = ("experts", "recipes", "pools")


def compose_config(
    base: Mapping[str, Any],
    problem: Problem,
    found: Composition,
    *,
    forms: Mapping[str, Mapping[str, str | None]],
    fallback: str,
    template: str | None,
    kv_cache_bytes: int | None,
    running: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a config's data.

    Args:
        base: The base config's data, as read from YAML.
        problem: The problem.
        found: Its solution.
        forms: By unit, the form of each of its experts; None: as in the base config.
        fallback: The expert for prompts without a category.
        template: The pool of the base config from which the pools are made; None: none has one.
        kv_cache_bytes: KV cache of each engine; None: as in the template.
        running: The pools of the config that a service runs from. Pools keep their names, and as
            many of their experts as can be, so that as few engines as can be start again.

    Raises:
        ConfigError: A tenant or key of the base config may use no expert that is bought, or
            shadow evaluation is to ask none of them.
    """
    data = copy.deepcopy(dict(base))
    chosen = _chosen_forms(problem, found, forms)
    far = {name for name in problem.remote if _is_used(name, problem, found)}
    # A variant of a remote expert comes with its base.
    far |= {str(base["experts"][name].get("base") or name) for name in far}
    kept = [name for name in base["experts"] if name in chosen or name in far]
    pinned = {unit.experts[0] for held in found.holdings for unit in held.pinned}
    order = _home_first(kept, found)
    data["experts"] = {
        name: _expert(
            base["experts"][name], name, problem, found, chosen.get(name), name in pinned, fallback
        )
        for name in order
    }
    data["recipes"], renamed = _recipes(base, problem, found, set(kept))
    if not data["recipes"]:
        del data["recipes"]
    data["router"] = {**(base.get("router") or {}), "fallback": fallback}
    pool = (base.get("pools") or {}).get(template) or {}
    data["pools"] = {
        name: _pool(pool, held, chosen, forms, kept, kv_cache_bytes)
        for name, held in _named(template, found.holdings, running or {})
    }
    if not data["pools"]:
        del data["pools"]
    _leave_out(data, kept, renamed)
    _give_categories_experts(data, found, fallback)
    _leave_out_targets(data, renamed)
    return data


def _chosen_forms(
    problem: Problem, found: Composition, forms: Mapping[str, Mapping[str, str | None]]
) -> dict[str, tuple[str, str | None]]:
    """Return the unit and form of each expert that is held: those with the shortest wait."""
    waits: dict[str, float] = {}
    chosen: dict[str, tuple[str, str | None]] = {}
    for held in found.holdings:
        for unit in held.units:
            alone = shortest_waits(problem, [_only(held, unit)])
            for expert in unit.experts:
                if expert not in waits or alone[expert] < waits[expert]:
                    waits[expert] = alone[expert]
                    chosen[expert] = (unit.name, forms[unit.name][expert])
    return chosen


def _only(held: Holding, unit: Unit) -> Holding:
    guests = tuple(one for one in held.guests if one[0] == unit)
    return Holding(held.kind, 1, held.slots, () if guests else (unit,), guests)


def _is_used(name: str, problem: Problem, found: Composition) -> bool:
    return name in problem.required or any(name in r.experts for r in found.recipes.values())


def _home_first(kept: Iterable[str], found: Composition) -> list[str]:
    """Put experts at home first, because a slot's first engine starts with its first unit."""
    home = {e for held in found.holdings for unit in held.residents for e in unit.experts}
    return sorted(kept, key=lambda name: name not in home)


def _expert(
    given: Mapping[str, Any],
    name: str,
    problem: Problem,
    found: Composition,
    form: tuple[str, str | None] | None,
    pinned: bool,
    fallback: str,
) -> dict[str, Any]:
    expert = dict(copy.deepcopy(given))
    if form is not None and form[1] is not None:
        expert["form"] = form[1]
    expert.pop("pinned", None)
    if pinned:
        expert["pinned"] = True
    alone = Recipe("single", (name,))
    homes = [c for c, recipe in found.recipes.items() if recipe == alone]
    if name == fallback and _GENERAL not in homes:
        homes.append(_GENERAL)
    # What the outcomes do not know stays as it was.
    own = [c for c in given.get("categories") or () if c not in found.recipes and c != _GENERAL]
    expert["categories"] = [*homes, *(c for c in own if c not in homes)]
    expert["quality"] = {**(given.get("quality") or {}), **_quality(problem, alone)}
    for key in ("categories", "quality"):
        if not expert[key]:
            del expert[key]
    return expert


def _quality(problem: Problem, recipe: Recipe) -> dict[str, float]:
    if recipe not in problem.recipes:
        return {}
    r = problem.recipes.index(recipe)
    return {c: round(float(problem.quality[i, r]), 4) for i, c in enumerate(problem.categories)}


def _recipes(
    base: Mapping[str, Any], problem: Problem, found: Composition, kept: set[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The bought recipes, and those of the base config whose experts are all bought.

    Also returns the new names of the base config's recipes that were bought under another one.
    """
    chosen = [r for r in dict.fromkeys(found.recipes.values()) if r.kind != "single"]
    recipes: dict[str, Any] = {}
    named: dict[Recipe, list[str]] = {}
    for name, given in (base.get("recipes") or {}).items():
        same = RecipeConfig.model_validate(given).recipe()
        experts = set(same.experts)
        named.setdefault(same, []).append(name)
        if experts <= kept and same not in chosen:
            recipes[name] = copy.deepcopy(given)
    renamed: dict[str, str] = {}
    for recipe in chosen:
        own = named.pop(recipe, [])
        # The name of a recipe that is left out may still stand somewhere.
        others = {name for names in named.values() for name in names}
        if own and recipe.kind in ("deliberate", "recruit"):
            # It has settings that the outcomes say nothing of.
            recipes[own[0]] = {
                **copy.deepcopy(base["recipes"][own[0]]),
                "quality": _quality(problem, recipe),
            }
            continue
        name = _free_name(recipe, {*recipes, *kept, *others})
        renamed |= dict.fromkeys(own, name)
        r = problem.recipes.index(recipe)
        made: dict[str, Any] = {"kind": recipe.kind, "members": list(recipe.members)}
        if recipe.later:
            made["later"] = list(recipe.later)
            asked = problem.reach[:, r, len(recipe.members)]
            made["escalates"] = round(float(problem.share @ asked), 4)
        if recipe.sure:
            made["sure"] = recipe.sure
        recipes[name] = {**made, "quality": _quality(problem, recipe)}
    return recipes, renamed


def _free_name(recipe: Recipe, taken: set[str]) -> str:
    stem = re.sub(r"[^A-Za-z0-9._:-]+", "-", f"{recipe.kind}-{'-'.join(recipe.experts)}")[:120]
    names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
    return next(name for name in names if name not in taken)


def _named(
    template: str | None, holdings: Sequence[Holding], running: Mapping[str, Any]
) -> Iterable[tuple[str, Holding]]:
    """Name pools: as running ones, or like the template where there is one, else with numbers."""
    names = _matched(holdings, running)
    taken = {*names.values(), *running}
    numbers = itertools.count(1)
    for i, held in enumerate(holdings):
        stem = template or held.kind.name
        if i in names:
            yield names[i], held
        elif len(holdings) == 1 and stem not in taken:
            yield stem, held
        else:
            made = (f"{stem[: _MOST_NAME - 1 - len(str(n))]}-{n}" for n in numbers)
            yield next(name for name in made if name not in taken), held


def _matched(holdings: Sequence[Holding], running: Mapping[str, Any]) -> dict[int, str]:
    """Give holdings the names of running pools: as many as can be go on in the same processes.

    Pools with as many slots come first, by the experts that they have in common. Another number of
    slots replaces a pool's replicas, which is worth it only for some of its experts. The number of
    replicas may change.
    """
    common = []
    for i, held in enumerate(holdings):
        experts = {expert for unit in held.units for expert in unit.experts}
        for name, pool in running.items():
            same = (pool.get("slots") or 0) == held.slots
            shared = len(experts & set(pool.get("experts") or ()))
            moved = abs(pool.get("min_replicas", 1) - held.replicas)
            if same or shared:
                common.append((not same, -shared, moved, i, name))
    names: dict[int, str] = {}
    for *_, i, name in sorted(common):
        if i not in names and name not in names.values():
            names[i] = name
    return names


def _pool(
    template: Mapping[str, Any],
    held: Holding,
    chosen: Mapping[str, tuple[str, str | None]],
    forms: Mapping[str, Mapping[str, str | None]],
    kept: Iterable[str],
    kv_cache_bytes: int | None,
) -> dict[str, Any]:
    pool = dict(copy.deepcopy(template))
    served: set[str] = set()
    for unit in held.units:
        # An expert has one form everywhere, and a unit's first expert may be its base.
        served |= {e for e in unit.experts if chosen[e][1] == forms[unit.name][e]}
    bases = {unit.name.removesuffix(" merged"): unit for unit in held.units}
    pool["experts"] = [name for name in kept if name in served or name in bases]
    for key in ("slots", "min_replicas", "max_replicas"):
        pool.pop(key, None)
    if held.slots:
        pool["slots"] = held.slots
    if held.replicas > 1:
        pool["min_replicas"] = held.replicas
    kind = held.kind
    if kind.unified:
        pool["memory_bytes"] = size_text(kind.memory_bytes)
    else:
        pool["gpus"] = pool.get("gpus") or 1
    vllm = dict(pool.get("vllm") or {})
    engines = held.slots or len(held.residents)
    if kv_cache_bytes is not None and (kind.unified or engines > 1):
        vllm["kv_cache_bytes"] = size_text(kv_cache_bytes)
    merged = any(form == "merged" for unit in held.units for form in forms[unit.name].values())
    if kind.unified and (held.slots or merged):
        vllm["enforce_eager"] = True
    if vllm:
        pool["vllm"] = vllm
    swap = dict(pool.get("swap") or {})
    swap.pop("host_bytes", None)
    if held.slots and (kind.unified or kind.method is not SwapMethod.RESPAWN):
        swap["host_bytes"] = size_text(held.host_weight_bytes)
    if swap:
        pool["swap"] = swap
    else:
        pool.pop("swap", None)
    return pool


def size_text(size: int) -> int | str:
    """Write bytes as a config has them, with a unit where nothing is lost."""
    for factor, unit in ((1024 * _MIB, "GiB"), (_MIB, "MiB")):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return size


def _leave_out(data: dict[str, Any], kept: Collection[str], renamed: Mapping[str, str]) -> None:
    """Leave out names of experts and recipes that are not bought, wherever they stand.

    Args:
        data: The config's data, with the bought experts, recipes and pools.
        kept: The bought experts.
        renamed: By a recipe's name in the base config, its name here.

    Raises:
        ConfigError: A list that allows or asks certain experts would become empty, which would
            allow or ask all.
    """
    for place, meaning in TEXT_FIELDS.items():
        if meaning not in (Meaning.EXPERT, Meaning.EXPERT_OR_RECIPE) or place[0] in _WRITTEN:
            continue
        known = {*kept}
        if meaning is Meaning.EXPERT_OR_RECIPE:
            known |= {*(data.get("recipes") or {})}
        for holder, where in holders(data, place):
            given = holder[place[-1]]
            if isinstance(given, str) and given not in known:
                del holder[place[-1]]
            if not isinstance(given, list | tuple) or not given:
                continue
            names = dict.fromkeys(renamed.get(name, name) for name in given)
            left = [name for name in names if name in known]
            if left:
                holder[place[-1]] = left
            elif meaning is Meaning.EXPERT_OR_RECIPE:
                del holder[place[-1]]
            else:
                raise ConfigError(
                    f"{'.'.join(where)}: none of {', '.join(given)} is bought; keep one with "
                    f"--keep {given[0]}"
                )


def _give_categories_experts(data: dict[str, Any], found: Composition, fallback: str) -> None:
    """Give each category of the config an expert, where the one that had it is not bought."""
    named = {c for expert in data["experts"].values() for c in expert.get("categories") or ()}
    for name, category in (data.get("categories") or {}).items():
        if name not in named and category.get("expert") is None:
            bought = found.recipes.get(name)
            category["expert"] = bought.experts[0] if bought is not None else fallback


def _leave_out_targets(data: dict[str, Any], renamed: Mapping[str, str]) -> None:
    """Leave out targets of aliases that are not bought, and aliases whose targets are all gone.

    Args:
        data: The config's data, with the bought experts, recipes and categories.
        renamed: By a recipe's name in the base config, its name here.
    """
    aliases = {name: alias_section(alias) for name, alias in (data.get("aliases") or {}).items()}
    if not aliases:
        return
    experts = data["experts"]
    categories = {_GENERAL, *(data.get("categories") or {})}
    categories |= {c for expert in experts.values() for c in expert.get("categories") or ()}

    def exists(target: str) -> bool:
        if target in experts or target in (data.get("recipes") or {}) or target in aliases:
            return True
        head, slash, category = target.partition("/")
        return head.partition(":")[0] == "auto" and (not slash or category in categories)

    for alias in aliases.values():
        # Two recipes may have become one.
        to: dict[str, float] = {}
        for target, weight in alias["to"].items():
            name = renamed.get(target, target)
            to[name] = to.get(name, 0) + weight
        alias["to"] = to
    gone: list[str] | None = None
    while gone is None or gone:
        for alias in aliases.values():
            alias["to"] = {target: w for target, w in alias["to"].items() if exists(target)}
        gone = [name for name, alias in aliases.items() if not any(alias["to"].values())]
        for name in gone:
            del aliases[name]
    data["aliases"] = aliases


def rebased(data: Mapping[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """Return a config's data with its relative paths written for another folder.

    Args:
        data: The config's data.
        old: The folder that its paths start at.
        new: The folder that they shall start at.
    """
    old, new = old.resolve(), new.resolve()
    moved = copy.deepcopy(dict(data))
    if old == new:
        return moved

    def at(value: str) -> str:
        if Path(value).expanduser().is_absolute():
            return value
        written = os.path.relpath(old / value, new)
        return written if written.startswith("..") else f"./{written}"

    move_paths(moved, at)
    return moved
