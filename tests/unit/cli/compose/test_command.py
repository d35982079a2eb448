"""`coe compose` from files to a config that `coe check` accepts, and against a running service."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import CliRunner, Result

from service.cli import cli
from service.config import load_config
from tests.support.http_server import QuietHandler, serve

CATEGORIES = ("general", "code", "math")
BASE: dict[str, Any] = {
    "experts": {
        "general": {"model": "Org/General-7B", "categories": ["general"]},
        "code": {"model": "Org/Coder-7B"},
        "math": {"model": "Org/Math-1.5B"},
        "code-awq": {"model": "Org/Coder-7B-AWQ"},
        "far": {"remote": {"url": "https://api.example.com/v1", "model": "x"}},
        "unknown": {"model": "Org/Other-7B"},
    },
    "prices": {"per_billion_parameters": 1},
    "budgets": {"all": {"amount": 100, "window_s": 3600}},
    "pools": {"big": {"gpus": 1, "vllm": {"dtype": "bfloat16", "max_num_seqs": 7}}},
}
HAS = {"general": (0.6, 0.3, 0.3), "code": (0.4, 0.8, 0.3), "math": (0.4, 0.3, 0.9)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = random.Random(0)
    rows = []
    for c, category in enumerate(CATEGORIES):
        for i in range(60):
            outcomes = {
                name: {"score": int(draw.random() < chances[c])} for name, chances in HAS.items()
            }
            rows.append(
                {"id": f"{category}{i}", "prompt": f"{category} {i}", "category": category}
                | {"outcomes": outcomes}
            )
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sizes.json").write_text(json.dumps({"code-awq": "5GiB"}))
    write(tmp_path / "base.yaml", BASE)
    return tmp_path


def write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(data, sort_keys=False))


def compose(folder: Path, *words: str, base: str = "base.yaml") -> Result:
    options = ["--outcomes", str(folder / "rows.jsonl"), "--config", str(folder / base)]
    options += ["--sizes", str(folder / "sizes.json"), "--out", str(folder / "coe.yaml")]
    return CliRunner().invoke(cli, ["compose", *options, "--analysis-s", "0", *words])


def text_of(result: Result) -> str:
    return result.output + (str(result.exception) if result.exception else "")


def test_compose_writes_a_config_a_report_and_a_picture(folder: Path) -> None:
    done = compose(
        folder,
        *("--accelerators", "2x24GiB", "--alternative", "code=code-awq", "--budget", "0.01"),
        *("--report", str(folder / "r.json"), "--plot", str(folder / "p.svg")),
        *("--analysis-s", "20"),
    )
    assert done.exit_code == 0, text_of(done)
    assert "without outcomes, and left out: far, unknown" in done.stderr
    assert "estimated from its name" in done.stderr
    assert "the base config has no router.artifact" in done.stderr
    config = load_config(folder / "coe.yaml")
    assert set(config.experts) == {"general", "code-awq", "math"}
    assert config.category_map() == {"general": "general", "code": "code-awq", "math": "math"}
    assert config.fallback == "general"
    assert config.budgets.keys() == {"all"}  # every other section stays
    assert all(pool.vllm.max_num_seqs == 7 for pool in config.pools.values())
    report = json.loads((folder / "r.json").read_text())
    assert report["exact"] is True
    assert report["categories"]["math"]["recipe"]["members"] == ["math"]
    assert report["unbought"] == ["code"]
    ElementTree.parse(folder / "p.svg")
    for part in (
        "quality",
        "the next step would buy",
        "lost without an expert",
        "budget in compute, quality",
    ):
        assert part in done.stdout


def test_compose_json_is_one_object_on_stdout(folder: Path) -> None:
    done = compose(folder, "--accelerators", "1x48GiB", "--json")
    assert done.exit_code == 0, text_of(done)
    assert json.loads(done.stdout)["exact"] is True


def test_compose_traffic_decides_what_is_bought(folder: Path) -> None:
    traffic = folder / "shares.json"
    bought = []
    for shares in ({"code": 9, "general": 1}, {"math": 9, "general": 1}):
        traffic.write_text(json.dumps(shares))
        done = compose(
            folder,
            *("--accelerators", "2x20GiB", "--slo-s", "1", "--traffic", str(traffic)),
        )
        assert done.exit_code == 0, text_of(done)
        bought.append(set(load_config(folder / "coe.yaml").experts))
    assert bought == [{"general", "code"}, {"general", "math"}]


def test_compose_on_a_cpu_is_accepted_by_check(folder: Path) -> None:
    root = Path(__file__).parents[4]
    words = ["compose", "--outcomes", str(folder / "rows.jsonl"), "--analysis-s", "0"]
    words += ["--config", str(root / "deploy/config/demo.yaml"), "--memory", "4GiB"]
    shares = {"code": 1, "math": 1, "general": 1, "law": 1}
    (folder / "shares.json").write_text(json.dumps(shares))
    words += ["--traffic", str(folder / "shares.json"), "--out", str(folder / "coe.yaml")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, text_of(done)
    assert "the base config's classifier does not know: law" in done.stderr
    checked = CliRunner().invoke(cli, ["check", str(folder / "coe.yaml")])
    assert checked.exit_code == 0, text_of(checked)
    config = load_config(folder / "coe.yaml")
    assert set(config.experts) == {"general", "math", "code"}  # intents has no outcomes
    assert config.experts["math"].quality["math"] > config.experts["math"].quality["code"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--memory", "24GiB"), "the base config's pools are for GPUs: give --accelerators"),
        (("--accelerators", "24GiB"), "expected a number and the memory of each"),
        (("--accelerators", "0x24GiB"), "expected a number and the memory of each"),
        (("--accelerators", "1x24GiB", "--keep", "nobody"), "--keep: no expert 'nobody'"),
        (("--accelerators", "1x24GiB", "--pool", "x"), "no pool 'x'; pools: big"),
        (("--accelerators", "1x4GiB"), "'general', which is required, alone takes"),
        (("--accelerators", "1x24GiB", "--budget", "0.0000001"), "the budget is 1e-07 a request"),
        (("--accelerators", "1x24GiB", "--alternative", "code"), "expected EXPERT=OTHER"),
        (("--accelerators", "1x24GiB", "--alternative", "code=zz"), "no expert 'zz' with a cost"),
        (("--accelerators", "1x24GiB", "--tokens", "5"), "expected the tokens of a prompt"),
        (("--accelerators", "1x24GiB", "--rate", "1"), "no busy seconds of"),
        (("--accelerators", "1x24GiB", "--apply"), "--apply needs --live"),
        (("--accelerators", "1x24GiB", "--map", "."), "give either --outcomes or --map"),
    ],
)
def test_compose_bad_input_is_one_clear_error(
    folder: Path, words: tuple[str, ...], message: str
) -> None:
    done = compose(folder, *words)
    assert done.exit_code != 0
    assert message in text_of(done)
    assert not (folder / "coe.yaml").exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("[]", "an object of expert names"),
        ('{"a": "much"}', "a: input should be a number of bytes"),
        ('{"a": 0}', "a: bytes above 0"),
        ('{"a": {"byte": 1}}', "unknown key 'byte'; allowed: busy_s, bytes"),
        ('{"a": {"swap_s": "1"}}', r"a.swap_s: seconds >= 0"),
    ],
)
def test_compose_bad_sizes_are_one_clear_error(folder: Path, sizes: str, message: str) -> None:
    (folder / "sizes.json").write_text(sizes)
    assert message in text_of(compose(folder, "--accelerators", "1x24GiB"))


def test_compose_expert_of_unknown_size_is_an_error(folder: Path) -> None:
    base = {**BASE, "experts": {**BASE["experts"], "math": {"model": "Org/Math"}}}
    write(folder / "base.yaml", base)
    done = compose(folder, "--accelerators", "1x24GiB")
    assert "experts.math.model: 'Org/Math' is not on this machine and its name" in text_of(done)


@contextmanager
def service(
    metrics: str | Iterator[str], reload_status: int, **busy_s: float
) -> Iterator[tuple[str, list[str]]]:
    """A service with metrics and pools, and the paths that it was asked for with the admin key."""
    asked: list[str] = []
    states: dict[str, dict[str, float]] = {"math": {"swap_s": 3.0}, "code": {}}
    for name, seconds in busy_s.items():
        states.setdefault(name, {})["busy_s"] = seconds
    experts = {"pools": {"big": states}}

    class Handler(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802  # the name that the server calls
            assert self.headers["authorization"] == "Bearer the-key"
            asked.append(f"{self.command} {self.path}")
            status, body = 200, json.dumps(experts)
            if self.path == "/metrics":
                body = metrics if isinstance(metrics, str) else next(metrics)
            if self.path == "/admin/reload":
                status = reload_status
                body = json.dumps({"error": {"message": "refused"}} if status > 200 else {})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET  # noqa: N815

    with serve(Handler) as url:
        yield url, asked


METRICS = (
    "# TYPE coe_requests_total counter\n"
    'coe_requests_total{expert="a",category="math",recipe="",outcome="ok"} 90\n'
    'coe_requests_total{expert="a",category="general",recipe="",outcome="ok"} 10\n'
)


def test_compose_live_shows_a_diff_and_applies_it_on_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COE_ADMIN_KEY", "the-key")
    common = ("--accelerators", "2x20GiB", "--slo-s", "1")
    (folder / "shares.json").write_text('{"code": 1}')
    assert compose(folder, *common, "--traffic", str(folder / "shares.json")).exit_code == 0
    out = folder / "coe.yaml"
    before = out.read_text()
    with service(METRICS, 200) as (url, asked):
        done = compose(folder, *common, "--live", url)
        assert done.exit_code == 0, text_of(done)
        assert "+++ " in done.stderr
        assert "(proposed)" in done.stderr
        assert out.read_text() == before
        assert "+  math:" in done.stderr
        assert "while the service runs: " in done.stderr
        assert "needs a restart" not in done.stderr
        assert sorted(asked) == ["GET /admin/experts", "GET /metrics"]
        done = compose(folder, *common, "--live", url, "--apply")
        assert done.exit_code == 0, text_of(done)
        assert asked[-1] == "POST /admin/reload"
        assert out.read_text() != before
        load_config(out)
        again = compose(folder, *common, "--live", url, "--apply")
        assert "nothing to change" in again.stderr
        assert asked.count("POST /admin/reload") == 1


def test_compose_live_gives_a_hot_expert_copies_and_pools(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COE_ADMIN_KEY", "the-key")
    common = ("--accelerators", "4x20GiB", "--slo-s", "1")
    assert compose(folder, *common).exit_code == 0
    copies = []
    for per_s in (0.01, 60):
        counted = itertools.count(100)
        texts = (METRICS.replace(" 90", f" {100 + 0.1 * per_s * i}") for i in counted)
        with service(texts, 200, math=0.02) as (url, _):
            done = compose(folder, *common, "--live", url, "--apply", "--window-s", "0.1")
        assert done.exit_code == 0, text_of(done)
        assert "measuring the rate" in done.stderr
        assert "never measured, so that 0.02 s of an engine" in done.stderr
        pools = load_config(folder / "coe.yaml").pools
        held = [pool for pool in pools.values() if "math" in (pool.experts or ())]
        copies.append(sum(pool.min_replicas for pool in held))
        own = [pool for pool in held if pool.experts == ("math",)]
    # 1.2 engines are kept busy, for at most 70 % of the time.
    assert copies == [1, 2]
    assert own


def test_compose_live_says_what_needs_a_restart_of_the_service(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COE_ADMIN_KEY", "the-key")
    common = ("--accelerators", "2x20GiB", "--slo-s", "1")
    assert compose(folder, *common).exit_code == 0
    write(folder / "base.yaml", {**BASE, "server": {"drain_s": 3}})
    with service(METRICS, 200) as (url, _):
        done = compose(folder, *common, "--live", url)
    said = [line for line in done.stderr.splitlines() if "needs a restart" in line]
    assert said == [
        "needs a restart of the service: server changed, so that a reload refuses this config"
    ]


def test_compose_live_refused_reload_puts_the_file_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COE_ADMIN_KEY", "the-key")
    common = ("--accelerators", "2x20GiB", "--slo-s", "1")
    (folder / "shares.json").write_text('{"code": 1}')
    assert compose(folder, *common, "--traffic", str(folder / "shares.json")).exit_code == 0
    before = (folder / "coe.yaml").read_text()
    with service(METRICS, 409) as (url, _):
        done = compose(folder, *common, "--live", url, "--apply")
    assert done.exit_code != 0
    assert "refused" in text_of(done)
    assert (folder / "coe.yaml").read_text() == before
