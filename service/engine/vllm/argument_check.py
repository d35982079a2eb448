"""Checks `pools.KIND.vllm.args` against the installed vLLM, in a process of its own.

The import of vLLM takes up to half a minute. A command that checks a config imports it only where a
pool has such arguments, and does not keep its memory. `python -m` this module reads each pool's
arguments as JSON from stdin, and writes vLLM's messages as JSON in the last line of stdout.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from service.config import Config
from service.engine.vllm.async_llm_handle import argument_faults
from service.errors import ConfigError

_TIMEOUT_S = 300.0
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def check_arguments(config: Config) -> str | None:
    """Let vLLM check the arguments of all pools.

    Returns:
        Why the arguments could not be checked, or None.

    Raises:
        ConfigError: vLLM refuses an argument; the message has one line per fault.
    """
    given = {
        kind: pool.vllm.args
        for kind, pool in config.pools.items()
        if pool.engine == "vllm" and pool.vllm.args
    }
    if not given:
        return None
    where = ", ".join(f"pools.{kind}.vllm.args" for kind in given)
    if importlib.util.find_spec("vllm") is None:
        return f"{where}: vLLM is not installed here, so that it could not check the values"
    try:
        faults = _in_own_process(given)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return f"{where}: vLLM could not be asked about the values ({type(error).__name__})"
    lines = [
        f"pools.{kind}.vllm.args.{name}: vLLM refuses it: {fault}"
        for kind, found in faults.items()
        for name, fault in found.items()
    ]
    if lines:
        raise ConfigError("\n".join(lines))
    return None


def _in_own_process(given: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    answer = subprocess.run(
        [sys.executable, "-m", "service.engine.vllm.argument_check"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=True,
        env={**os.environ, **_ENVIRONMENT},
    )
    found: dict[str, dict[str, str]] = json.loads(answer.stdout.splitlines()[-1])
    return found


def _main() -> None:
    given = json.load(sys.stdin)
    faults = {kind: argument_faults(args) for kind, args in given.items()}
    sys.stdout.write("\n" + json.dumps(faults) + "\n")


if __name__ == "__main__":
    _main()
