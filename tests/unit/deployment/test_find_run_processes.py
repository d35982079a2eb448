"""The processes that belong to a run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.deployment.find_run_processes import processes_of_run

# Whoever waits ends when the other end of its standard input is closed.
_WAIT = "import sys; sys.stdin.read()"
_LEAVE = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.DEVNULL).pid)
"""


@contextlib.contextmanager
def orphan(folder: Path, **environment: str) -> Iterator[psutil.Process]:
    """A process that names a file in the folder, and whose parent has ended."""
    read, write = os.pipe()
    result = subprocess.run(
        [sys.executable, "-c", _LEAVE, _WAIT, f"{folder}/log"],
        env={**os.environ, **environment},
        stdin=read,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    os.close(read)
    try:
        yield psutil.Process(int(result.stdout))
    finally:
        os.close(write)


def test_processes_with_the_run_s_token_are_of_the_run(tmp_path: Path) -> None:
    with orphan(tmp_path, RAY_AUTH_TOKEN_PATH=str(tmp_path / "ray-token")) as ours:
        assert ours in processes_of_run(tmp_path)


@pytest.mark.parametrize("token", ["/elsewhere/ray-token", ""])
def test_processes_with_another_token_are_not_of_the_run(tmp_path: Path, token: str) -> None:
    with orphan(tmp_path, RAY_AUTH_TOKEN_PATH=token) as stranger:
        assert stranger.is_running()
        assert stranger not in processes_of_run(tmp_path)
