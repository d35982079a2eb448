"""Clients of other projects that tests drive, as deploy/clients.sh installs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".cache" / "clients"
SCRIPTS = ROOT / "tests" / "clients"
_QUIET = {
    "DO_NOT_TRACK": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
}


def run(command: list[Any], **more: Any) -> str:
    """What it prints; its complaints where it fails. `more`: of its environment."""
    environment = os.environ | _QUIET | more
    environment.pop("PYTHONPATH", None)
    ran = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return ran.stdout


def last_json(text: str) -> Any:
    """The last line that a client printed."""
    return json.loads(text.strip().splitlines()[-1])


def python() -> Path:
    """The Python clients' own environment; skips where it isn't."""
    if not (CLIENTS / "venv" / "bin" / "llm").exists():
        pytest.skip("the Python clients are not installed (deploy/clients.sh installs them)")
    return CLIENTS / "venv" / "bin" / "python"


def python_with(package: str) -> Path:
    """The Python clients' own environment; skips where it lacks a package."""
    found = python()
    if not list(CLIENTS.glob(f"venv/lib/python3*/site-packages/{package}")):
        pytest.skip(f"the client {package} is not installed (deploy/clients.sh installs it)")
    return found


def run_node(script: str, url: str, *more: str) -> Any:
    """What a script of tests/clients tells of a service, through OpenAI's Node client."""
    node = shutil.which("node")
    if node is None or not (CLIENTS / "node_modules" / "openai").is_dir():
        pytest.skip("the Node client is not installed (deploy/clients.sh installs it)")
    return last_json(run([node, SCRIPTS / script, url, CLIENTS / "package.json", *more]))
