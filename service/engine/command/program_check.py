"""Checks that the programs of commands can be run on this machine, without running them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from service.config import CommandConfig, Config
from service.errors import ConfigError


def check_programs(config: Config) -> None:
    """Check the program and the folder of every command that a pool will run.

    Raises:
        ConfigError: Names each expert whose command can't be run here, one a line.
    """
    real = {
        name
        for kind, pool in config.pools.items()
        if pool.engine != "simulated"
        for name in config.local_experts(kind)
    }
    faults = [
        f"experts.{name}.command.{fault}"
        for name, expert in config.experts.items()
        if name in real and expert.command is not None
        if (fault := program_fault(expert.command)) is not None
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def program_fault(command: CommandConfig) -> str | None:
    """Return why a command can't be run on this machine, or None."""
    folder = Path(command.cwd) if command.cwd is not None else Path.cwd()
    if not folder.is_dir():
        return f"cwd: {folder} is no folder of this machine"
    program = command.run[0]
    if "/" in program:
        path = folder / program
        if not path.exists():
            return f"run: {path} is not there"
        if path.is_dir() or not os.access(path, os.X_OK):
            return f"run: {path} is not an executable file"
        return None
    places = command.env.get("PATH", os.environ.get("PATH", os.defpath))
    if shutil.which(program, path=places) is None:
        return f"run: no program {program!r} is in PATH; give its path"
    return None
