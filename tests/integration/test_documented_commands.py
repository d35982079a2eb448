"""The documents' commands do what they say.

Every command block of README and of `docs/getting-started` is executed, or is one that other tests
are run by (starting the service, building an image, installing the chart). Every config block of
the documents is parsed, and every `coe …` that is named anywhere is there, with its options.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from service.cli import cli
from service.config import Config
from service.config.loader import parse_config
from service.config.vllm_args import PASSED
from tests.support.in_process_service import ADMIN_KEY, RunningGateway, run_gateway

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
QUICKSTART = (DOCS / "getting-started" / "quickstart.md").read_text()
CLIENTS = (DOCS / "getting-started" / "clients.md").read_text()
ROUTING = (DOCS / "concepts" / "routing.md").read_text()
START = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *sorted((DOCS / "getting-started").glob("*.md"))]
}
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    if "reference" not in path.parts
}
# Sent only where there is something to say.
SOMETIMES = {
    "x-coe-recipe",
    "x-coe-max-tokens",
    "x-coe-tools-left-out",
    "x-coe-guard",
    "x-coe-cache",
    "x-coe-cache-similarity",
    "x-coe-session",
    "x-coe-alias",
}
LOCAL = "http://127.0.0.1:8000"
# Run by the tests' own runner, by `tests/chart` and by whoever builds an image.
ELSEWHERE = {"git", "make", "deploy/image.sh", "helm"}
# The demo's composition, with an engine that takes no time.
_DEMO = yaml.safe_load((ROOT / "deploy" / "config" / "demo.yaml").read_text())
DEMO = Config.model_validate(
    {
        "router": {"artifact": str(ROOT / "router_models" / "artifacts" / "demo@2")},
        "experts": {
            name: expert
            if "defaults" in expert
            else {"model": name, "categories": expert["categories"]}
            for name, expert in _DEMO["experts"].items()
        },
        "pools": {"cpu": {"engine": "simulated", "simulated": {"tokens": 4}}},
    }
)


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of a page, those of tabs included."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, language, block in found if language in languages]


def commands(text: str) -> list[str]:
    """The lines that a person would paste into a shell."""
    joined = [block.replace("\\\n", " ") for block in blocks(text, "bash", "")]
    return [line.strip() for block in joined for line in block.splitlines() if line.strip()]


def starting(prefix: str, text: str) -> list[str]:
    return [line for line in commands(text) if line.startswith(prefix)]


async def run(s: RunningGateway, home: Path, command: str | list[str]) -> str:
    """As a user of the running service would; what it prints."""
    environment = os.environ | {
        "COE_URL": s.url,
        "COE_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
    }
    (home / "admin-key").write_text(ADMIN_KEY)
    words = shlex.split(command) if isinstance(command, str) else command
    if words[0] in ("coe", ".venv/bin/coe"):
        words = [sys.executable, "-m", "service.cli", *words[1:]]
    ran = await asyncio.to_thread(
        subprocess.run,
        words,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, (words, ran.stdout, ran.stderr)
    return ran.stdout


PROGRAMS = {"curl", ".venv/bin/coe", "coe", *ELSEWHERE}


@pytest.mark.parametrize("page", START)
def test_commands_of_a_page_are_run_or_listed(page: str) -> None:
    assert {line.split()[0] for line in commands(START[page])} <= PROGRAMS
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in starting("make ", START[page]):
        assert line.split()[1] in targets
    for line in starting("deploy/", START[page]):
        assert os.access(ROOT / line.split()[0], os.X_OK)
    for line in starting("helm ", START[page]):
        assert "./helm" in line
        assert (ROOT / "helm" / "Chart.yaml").exists()


@pytest.mark.parametrize("page", [page for page in START if starting("curl ", START[page])])
async def test_curl_examples_answer_as_shown(page: str, tmp_path: Path) -> None:
    async with run_gateway(DEMO) as s:
        for line in starting("curl ", START[page]):
            plain = line if "curl -i" in line else line.replace("curl", "curl -i", 1)
            output = await run(s, tmp_path, plain.replace(LOCAL, s.url))
            head, _, body = output.partition("\n\n")
            assert head.startswith("HTTP/1.1 200")
            reply = json.loads(body)
            for shown in blocks(START[page], "http", "json"):
                for name in re.findall(r"^(x-coe-[a-z-]+):", shown, re.MULTILINE):
                    assert f"{name}: " in head
                if "{" in shown:
                    assert_shows(json.loads(shown[shown.index("{") :]), reply)


def assert_shows(shown: Any, reply: Any) -> None:
    """Every field that a document shows is in the reply."""
    if isinstance(shown, dict):
        for name, value in shown.items():
            assert name in reply
            assert_shows(value, reply[name])
    elif isinstance(shown, list):
        for item, other in zip(shown, reply, strict=True):
            assert_shows(item, other)


async def test_headers_of_the_clients_page_are_sent(tmp_path: Path) -> None:
    listed = "".join(re.findall(r"^\| (`x-coe-.*?) \|", CLIENTS, re.MULTILINE))
    names = re.findall(r"`(x-coe-[a-z-]+)`", listed)
    assert set(names) >= SOMETIMES
    [line] = starting("curl ", README)
    async with run_gateway(DEMO) as s:
        head = (await run(s, tmp_path, line.replace(LOCAL, s.url))).partition("\n\n")[0]
    assert "x-coe-expert: intents" in head
    for name in names:
        assert name in head or name in SOMETIMES, name


@pytest.mark.parametrize(
    "page", [page for page in START if starting(".venv/bin/coe ", START[page])]
)
async def test_each_command_line_runs(page: str, tmp_path: Path) -> None:
    async with run_gateway(DEMO) as s:
        for line in starting(".venv/bin/coe ", START[page]):
            output = await run(s, tmp_path, line)
            assert output
            if "12 cows" in line:
                assert "math" in output


def test_quickstart_shows_a_chat_and_a_route() -> None:
    assert starting(".venv/bin/coe chat", QUICKSTART)
    assert starting(".venv/bin/coe route", QUICKSTART)


@pytest.mark.parametrize("page", [page for page in START if blocks(START[page], "python")])
async def test_python_blocks_run(page: str, tmp_path: Path) -> None:
    async with run_gateway(DEMO) as s:
        for block in blocks(START[page], "python"):
            if (
                "anthropic" in block
            ):  # the simulated engine has no Messages API; test_demo_clients has one
                compile(block, page, "exec")
                continue
            code = block.replace(LOCAL, s.url)
            assert (await run(s, tmp_path, [sys.executable, "-c", code])).strip()


async def test_worked_example_has_the_right_numbers(tmp_path: Path) -> None:
    found = re.search(r"`(coe route \"[^`]+)`", ROUTING)
    assert found
    async with run_gateway(DEMO) as s:
        route = json.loads(await run(s, tmp_path, found[1] + " --json"))
    assert round(route["posterior"]["math"], 3) == 1.0
    candidates = [one for one in route["candidates"] if one["utility"] is not None]
    assert len(candidates) > 3
    for candidate in candidates:
        weighed = route["cost_price"] * candidate["cost"]
        name = candidate.get("recipe") or candidate["expert"]
        row = (
            f"| {name} | {candidate['quality']:.2f} | {weighed:.3f} "
            f"| {candidate['waiting_s']:.2f} s |"
        )
        assert row in ROUTING
        assert f"{candidate['utility']:.3f}" in ROUTING


def configs() -> list[tuple[str, str]]:
    """Every block of a page that is a part of a config."""
    return [
        (f"{page} {number}", block)
        for page, text in PAGES.items()
        for number, block in enumerate(blocks(text, "yaml"))
    ]


def completed(data: dict[str, Any]) -> dict[str, Any]:
    """A config of which a document shows a part, with the experts and the pool that it needs."""
    experts = dict(
        data.get("experts") or {"general": {"model": "general", "categories": ["general"]}}
    )
    for recipe in data.get("recipes", {}).values():
        among = recipe.get("recruit", {}).get("among", [])
        for name in [*recipe.get("members", []), *recipe.get("later", []), *among]:
            experts.setdefault(name, {"model": name, "categories": ["general"]})
    shadow = data.get("shadow", {})
    named = [*data.get("savings", {}).get("against", []), *shadow.get("experts", [])]
    for name in [*named, *([shadow["judge"]] if "judge" in shadow else [])]:
        experts.setdefault(name, {"model": name, "categories": ["general"]})
    for alias in data.get("aliases", {}).values():
        # A target, or targets with their weights.
        to = alias.get("to", alias) if isinstance(alias, dict) else {alias: 1}
        for name in [to] if isinstance(to, str) else to:
            if name.partition(":")[0].partition("/")[0] != "auto":
                experts.setdefault(name, {"model": name, "categories": ["general"]})
    for expert in list(experts.values()):
        if "base" in expert:
            experts.setdefault(expert["base"], {"model": expert["base"], "categories": ["general"]})
    whole = {"pools": {"cpu": {"engine": "simulated"}}, **data, "experts": experts}
    if all("remote" in expert for expert in experts.values()):
        whole.pop("pools")
    return whole


@pytest.mark.parametrize(("name", "block"), configs(), ids=[name for name, _ in configs()])
def test_yaml_blocks_are_valid_configs(name: str, block: str) -> None:
    data = yaml.safe_load(block)
    assert data.keys() <= set(Config.model_fields)
    parse_config(yaml.safe_dump(completed(data)), name)


def mentioned() -> list[str]:
    """Every `coe …` in a document's text and tables, and in its guides' blocks."""
    found = set()
    for text in PAGES.values():
        prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
        found |= set(re.findall(r"`(?:\.venv/bin/)?(coe [a-z][^`\n]*)`", prose))
        found |= {line.partition("  #")[0].strip() for line in starting("coe ", text)}
    return sorted(found)


@pytest.mark.parametrize("line", mentioned())
def test_commands_named_in_the_documents_exist_with_their_options(line: str) -> None:
    words = line.replace("\\|", "|").replace("[", " ").replace("]", " ").split()[1:]
    command: Any = cli
    context = click.Context(cli)
    while isinstance(command, click.Group) and words and re.match(r"[a-z][a-z|-]*$", words[0]):
        names = words.pop(0).split("|")
        found = [command.get_command(context, name) for name in names]
        assert all(found), line
        command = found[0]
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    for word in re.findall(r"(?<=\s)--?[a-z-]+", " ".join(["", *words])):
        assert word in options, f"{line}: {word}"


def anchors(text: str) -> set[str]:
    """The addresses of a page's headings, as mkdocs and GitHub make them of plain words."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_readme_is_short_and_its_pictures_and_links_exist() -> None:
    assert len(README.splitlines()) <= 120
    assert len((ROOT / "service" / "README.md").read_text().splitlines()) <= 80
    pictures = re.findall(r'src(?:set)?="([^"]+)"', README)
    assert len(pictures) == 2
    for page in ("README.md", "service/README.md", "deploy/README.md", "loadtests/README.md"):
        text = (ROOT / page).read_text()
        for path, anchor in re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]*))?\)", text):
            target = (ROOT / page).parent / path
            assert target.exists(), (page, path)
            assert not anchor or anchor in anchors(target.read_text()), (page, path, anchor)
    assert all((ROOT / path).exists() for path in pictures)


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "deploy" / "docs" / "mkdocs.yml").read_text()
    listed = set(re.findall(r"^ +- (?:\w+: )?(\S+\.md)$", text, re.MULTILINE))
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_targets_named_in_the_documents_exist(page: str) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    packages = "|".join(path.name for path in (ROOT / "service").iterdir() if path.is_dir())
    top = "service|tests|deploy|loadtests|router_models|helm|docs|\\.github"
    for path in re.findall(rf"`((?:{top}|{packages})/[\w/.@-]+)`", text):
        assert (ROOT / path).exists() or (ROOT / "service" / path).exists(), path
    for module in re.findall(r"`python -m ([a-z_.]+)", text):
        found = ROOT / module.replace(".", "/")
        assert found.is_dir() or found.with_suffix(".py").exists(), module
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_metrics_and_settings_named_in_the_documents_exist(page: str) -> None:
    metrics = (DOCS / "reference" / "metrics.md").read_text()
    keys = (DOCS / "reference" / "config.md").read_text()
    sections = "server|store|swap|vllm|telemetry|remote|tenants|experts|pools|feedback"
    for name in re.findall(r"`(coe_[a-z_]+)`", PAGES[page]):
        assert name in metrics, name
    key = rf"`(?:(?:{sections})\.)((?:[A-Za-z_]+\.)*)([a-z_]+)`"
    for parents, name in re.findall(key, PAGES[page]):
        if parents.endswith("args."):
            # An argument of vLLM's own.
            assert name in PASSED, name
        else:
            assert f"`{name}`" in keys, name
