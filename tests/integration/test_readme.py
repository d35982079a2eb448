"""The README's commands do what it says: each is executed, or (to start the service, to run
the tests) is what the tests themselves are run by."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from service.cli import cli
from service.config import Config
from tests.support.serving import ADMIN_KEY, Site, site

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Told only where there is something to tell.
SOMETIMES = {
    "x-coe-recipe",
    "x-coe-max-tokens",
    "x-coe-tools-left-out",
    "x-coe-guard",
    "x-coe-cache",
    "x-coe-cache-similarity",
}
LOCAL = "http://127.0.0.1:8000"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
# The demo's composition, with an engine that takes no time.
_DEMO = yaml.safe_load((ROOT / "deploy" / "config" / "demo.yaml").read_text())
DEMO = Config.model_validate(
    {
        "router": {"artifact": str(ROOT / "router_models" / "artifacts" / "demo@1")},
        "experts": {
            name: {"model": name, "categories": expert["categories"]}
            for name, expert in _DEMO["experts"].items()
        },
        "pools": {"cpu": {"engine": "simulated", "simulated": {"tokens": 4}}},
    }
)


def commands() -> list[str]:
    """What a person would paste into a shell: blocks that begin with a program's name."""
    found = []
    for language, block in BLOCKS:
        lines = block.replace("\\\n", " ").strip().splitlines()
        if language in ("", "bash") and re.match(r"(curl|coe|\.venv/bin/coe|make|git) ", lines[0]):
            found += lines
    return found


def of(prefix: str) -> list[str]:
    return [line for line in commands() if line.startswith(prefix)]


async def run(s: Site, home: Path, command: str | list[str]) -> str:
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


def test_nothing_in_it_is_left_out_here() -> None:
    kinds = {line.split()[0] for line in commands()}
    assert kinds == {"git", "make", "curl", ".venv/bin/coe", "coe"}
    assert of("make ") == ["make serve"]


async def test_the_curl_line_and_its_headers(tmp_path: Path) -> None:
    async with site(DEMO) as s:
        assert of("curl ")
        for line in of("curl "):
            told = await run(s, tmp_path, line.replace(LOCAL, s.url))
            head, _, body = told.partition("\n\n")
            assert head.startswith("HTTP/1.1 200")
            assert json.loads(body)["model"] == "intents"
            assert "x-coe-expert: intents" in head
            for header in re.findall(r"^\| (`x-coe-.*?) \|", README, re.MULTILINE):
                for name in re.findall(r"`(x-coe-[a-z-]+)`", header):
                    assert name in head or name in SOMETIMES, name


async def test_each_command_line_runs(tmp_path: Path) -> None:
    async with site(DEMO) as s:
        chats = of(".venv/bin/coe chat")
        assert chats
        for line in chats:
            told = await run(s, tmp_path, line)
            assert "↳ math" in told
        for line in of("coe "):
            assert await run(s, tmp_path, line)


async def test_the_python_block(tmp_path: Path) -> None:
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert blocks
    async with site(DEMO) as s:
        for block in blocks:
            code = block.replace(LOCAL, s.url)
            assert "code:" in await run(s, tmp_path, [sys.executable, "-c", code])


async def test_the_worked_example_s_numbers(tmp_path: Path) -> None:
    found = re.search(r"from `(coe route \"[^`]+)`", README)
    assert found
    async with site(DEMO) as s:
        told = json.loads(await run(s, tmp_path, found[1] + " --json"))
    assert round(told["posterior"]["math"], 3) == 1.0
    for one in told["candidates"]:
        time_s = one["wait_s"] + one["answer_s"]
        row = f"| {one['expert']} | {one['quality']:.2f} | {time_s:.2f} s | 0 |"
        assert row in README
        assert f"{one['utility']:.3f}" in README


def test_yaml_blocks_are_configs() -> None:
    blocks = [yaml.safe_load(block) for language, block in BLOCKS if language == "yaml"]
    assert len(blocks) >= 2
    for block in blocks:
        known = set(Config.model_fields)
        assert block.keys() <= known


def inline() -> list[str]:
    """Every `coe …` in the text and its tables."""
    text = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    return sorted(set(re.findall(r"`(coe [a-z][^`]*)`", text)))


@pytest.mark.parametrize("line", inline())
def test_every_command_named_is_there_with_its_options(line: str) -> None:
    words = line.replace("\\|", "|").replace("[", " ").replace("]", " ").split()[1:]
    command: Any = cli
    context = click.Context(cli)
    while isinstance(command, click.Group) and words and re.match(r"[a-z|]+$", words[0]):
        names = words.pop(0).split("|")
        found = [command.get_command(context, name) for name in names]
        assert all(found), line
        command = found[0]
    options = {option for parameter in command.params for option in parameter.opts}
    for word in re.findall(r"(?<=\s)--?[a-z-]+", " ".join(["", *words])):
        assert word in options, f"{line}: {word}"


def test_pictures_and_links_are_there() -> None:
    linked = re.findall(r"\]\(((?!http)[^)#]+)", README)
    pictures = re.findall(r'src(?:set)?="([^"]+)"', README)
    assert len(pictures) == 2
    for path in [*linked, *pictures]:
        assert (ROOT / path).exists(), path
