"""LiteLLM's proxy in a virtual environment of its own, which is created on demand."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from loadtests.lib.child_processes import fetch, running, say
from loadtests.lib.coe_service import ROOT

VERSION = "1.106.4"
_FOLDER = ROOT / ".cache" / "litellm-venv"
# It asks for a certifi of the same week, which mirrors may not have yet; nothing
# here speaks TLS.
_OVERRIDES = "certifi>=2024\n"
_START_S = 180.0


def environment() -> Path:
    """Its virtual environment's `bin`, made first if it isn't there."""
    bin_dir = _FOLDER / "bin"
    done = _FOLDER / f"litellm-{VERSION}"
    if done.exists():
        return bin_dir
    say(f"installing LiteLLM {VERSION} into {_FOLDER}")
    venv.create(_FOLDER, with_pip=True, clear=True)
    python = str(bin_dir / "python")
    _run(python, "-m", "pip", "install", "--quiet", "uv==0.13.9")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.write(_OVERRIDES)
        overrides.flush()
        wanted = f"litellm[proxy]=={VERSION}"
        _run(
            python,
            "-m",
            "uv",
            "pip",
            "install",
            "--quiet",
            "--python",
            python,
            wanted,
            "--override",
            overrides.name,
        )
    done.touch()
    return bin_dir


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[1:4]} failed; is a package index within reach?")


@contextmanager
def proxy(port: int, upstream_port: int, model: str, key: str) -> Iterator[None]:
    """LiteLLM's proxy in front of an upstream, set up as its guide for production says.

    One worker, as our service has one gateway; no database, no logging. It does not
    start without a key, so it is given one, through the environment.
    """
    bin_dir = environment()
    params = {
        "model": "openai/upstream",
        "api_base": f"http://127.0.0.1:{upstream_port}/v1",
        "api_key": "none",
    }
    settings = {
        "model_list": [{"model_name": model, "litellm_params": params}],
        "litellm_settings": {"set_verbose": False, "telemetry": False, "num_retries": 0},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(settings, file)
        file.flush()
        command = [
            str(bin_dir / "litellm"),
            "--config",
            file.name,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--num_workers",
            "1",
            "--telemetry",
            "False",
        ]
        env = {
            "LITELLM_MASTER_KEY": key,
            "LITELLM_LOG": "ERROR",
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "PYTHONPATH": "",
        }

        def ready() -> bool:
            return fetch(port, "/health/liveliness")[0] == 200

        with running("litellm", command, ready, timeout_s=_START_S, env=env):
            yield
