"""A bought composition as a config: the loader and the memory plan accept it, bound by bound."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_models.composition.composition_problem import Accelerators, Bounds, Problem, SwapMethod
from router_models.composition.composition_value import Composition
from router_models.composition.highs_solver import CompositionError, solve
from service.cli.compose.candidate_units import Candidates, Size, candidates
from service.cli.compose.composed_config import compose_config, rebased, size_text
from service.config import Config, read_config
from service.config.name_and_path_fields import TEXT_FIELDS, Meaning
from service.config.router import NO_ARTIFACT
from service.errors import ConfigError
from service.models import AdapterInfo, ModelInfo
from service.pool.memory_plan import ENGINE_BYTES, PACKING, REPLICA_BYTES, check_plan, plan_pool
from service.types import Recipe
from tests.unit.pool.test_memory_plan import adapter, model

GIB, MIB = 1024**3, 1024**2
KV = 256 * MIB


class Case:
    """A random base config, what its folders would say, and a composition of it."""

    def __init__(self, seed: int, *, on_gpu: bool) -> None:
        draw = random.Random(f"{seed}/{on_gpu}")
        self.on_gpu = on_gpu
        names = [f"e{i}" for i in range(draw.randint(3, 6))]
        self.infos: dict[str, ModelInfo | AdapterInfo] = {}
        experts: dict[str, Any] = {}
        sizes: dict[str, Size] = {}
        for name in names:
            family = draw.choice("fg")
            weights = {"f": 300, "g": 500}[family] * MIB
            self.infos[name] = model(path=Path(name), weight_bytes=weights, family=family)
            experts[name] = {"model": f"./{name}", "categories": [name], "pinned": True}
            sizes[name] = Size(bytes=weights, family=family)
        for name in [f"a{i}" for i in range(draw.randint(0, 3))]:
            base = draw.choice(names)
            self.infos[name] = adapter(parameters=8 * MIB)
            experts[name] = {"base": base, "adapter": f"./{name}"}
            sizes[name] = Size(bytes=16 * MIB)
        for name in [f"v{i}" for i in range(draw.randint(0, 2))]:
            owner = draw.choice(list(experts))
            if "defaults" not in experts[owner]:
                experts[name] = {"base": owner, "defaults": {"temperature": 0.5}}
        for name in list(experts):
            if draw.random() < 0.2 and name != names[0] and name.startswith("a") and not on_gpu:
                experts[name] |= {"form": "merged", "strength": 0.5}
        self.base: dict[str, Any] = {
            "server": {"drain_s": 7},
            "experts": experts,
            "recipes": {
                "own": {"kind": "vote", "members": names[:3]},
                "council": {"kind": "deliberate", "members": names[:3], "quality": {"w": 0.5}},
                "panel": {"kind": "recruit", "recruit": {"k": 2, "among": names[:2]}},
            },
            "tenants": {"t": {"experts": [names[0], names[-1]]}},
            "pools": {
                "main": {
                    "gpus": 1 if on_gpu else 0,
                    "slots": 1,
                    "max_replicas": 3,
                    "swap": {"min_stay_s": 9, "method": draw.choice(["auto", "inplace"])},
                    "vllm": {"dtype": "bfloat16", "kv_cache_bytes": KV, "enforce_eager": True},
                }
            },
        }
        self.config = read_config(self.base, "base", Path("/nowhere"))
        pool = self.config.pools["main"]
        self.found: Candidates = candidates(
            self.config, sizes, pool.vllm, on_gpu=on_gpu, merge=not on_gpu, wanted=set(experts)
        )
        method = pool.swap.method
        kind = Accelerators(
            "gpu" if on_gpu else "cpu",
            draw.randint(1, 3) if on_gpu else 1,
            (1 * GIB if on_gpu else 4 * GIB) + draw.randint(0, 1500) * MIB,
            engine_bytes=KV + (0 if on_gpu else ENGINE_BYTES),
            replica_bytes=0 if on_gpu else REPLICA_BYTES,
            unified=not on_gpu,
            method=SwapMethod.INPLACE if method == "inplace" or not on_gpu else SwapMethod.RESPAWN,
            most_slots=3,
        )
        recipes = [Recipe("single", (name,)) for name in experts]
        recipes.append(self.config.recipes["council"].recipe())
        recipes.append(Recipe("cascade", (names[0], names[1]), (names[2],)))
        rng = np.random.default_rng(seed)
        cells = (4, len(recipes))
        reach = np.zeros((*cells, 4))
        reach[:, :, 0] = 1
        reach[:, -1, :3] = [1, 1, 0.5]
        reach[:, -2, :3] = 1
        self.problem = Problem(
            categories=("w", "x", "y", "z"),
            recipes=tuple(recipes),
            share=rng.dirichlet(np.ones(4)),
            quality=rng.random(cells),
            cost=rng.random(cells),
            reach=reach,
            units=tuple(self.found.units),
            accelerators=(kind,),
            bounds=Bounds(cost=float(rng.uniform(0.2, 2))),
            required=frozenset({names[0], *(["a0"] if "a0" in experts else [])}),
            time_price=float(rng.choice([1e-5, 1e-2])),
        )
        self.fallback = names[0]

    def compose(self, found: Composition, running: dict[str, Any] | None = None) -> dict[str, Any]:
        return compose_config(
            self.base,
            self.problem,
            found,
            forms=self.found.forms,
            fallback=self.fallback,
            template="main",
            kv_cache_bytes=KV,
            running=running,
        )

    def write(self, found: Composition) -> tuple[dict[str, Any], Config]:
        data = self.compose(found)
        return data, read_config(data, "composed", Path("/nowhere"))


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_compose_config_is_accepted_by_the_loader_and_the_memory_plan(on_gpu: bool) -> None:
    shared = merged = pinned = several = adapters = variants = councils = 0
    for seed in range(40):
        case = Case(seed, on_gpu=on_gpu)
        try:
            found = solve(case.problem)
        except CompositionError:
            continue
        data, config = case.write(found)
        kind = case.problem.accelerators[0]
        for name, held in zip(config.pools, found.holdings, strict=True):
            plan = plan_pool(config, name, case.infos.__getitem__)
            check_plan(plan, kind.memory_bytes)
            # The program counts no less than the plan, which on a GPU counts the adapters of all
            # units at once.
            beside = sum(unit.adapter_bytes for unit in held.units) if on_gpu and held.slots else 0
            assert plan.total_bytes <= held.device_bytes + beside, seed
            assert config.pools[name].min_replicas == held.replicas
            groups = config.groups(name)
            slots = config.pools[name].slots
            assert (slots or 0) == held.slots
            shared += held.slots > 0 and len(groups) > held.slots
        assert config.fallback == case.fallback
        assert data["server"] == {"drain_s": 7}
        used = {e for recipe in found.recipes.values() for e in recipe.experts}
        assert used <= set(config.experts)
        variants += any(config.experts[name].is_variant for name in used)
        chosen = {r.recipe() for r in config.recipes.values()}
        assert {r for r in found.recipes.values() if r.kind != "single"} <= chosen
        if any(r.kind == "deliberate" for r in found.recipes.values()):
            # It keeps its name and settings, and has the qualities of the outcomes.
            assert config.recipes["council"].quality.keys() == {*case.problem.categories}
            councils += 1
        for name, expert in config.experts.items():
            column = case.problem.recipes.index(Recipe("single", (name,)))
            for c, category in enumerate(case.problem.categories):
                assert expert.quality[category] == pytest.approx(
                    case.problem.quality[c, column], abs=1e-4
                )
        pinned += any(expert.pinned for expert in config.experts.values())
        merged += any(expert.form == "merged" for expert in config.experts.values())
        adapters += any(
            e.form == "adapter" and e.adapter is not None for e in config.experts.values()
        )
        several += len(found.holdings) > 1
    # Every part of the writer was used.
    assert shared
    assert adapters
    assert variants
    assert councils
    assert several or not on_gpu
    assert merged or on_gpu
    assert pinned


def test_compose_config_first_units_of_slots_are_those_at_home() -> None:
    for seed in range(40):
        case = Case(seed, on_gpu=True)
        try:
            found = solve(case.problem)
        except CompositionError:
            continue
        _, config = case.write(found)
        for name, held in zip(config.pools, found.holdings, strict=True):
            if held.slots:
                first = [group[0][0] for group in config.groups(name)[: len(held.residents)]]
                assert set(first) == {unit.experts[0] for unit in held.residents}


def test_compose_config_of_the_same_composition_keeps_every_running_pool() -> None:
    several = 0
    for seed in range(12):
        case = Case(seed, on_gpu=True)
        try:
            found = solve(case.problem)
        except CompositionError:
            continue
        data, _ = case.write(found)
        # The service runs the same pools under other names, in another order.
        running = {f"p{i}": pool for i, pool in enumerate(reversed(data["pools"].values()))}
        again = case.compose(found, running)
        assert again["pools"] == running
        # Replicas are added and removed live. Another number of slots replaces those of a pool.
        for changed in ({"min_replicas": 9}, {"slots": 7}):
            other = {name: {**pool, **changed} for name, pool in running.items()}
            assert set(case.compose(found, other)["pools"]) == set(other)
        # A pool of another form and with other experts is no candidate for its name.
        other = {name: {**pool, "slots": 7, "experts": ["x"]} for name, pool in running.items()}
        assert not set(case.compose(found, other)["pools"]) & set(other)
        several += len(running) > 1
    assert several


def test_compose_config_tenant_without_a_bought_expert_is_an_error() -> None:
    case = Case(0, on_gpu=True)
    case.base["tenants"]["t"]["experts"] = ["e2"]
    dear = replace(case.problem, time_price=1.0, quality=case.problem.quality * 0)
    found = solve(dear)
    kept = {e for held in found.holdings for unit in held.units for e in unit.experts}
    lost = next(name for name in case.base["experts"] if name not in kept)
    case.base["tenants"]["t"]["experts"] = [lost]
    with pytest.raises(ConfigError, match=rf"tenants\.t\.experts: none of {lost} is bought"):
        case.write(found)


def _name_everywhere(case: Case, names: list[str]) -> None:
    """Let every section of the base config name these experts, and recipes."""
    base = case.base
    base["savings"] = {"against": [*names[-2:], "own", "same"][:4]}
    base["recipes"]["same"] = {"kind": "cascade", "members": ["e0", "e1"], "later": ["e2"]}
    base["shadow"] = {"experts": names[:-1] or names, "judge": names[-1]}
    if len(names) == 1:
        del base["shadow"]["judge"]
    base["tenants"]["t"]["experts"] = names
    base["keys"] = {"k": {"key_env": "K", "tenant": "t", "experts": names}}
    base["categories"] = {
        f"of-{name}": {"examples": [f"{name} {i}" for i in range(3)], "expert": name}
        for name in names
    }
    base["aliases"] = {f"is-{name}": name for name in names} | {
        "shared": dict.fromkeys(names, 1),
        "recipes": {"own": 2, "same": 1},
        "nick": {"to": f"is-{names[-1]}"},
        "law-*": f"auto:best/of-{names[0]}",
    }
    for name in names:
        base["categories"][f"by-{name}"] = {"examples": [f"by {name} {i}" for i in range(3)]}
        base["experts"][name]["categories"] = [f"by-{name}"]


def _strings(value: object) -> set[str]:
    if isinstance(value, dict):
        return {text for one in value.values() for text in _strings(one)}
    if isinstance(value, list | tuple):
        return {text for one in value for text in _strings(one)}
    return {value} if isinstance(value, str) else set()


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_compose_config_of_a_base_that_names_every_expert_everywhere_loads(on_gpu: bool) -> None:
    lost = renamed = 0
    for seed in range(25):
        case = Case(seed, on_gpu=on_gpu)
        try:
            found = solve(case.problem)
        except CompositionError:
            continue
        everyone = list(case.base["experts"])
        _name_everywhere(case, everyone)
        read_config(case.base, "base", Path("/nowhere"))
        data, config = case.write(found)
        assert set(config.categories) == set(case.base["categories"])
        for name, category in config.categories.items():
            prefix, owner = name.split("-")
            assert config.category_map()[name] in config.experts
            if owner in config.experts:
                assert config.category_map()[name] == owner
                assert (category.expert is None) == (prefix == "by")
        aliases = {name for name in config.aliases if name.startswith("is-")}
        assert aliases == {f"is-{name}" for name in everyone if name in config.experts}
        shared = config.aliases.get("shared")
        assert (set() if shared is None else set(shared.to)) <= set(config.experts)
        assert ("nick" in config.aliases) == (everyone[-1] in config.experts)
        assert "law-*" in config.aliases
        lost += len(config.experts) < len(everyone)
        against = config.savings.against or ()
        made = [n for n, r in config.recipes.items() if r.recipe() == case.problem.recipes[-1]]
        # The bought cascade has a name of its own making.
        assert not made or made[0] in against
        renamed += bool(made)
        absent = set(everyone) - set(config.experts)
        assert not absent & _strings({k: v for k, v in data.items() if k != "experts"})
    assert lost
    assert renamed


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_compose_config_of_a_base_that_names_one_expert_loads_or_says_which(on_gpu: bool) -> None:
    refused = taken = 0
    for seed in range(15):
        case = Case(seed, on_gpu=on_gpu)
        try:
            found = solve(case.problem)
        except CompositionError:
            continue
        name = [name for name in case.base["experts"] if name.startswith("e")][-1]
        _name_everywhere(case, [name])
        bought = {e for h in found.holdings for unit in h.units for e in unit.experts}
        if name in bought:
            case.write(found)
            taken += 1
            continue
        with pytest.raises(ConfigError, match=r"tenants\.t\.experts: none of .* is bought"):
            case.write(found)
        refused += 1
        for section in ("tenants", "keys"):
            del case.base[section]
        with pytest.raises(ConfigError, match=r"shadow\.experts: none of .* is bought"):
            case.write(found)
        del case.base["shadow"]["experts"]
        case.base["shadow"]["judge"] = name
        _, config = case.write(found)
        assert config.shadow.judge is None
        assert config.savings.against is None or "own" in config.savings.against
    assert refused
    assert taken


def _with_text(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A config's data with one more field; `*` becomes the one name of that section."""
    data: dict[str, Any] = {
        "experts": {"one": {"model": "Org/Name"}},
        "pools": {"main": {"gpus": 1, "vllm": {}}},
        "router": {"encoder": {}},
        "shadow": {},
        "store": {},
    }
    if place[-1] in ("adapter", "profile"):
        data["experts"]["two"] = {"base": "one"}
    if "command" in place:
        command = {"run": ["./server", "{port}"], "memory_bytes": 1}
        data["experts"] = {"one": {"command": command}}
    here = data
    for key in place[:-1]:
        here = here.setdefault(list(here)[-1] if key == "*" else key, {})
    here[place[-1]] = [value] if place[-1] == "roots" else value
    return data


_PATHS = {
    place: meaning
    for place, meaning in TEXT_FIELDS.items()
    if meaning in (Meaning.PATH, Meaning.MODEL, Meaning.ARTIFACT)
}


@pytest.mark.parametrize("place", [*_PATHS], ids=".".join)
@pytest.mark.parametrize("path", ["./x/y", "../x", "/abs/x", "~/x"])
def test_rebased_path_leads_to_the_same_file(
    tmp_path: Path, place: tuple[str, ...], path: str
) -> None:
    old, new = tmp_path / "a" / "b", tmp_path / "c"
    data = _with_text(place, path)
    before = read_config(data, "x", old)
    moved = rebased(data, old, new)
    assert read_config(moved, "x", new) == before
    assert (moved == data) == (path[0] in "/~")
    assert rebased(data, old, old) == data
    # The loader knows that it is a path, too.
    assert read_config(data, "x", new) == before or path[0] == "."
    assert (read_config(data, "x", new) == before) == (path[0] in "/~")


def test_rebased_command_without_a_folder_stays_in_the_configs(tmp_path: Path) -> None:
    old, new = tmp_path / "a" / "b", tmp_path / "c"
    data = _with_text(("experts", "*", "command", "model"), "m")
    moved = rebased(data, old, new)
    assert moved["experts"]["one"]["command"]["cwd"] == "../a/b"
    assert read_config(moved, "x", new) == read_config(data, "x", old)
    assert rebased(data, old, old) == data


@pytest.mark.parametrize("key", ["speculative_config", "speculative-config"])
def test_rebased_draft_model_leads_to_the_same_folder(tmp_path: Path, key: str) -> None:
    old, new = tmp_path / "a" / "b", tmp_path / "c"
    data = _with_text(("pools", "*", "vllm", "args"), {key: {"model": "./draft"}})
    moved = rebased(data, old, new)
    assert read_config(moved, "x", new) == read_config(data, "x", old)
    assert moved["pools"]["main"]["vllm"]["args"][key]["model"] == "../a/b/draft"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("router", "artifact"), NO_ARTIFACT),
        (("router", "encoder", "model"), "all-minilm-l6-v2"),
        (("experts", "*", "model"), "Org/Name"),
    ],
)
def test_rebased_names_stay(tmp_path: Path, place: tuple[str, ...], value: str) -> None:
    data = _with_text(place, value)
    assert rebased(data, tmp_path / "a", tmp_path / "b") == data


@pytest.mark.parametrize(
    ("size", "text"), [(GIB, "1GiB"), (1536 * MIB, "1536MiB"), (MIB + 1, MIB + 1), (0, 0)]
)
def test_size_text_loses_nothing(size: int, text: int | str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(("on_gpu", "times"), [(True, 1), (False, PACKING)])
def test_given_size_counts_as_often_as_in_the_memory_plan(on_gpu: bool, times: int) -> None:
    pools = {"main": {"gpus": int(on_gpu), "vllm": {"dtype": "bfloat16", "kv_cache_bytes": KV}}}
    config = read_config(
        {"experts": {"a": {"model": "Org/A-1B"}}, "pools": pools}, "base", Path(".")
    )
    options = config.pools["main"].vllm
    (unit,) = candidates(
        config, {"a": Size(bytes=3 * GIB)}, options, on_gpu=on_gpu, merge=False, wanted={"a"}
    ).units
    info = model(path=Path("a"), weight_bytes=3 * GIB)
    plan = plan_pool(config, "main", lambda _: info)
    assert unit.size_bytes == times * 3 * GIB == plan.engines[0].weight_bytes


@pytest.mark.parametrize("on_gpu", [True, False])
def test_server_by_command_is_a_candidate_of_its_declared_size(on_gpu: bool) -> None:
    command = {"run": ["server", "{port}"], "memory_bytes": 3 * GIB}
    pools = {"main": {"gpus": int(on_gpu)}}
    config = read_config({"experts": {"a": {"command": command}}, "pools": pools}, "x", Path("."))
    options = config.pools["main"].vllm
    found = candidates(config, {}, options, on_gpu=on_gpu, merge=False, wanted={"a"})
    assert [(unit.experts, unit.size_bytes) for unit in found.units] == [(("a",), 3 * GIB)]
    assert found.forms == {"a": {"a": None}}
