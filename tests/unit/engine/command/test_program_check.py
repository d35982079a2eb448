from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from service.config import CommandConfig, Config
from service.engine.command.program_check import check_programs, program_fault
from service.errors import ConfigError


def fault(program: str, **settings: Any) -> str | None:
    return program_fault(CommandConfig(run=(program, "{port}"), memory_bytes=1, **settings))


def test_program_fault_of_programs_that_can_run_is_none(tmp_path: Path) -> None:
    file = tmp_path / "server"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    assert fault(sys.executable) is None
    assert fault("sh") is None
    assert fault("./server", cwd=str(tmp_path)) is None
    assert fault("server", env={"PATH": str(tmp_path)}) is None


def test_program_fault_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x")
    (tmp_path / "folder").mkdir()
    found = {
        "missing": fault("./missing", cwd=str(tmp_path)),
        "text": fault("./text", cwd=str(tmp_path)),
        "folder": fault("./folder", cwd=str(tmp_path)),
        "path": fault("no-such-program-here"),
        "cwd": fault("sh", cwd=str(tmp_path / "none")),
    }
    assert found == {
        "missing": f"run: {tmp_path}/missing is not there",
        "text": f"run: {tmp_path}/text is not an executable file",
        "folder": f"run: {tmp_path}/folder is not an executable file",
        "path": "run: no program 'no-such-program-here' is in PATH; give its path",
        "cwd": f"cwd: {tmp_path}/none is no folder of this machine",
    }


def test_check_programs_names_every_expert_in_a_line() -> None:
    bad = {"command": {"run": ["no-such-program-here", "{port}"], "memory_bytes": 1}}
    good = {"command": {"run": ["sh", "{port}"], "memory_bytes": 1}}
    config = Config.model_validate({"experts": {"a": bad, "b": good, "c": bad}, "pools": {"p": {}}})
    with pytest.raises(ConfigError) as caught:
        check_programs(config)
    lines = caught.value.message.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "experts.a.command.run",
        "experts.c.command.run",
    ]


def test_check_programs_leaves_simulated_pools_alone() -> None:
    bad = {"command": {"run": ["no-such-program-here", "{port}"], "memory_bytes": 1}}
    pools = {"p": {"engine": "simulated"}}
    check_programs(Config.model_validate({"experts": {"a": bad}, "pools": pools}))
