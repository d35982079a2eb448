"""Networks of namespaces: what is left of runs that were killed. Needs no root."""

from __future__ import annotations

import os
import signal
import subprocess

import psutil
import pytest

from loadtests.nodes import namespace_network
from loadtests.nodes.namespace_network import (
    Namespace,
    Network,
    ended_by_sigterm,
    left_behind,
    sweep,
)

DEAD_PID = 2**22 + 1  # above the kernel's largest


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of namespaces and interfaces here; `_remove` takes away those of its prefix."""
    found = [f"coe{os.getpid()}", f"coe{os.getpid()}h", f"coe{DEAD_PID}", f"coe{DEAD_PID}fo"]
    found += ["eth0", "coe", "coex1", "docker0"]
    monkeypatch.setattr(namespace_network, "_names", lambda: list(found))

    def remove(prefix: str) -> None:
        found[:] = [name for name in found if not name.startswith(prefix)]

    monkeypatch.setattr(namespace_network, "_remove", remove)
    return found


def test_sweep_removes_only_networks_of_ended_runs(names: list[str]) -> None:
    sweep()
    mine = f"coe{os.getpid()}"
    assert names == [mine, mine + "h", "eth0", "coe", "coex1", "docker0"]


def test_left_behind_names_what_is_still_there(names: list[str]) -> None:
    assert left_behind(Network(f"coe{DEAD_PID}", "10.213.1")) == names[2:4]
    assert left_behind(Network("coe77", "10.213.1")) == []


def test_sigterm_ends_the_block_by_an_exception() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def block() -> None:
        with ended_by_sigterm():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                cleaned.append(True)

    with pytest.raises(SystemExit) as caught:
        block()
    assert cleaned == [True]
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_kill_goes_on_until_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    started = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    found = [psutil.Process(one.pid) for one in started]
    rounds = [[found[0]], [found[1]], []]
    monkeypatch.setattr(Namespace, "processes", lambda _: rounds.pop(0))
    assert Namespace("a", "", "").kill() == 2
    assert [one.poll() is not None for one in started] == [True, True]


def test_kill_that_leaves_something_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    started = subprocess.Popen(["sleep", "600"])
    process = psutil.Process(started.pid)
    monkeypatch.setattr(Namespace, "processes", lambda _: [process])
    with pytest.raises(RuntimeError, match=f"can't be killed: .{started.pid}"):
        Namespace("a", "", "").kill()
    assert started.poll() is not None
