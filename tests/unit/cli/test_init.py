"""`coe init`: the preset for a machine, and the config that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import router_models
from service.cli import cli, main
from service.cli.compose.shipped_composition import SIZES, shipped_map
from service.cli.init_proposals import config_text, propose
from service.cli.machine_resources import Machine
from service.config import Config, load_config
from service.gateway.routing.routing_setup import RoutingSetup, category_warnings
from service.gpu_devices import Gpu
from service.models.public_models import TRIOS
from service.pool.gpu_memory_plan import VLLM_SHARE, share_gpus
from service.pool.memory_plan import check_plan, plan_pool, sleepers_of
from tests.unit.pool.test_gpu_memory_plan import starts
from tests.unit.pool.test_memory_plan import model as model_info

GIB = 1024**3
ARTIFACTS = Path(router_models.__file__).resolve().parent
SMALL = Machine((), 8 * GIB, 50 * GIB, 2)


def gpu(memory_gib: int, disk_gib: int = 2000) -> Machine:
    return Machine((Gpu("H100", memory_gib * GIB),), 256 * GIB, disk_gib * GIB, 32)


@pytest.mark.parametrize(
    "folder", ["plain-1.0", "with space", "a: b", "a #b", "it's", 'a"b', "ä", "{x}", "~", "- x"]
)
def test_config_text_quotes_any_path_so_that_it_reads_back(tmp_path: Path, folder: str) -> None:
    artifacts = tmp_path / folder
    path = tmp_path / "coe.yaml"
    path.write_text(config_text(propose(SMALL)[0], SMALL, artifacts), encoding="utf-8")
    config = load_config(path)
    assert config.router.artifact == str(artifacts / "artifacts" / "demo@2")
    assert config.experts["math"].adapter == str(artifacts / "experts" / "artifacts" / "math")


@pytest.mark.parametrize(
    ("machine", "best", "slots"),
    [
        (SMALL, "SmolLM2 135M with three adapters", None),
        (Machine((), 32 * GIB, 100 * GIB, 2), "Qwen2.5 0.5B", 1),
        (Machine((), 64 * GIB, 100 * GIB, 8), "Qwen2.5 1.5B", 1),
        (Machine((), 64 * GIB, 1 * GIB, 8), "SmolLM2 135M with three adapters", None),
        (gpu(8), "Qwen2.5 1.5B", 1),
        (gpu(24), "Qwen2.5 7B", 1),
        (gpu(80), "Qwen2.5 32B", 1),
        (gpu(80, disk_gib=60), "Qwen2.5 7B", None),
        (gpu(192), "Qwen2.5 32B", None),
    ],
)
def test_presets_offers_the_best_that_fits(machine: Machine, best: str, slots: int | None) -> None:
    first = propose(machine)[0]
    assert (first.name, first.slots) == (best, slots)


machines = st.builds(
    Machine,
    st.lists(st.builds(Gpu, st.just("GPU"), st.integers(0, 200).map(GIB.__mul__)), max_size=2).map(
        tuple
    ),
    st.integers(1, 512).map(GIB.__mul__),
    st.integers(0, 2000).map(GIB.__mul__),
    st.integers(1, 128),
)


@given(machines)
def test_presets_offers_nothing_that_does_not_fit(machine: Machine) -> None:
    proposals = propose(machine)
    assert proposals[-1].trio is None
    for one in proposals[:-1]:
        room = max(g.memory_bytes for g in machine.gpus) if one.on_gpu else machine.memory_bytes
        assert one.required_bytes < room * one.replicas
        assert one.replicas == (len(machine.largest_gpus) if one.on_gpu else 1)
        assert one.download_bytes < machine.disk_bytes
    sizes = [one.trio.parameters for one in proposals if one.trio]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("memory_gib", [8, 16, 24, 40, 80, 141, 192])
def test_presets_engines_on_a_gpu_start_beside_each_other(memory_gib: int, tmp_path: Path) -> None:
    machine = gpu(memory_gib)
    for i, one in enumerate(propose(machine)):
        if one.trio is None:
            continue
        path = tmp_path / f"{i}.yaml"
        path.write_text(config_text(one, machine, ARTIFACTS))
        (pool,) = load_config(path).pools.values()
        weights = [model.weight_bytes for model in one.trio.models]
        needs = weights if one.slots is None else [one.trio.largest_bytes]
        shares = share_gpus(pool, needs, 0, memory_gib * GIB)
        assert sum(share.utilization for share in shares) < VLLM_SHARE


@pytest.mark.parametrize("machine", [SMALL, Machine((), 64 * GIB, 99 * GIB, 8), gpu(24), gpu(192)])
def test_presets_every_config_is_valid(machine: Machine, tmp_path: Path) -> None:
    for i, one in enumerate(propose(machine)):
        path = tmp_path / f"{i}.yaml"
        path.write_text(config_text(one, machine, ARTIFACTS))
        config = load_config(path)
        (pool,) = config.pools.values()
        assert (pool.gpus > 0) == one.on_gpu
        if one.trio is None:
            assert config.router.artifact is not None
            assert Path(config.router.artifact).is_dir()
        setup = RoutingSetup(config)
        assert category_warnings(config, setup.stages.labels) == []
        assert len(config.category_map()) >= len(config.experts)


# Qwen2.5's own shapes: layers, KV heads, head size, context of the shortest in its trio.
SHAPES = {
    "0.5B": (24, 2, 64, 32768),
    "1.5B": (28, 2, 128, 4096),
    "7B": (28, 4, 128, 4096),
    "14B": (48, 8, 128, 32768),
    "32B": (64, 8, 128, 32768),
}


@pytest.mark.parametrize(
    "machine", [Machine((), 64 * GIB, 99 * GIB, 8), Machine((), 16 * GIB, 99 * GIB, 2), gpu(192)]
)
def test_presets_every_config_passes_the_memory_plan(machine: Machine, tmp_path: Path) -> None:
    for one in propose(machine):
        if one.trio is None:
            continue
        path = tmp_path / "coe.yaml"
        path.write_text(config_text(one, machine, ARTIFACTS))
        config = load_config(path)
        layers, kv_heads, head_size, context = SHAPES[one.trio.name.split()[-1]]
        by_category = {
            each.category: model_info(
                path=Path(each.category),
                weight_bytes=each.weight_bytes,
                layers=layers,
                kv_heads=kv_heads,
                head_size=head_size,
                max_context_tokens=context,
            )
            for each in one.trio.models
        }
        plan = plan_pool(config, next(iter(config.pools)), by_category.__getitem__)
        check_plan(plan, None if one.on_gpu else machine.memory_bytes)
        if not one.on_gpu:
            assert plan.total_bytes == one.required_bytes


# The bytes of the weights of every model that a config may name.
WEIGHT_BYTES = {model.source: model.weight_bytes for trio in TRIOS for model in trio.models}


def weights_of(config: Config) -> dict[str, int]:
    """The bytes of each expert's weights: of a shipped map, or of a trio."""
    shipped = shipped_map(ARTIFACTS / "artifacts")
    assert shipped is not None
    sizes = json.loads((shipped / SIZES).read_text())
    return {
        name: WEIGHT_BYTES.get(str(expert.model), sizes.get(name, 0))
        for name, expert in config.experts.items()
    }


@pytest.mark.parametrize("memory_gib", [12, 16, 24, 48, 80, 141])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_init_uses_all_gpus_and_all_of_its_engines_start(
    count: int, memory_gib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(gpu(memory_gib).gpus * count, 256 * GIB, 2000 * GIB, 32)
    monkeypatch.setattr("service.cli.machine_resources.inspect_machine", lambda _: machine)
    path = tmp_path / "coe.yaml"
    done = CliRunner().invoke(cli, ["init", "--yes", "-o", str(path)])
    assert done.exit_code == 0, done.output
    assert "CUDA_VISIBLE_DEVICES" not in done.output
    config = load_config(path)
    assert sum(pool.gpus * pool.min_replicas for pool in config.pools.values()) == count
    found = {
        name: model_info(
            path=Path(name),
            weight_bytes=size,
            layers=32,
            kv_heads=8,
            head_size=128,
            max_context_tokens=4096,
        )
        for name, size in weights_of(config).items()
    }
    for kind, pool in config.pools.items():
        plan = plan_pool(config, kind, found.__getitem__, gpu_bytes=memory_gib * GIB)
        check_plan(plan, None)
        needs = [engine.weight_bytes for engine in plan.engines]
        assert min(needs) > 0
        sleepers = sleepers_of(config, kind)
        assert starts(pool, plan.gpu_shares, needs, sleepers, memory_gib * GIB, VLLM_SHARE)


def test_init_tells_how_to_leave_out_smaller_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = (Gpu("display", 8 * GIB), *gpu(24).gpus * 2)
    machine = Machine(gpus, 256 * GIB, 2000 * GIB, 32)
    monkeypatch.setattr("service.cli.machine_resources.inspect_machine", lambda _: machine)
    done = CliRunner().invoke(cli, ["init", "--yes", "-o", str(tmp_path / "coe.yaml")])
    assert "start it with CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1,2\n" in done.output
    pools = load_config(tmp_path / "coe.yaml").pools.values()
    assert sum(pool.gpus * pool.min_replicas for pool in pools) == 2


def test_init_writes_once_and_asks_unless_yes(tmp_path: Path) -> None:
    path = tmp_path / "coe.yaml"
    runner = CliRunner()
    asked = runner.invoke(cli, ["init", "-o", str(path)], input="1\n")
    assert asked.exit_code == 0, asked.output
    first = path.read_text()
    again = runner.invoke(cli, ["init", "--yes", "-o", str(path)])
    assert again.exit_code != 0
    assert "--force" in str(again.exception)
    told = runner.invoke(cli, ["init", "--json", "--force", "-o", str(path)])
    found = json.loads(told.output)
    assert found["machine"]["cores"] > 0
    assert found["chosen"] == propose(Machine(**_machine(found["machine"])))[0].name
    assert path.read_text().splitlines()[4:] == first.splitlines()[4:]
    load_config(path)


def _machine(fields: dict[str, object]) -> dict[str, object]:
    gpus = fields["gpus"]
    assert isinstance(gpus, list)
    return {**fields, "gpus": tuple(Gpu(**one) for one in gpus)}


def test_init_unwritable_file_fails_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nowhere" / "coe.yaml"
    monkeypatch.setattr("sys.argv", ["coe", "init", "--yes", "-o", str(path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"coe: {path}: No such file or directory\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_each_shell(shell: str) -> None:
    told = CliRunner().invoke(cli, ["completion", shell])
    assert told.exit_code == 0
    assert "_COE_COMPLETE" in told.output


def test_completion_completes_commands_and_options() -> None:
    environment = {"_COE_COMPLETE": "bash_complete", "COMP_WORDS": "coe ro", "COMP_CWORD": "1"}
    told = CliRunner().invoke(cli, [], env=environment, prog_name="coe")
    assert {line.split(",")[-1] for line in told.output.split()} >= {"route", "router"}
