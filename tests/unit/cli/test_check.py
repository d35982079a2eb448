"""`coe check` tells what makes `auto` do less than it could, whether or not models are here."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from service.cli import cli
from service.cli.check import _print_plans, plans_of
from service.config import load_config
from service.errors import ConfigError
from service.gpu_devices import GpuMemory
from tests.unit.pool.test_memory_plan import model

ROOT = Path(__file__).parents[3]
POOLS = "pools: {cpu: {engine: simulated}}\n"
TWO = "experts:\n  a: {model: a, categories: [general]}\n  b: {model: b}\n"
NO_CLASSIFIER = TWO + "router: {artifact: none}\n" + POOLS
ONE_EXPERT = "experts:\n  a: {model: a, categories: [general]}\n" + POOLS
SWAP = (ROOT / "deploy" / "config" / "swap.yaml").read_text().replace("../..", str(ROOT))


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        (NO_CLASSIFIER, "no classifier, so `auto` always means 'a'"),
        (SWAP, "no category reaches the fallback 'general'"),
        (SWAP.replace("    auto: false\n", ""), "no category reaches math-light, code-light"),
        (ONE_EXPERT, None),
    ],
    ids=["no classifier", "idle fallback", "idle experts", "one expert"],
)
def test_check_warns_before_it_plans_memory(tmp_path: Path, text: str, warned: str | None) -> None:
    path = tmp_path / "coe.yaml"
    path.write_text(text)
    done = CliRunner().invoke(cli, ["check", str(path)])
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: router:")]
    assert bool(lines) == (warned is not None), done.output
    assert warned is None or any(warned in line for line in lines)
    assert len(set(lines)) == len(lines), "each warning once"
    told = "a point of quality may cost, of the best expert's answer: auto:fast 7 %, auto 22 %"
    # swap.yaml has not every expert of the map, so that the map's own figures don't fit.
    assert (told in done.stdout) == (text != ONE_EXPERT)


SERVER = (
    "experts:\n  a: {command: {run: [PROGRAM, '{port}'], memory_bytes: 64MiB}}\npools: {cpu: {}}\n"
)


@pytest.mark.parametrize(
    ("program", "fine", "said"),
    [
        ("sh", True, "264 MiB of no bound"),
        (
            "no-such-program",
            False,
            "experts.a.command.run: no program 'no-such-program' is in PATH",
        ),
        ("./coe.yaml", False, "coe.yaml is not an executable file"),
    ],
)
def test_check_plans_servers_and_finds_their_programs(
    tmp_path: Path, program: str, fine: bool, said: str
) -> None:
    path = tmp_path / "coe.yaml"
    path.write_text(SERVER.replace("PROGRAM", program))
    done = CliRunner().invoke(cli, ["check", str(path)])
    text = done.output if fine else str(done.exception)
    assert isinstance(done.exception, ConfigError) != fine, done.output
    assert len([line for line in text.splitlines() if said in line]) == 1, text


GPU = "pools: {p: {gpus: 2, vllm: {kv_cache_bytes: 1GiB, dtype: bfloat16}}}\n"


@pytest.mark.parametrize(
    ("gpu_gib", "said"),
    [
        (
            24,
            [
                "p: a on GPU 0: gpu_memory_utilization 0.129",
                "p: b on GPU 1: ",
                "p: GPU 0 of a replica: 12.9 % reserved",
                "p: this machine's GPU 1, L4: 1.00 GiB of 24.00 GiB used now, 22.00 GiB free",
            ],
        ),
        (3, ["pools.p.gpus: engines that share a GPU: 1; they need 3.10 GiB of it"]),
        (None, ["warning: pools.p: the GPUs' memory is unknown", "gpu_memory_utilization 0.92"]),
    ],
)
def test_check_tells_whether_engines_start_on_the_gpus(
    gpu_gib: int | None,
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory = gpu_gib and gpu_gib * 1024**3
    monkeypatch.setattr("service.gpu_devices.largest_gpu_bytes", lambda: memory)
    here = (GpuMemory(1, "GPU-1", "L4", 24 << 30, 1 << 30, 22 << 30),) if gpu_gib else ()
    monkeypatch.setattr("service.gpu_devices.gpu_memory", lambda: here)
    monkeypatch.setattr("service.models.locate", lambda source, root: Path(source))
    monkeypatch.setattr("service.models.inspect_model", lambda path: model(path=path))
    path = tmp_path / "coe.yaml"
    path.write_text(TWO + GPU)
    config = load_config(path)
    try:
        _print_plans(config, plans_of(config))
        refused = ""
    except ConfigError as error:
        refused = error.message
    printed = capsys.readouterr()
    for line in said:
        assert line in printed.out + printed.err + refused
    assert bool(refused) == (gpu_gib == 3)
