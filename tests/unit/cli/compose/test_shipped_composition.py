"""`coe init` where a map of public models is shipped, and `coe compose --map`."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from router_models import router_fit
from service.cli import cli
from service.cli.compose.shipped_composition import EXPERTS, SIZES, shipped_map, write_composed
from service.cli.machine_resources import Machine
from service.config import load_config
from service.gpu_devices import Gpu

GIB = 1024**3
CATEGORIES = ("code", "law", "math")
CHANCES = {"small": (0.4, 0.4, 0.4), "coder": (0.9, 0.3, 0.4), "large": (0.8, 0.9, 0.8)}
MODELS = {"small": "Org/Small-1.5B", "coder": "Org/Coder-7B", "large": "Org/Large-32B"}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of artifacts with `public@2`: a map, and the base config of its models."""
    folder = tmp_path_factory.mktemp("artifacts")
    draw = random.Random(0)
    rows = [
        {
            "id": f"{c}{i}",
            "prompt": f"{c} {draw.choice('abcdefgh')} question {i}",
            "category": c,
            "outcomes": {n: {"score": int(draw.random() < p[k])} for n, p in CHANCES.items()},
        }
        for k, c in enumerate(CATEGORIES)
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "costs.json").write_text(json.dumps({"small": 1.5, "coder": 7, "large": 32}))
    router_fit.run(
        outcomes=[folder / "rows.jsonl"],
        costs=folder / "costs.json",
        out=folder / "public@2",
        say=lambda _: None,
    )
    base = {
        "experts": {name: {"model": model} for name, model in MODELS.items()},
        "router": {"artifact": ".", "fallback": "small"},
        "pools": {
            "gpu": {"gpus": 1, "vllm": {"dtype": "bfloat16"}},
            "cpu": {"vllm": {"dtype": "bfloat16", "kv_cache_bytes": "1GiB", "threads": 2}},
        },
    }
    (folder / "public@2" / EXPERTS).write_text(yaml.safe_dump(base))
    for name in ("public@1", "public@10", "public@x"):
        (folder / name).mkdir()
    (folder / "public@1" / EXPERTS).write_text("")
    (folder / "public@x" / EXPERTS).write_text("")
    return folder


def test_shipped_map_is_the_newest_with_experts(artifacts: Path, tmp_path: Path) -> None:
    assert shipped_map(artifacts) == artifacts / "public@2"
    assert shipped_map(tmp_path) is None


@pytest.mark.parametrize(
    ("machine", "experts"),
    [
        (Machine((Gpu("a", 24 * GIB),) * 2, 64 * GIB, 999 * GIB, 8), {"small", "coder"}),
        (
            Machine((Gpu("a", 96 * GIB), Gpu("b", 8 * GIB)), 64 * GIB, 999 * GIB, 8),
            {"small", "large"},
        ),
        (Machine((), 24 * GIB, 999 * GIB, 8), {"small"}),
    ],
)
def test_write_composed_buys_what_fits_the_machine(
    artifacts: Path, tmp_path: Path, machine: Machine, experts: set[str]
) -> None:
    out = tmp_path / "coe.yaml"
    told = write_composed(artifacts / "public@2", machine, out)
    assert told is not None
    assert "public models" in told
    config = load_config(out)
    assert experts <= set(config.experts)
    # Wherever the config is moved to.
    assert yaml.safe_load(out.read_text())["router"]["artifact"] == str(artifacts / "public@2")
    assert config.router.artifact == str(artifacts / "public@2")
    assert all((pool.gpus > 0) == bool(machine.gpus) for pool in config.pools.values())


@pytest.mark.parametrize(
    ("disk_gb", "experts"),
    [
        (200, {"small", "large"}),
        (60, {"small", "coder"}),
        (12, {"small"}),
        (3, None),
    ],
)
def test_write_composed_leaves_out_models_that_do_not_fit_the_disk(
    artifacts: Path, tmp_path: Path, disk_gb: int, experts: set[str] | None
) -> None:
    shipped = tmp_path / "public@3"
    shutil.copytree(artifacts / "public@2", shipped)
    sizes = {"small": 3, "coder": 14, "large": 64}
    (shipped / SIZES).write_text(json.dumps({name: gb * 10**9 for name, gb in sizes.items()}))
    machine = Machine((Gpu("a", 80 * GIB),) * 2, 256 * GIB, disk_gb * 10**9, 8)
    out = tmp_path / "coe.yaml"
    told = write_composed(shipped, machine, out)
    assert (told is None) == (experts is None) == (not out.exists())
    if experts is not None:
        bought = set(load_config(out).experts)
        assert bought >= experts
        assert sum(sizes[name] for name in bought) <= 0.8 * disk_gb


def test_write_composed_machine_that_is_too_small_gets_none(
    artifacts: Path, tmp_path: Path
) -> None:
    machine = Machine((), 2 * GIB, 0, 1)
    assert write_composed(artifacts / "public@2", machine, tmp_path / "coe.yaml") is None
    assert not (tmp_path / "coe.yaml").exists()


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_init_writes_the_bought_composition_where_a_map_is_shipped(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(
        "service.cli.compose.shipped_composition.shipped_map", lambda _: artifacts / "public@2"
    )
    machine = Machine((Gpu("a", 24 * GIB),), 64 * GIB, 999 * GIB, 8)
    monkeypatch.setattr("service.cli.machine_resources.inspect_machine", lambda _: machine)
    done = CliRunner().invoke(cli, ["init", "--yes", "-o", str(tmp_path / "c.yaml"), *words])
    assert done.exit_code == 0, done.output
    if words:
        assert json.loads(done.stdout)["composed"].endswith("by public@2")
    assert "small" in load_config(tmp_path / "c.yaml").experts


def test_compose_map_takes_the_place_of_outcomes(artifacts: Path, tmp_path: Path) -> None:
    shares = tmp_path / "shares.json"
    shares.write_text('{"code": 1}')
    words = ["--map", str(artifacts / "public@2"), "--accelerators", "2x24GiB", "--json"]
    words += ["--config", str(artifacts / "public@2" / EXPERTS), "--traffic", str(shares)]
    words += ["--out", str(tmp_path / "coe.yaml"), "--analysis-s", "0"]
    done = CliRunner().invoke(cli, ["compose", *words])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["categories"]["code"]["recipe"]["members"] == ["coder"]
    assert report["categories"]["code"]["share"] == 1.0


def test_compose_map_that_knows_more_experts_than_the_config_buys_of_those_it_has(
    artifacts: Path, tmp_path: Path
) -> None:
    base = yaml.safe_load((artifacts / "public@2" / EXPERTS).read_text())
    del base["experts"]["large"]
    base["router"]["artifact"] = str(artifacts / "public@2")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    words = ["--map", str(artifacts / "public@2"), "--accelerators", "2x96GiB"]
    words += ["--config", str(tmp_path / "base.yaml"), "--analysis-s", "0"]
    words += ["--out", str(tmp_path / "coe.yaml")]
    done = CliRunner().invoke(cli, ["compose", *words])
    assert done.exit_code == 0, done.output
    assert set(load_config(tmp_path / "coe.yaml").experts) == {"small", "coder"}


@pytest.mark.parametrize(("cores", "fits"), [(2, False), (4, True)])
def test_write_composed_leaves_out_models_too_slow_for_the_cores(
    artifacts: Path, tmp_path: Path, cores: int, fits: bool
) -> None:
    shipped = tmp_path / "public@3"
    shutil.copytree(artifacts / "public@2", shipped)
    sizes = {"small": 3, "coder": 14, "large": 64}
    (shipped / SIZES).write_text(json.dumps({name: gb * 10**9 for name, gb in sizes.items()}))
    machine = Machine((), 24 * GIB, 999 * GIB, cores)
    assert (write_composed(shipped, machine, tmp_path / "coe.yaml") is not None) == fits
