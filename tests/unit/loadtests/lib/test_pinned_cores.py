"""Cores of what is measured and of what measures."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from loadtests.lib import pinned_cores
from loadtests.lib.pinned_cores import check_pinned, pinned, two_cores

_CORES = sorted(os.sched_getaffinity(0))


def test_pinned_holds_for_children_and_ends() -> None:
    with pinned(_CORES[-1]):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert os.sched_getaffinity(0) == set(_CORES)
        check_pinned(child.pid, _CORES[-1])
        with pytest.raises(RuntimeError, match=r"may use cores .*, not 999"):
            check_pinned(child.pid, 999)
    finally:
        child.communicate(b"\n")


def test_two_cores_of_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_cores.os, "sched_getaffinity", lambda pid: {3})
    with pytest.raises(RuntimeError, match="one core is not enough"):
        two_cores()


def test_two_cores_of_several_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_cores.os, "sched_getaffinity", lambda pid: {2, 5, 7})
    assert two_cores() == (2, 7)
