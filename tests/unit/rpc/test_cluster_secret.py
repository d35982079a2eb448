"""The shared secret of gateways and pools: its file, and how it is compared."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from service.rpc import cluster_secret


def test_make_secret_is_readable_by_its_owner_only_and_new_each_time(tmp_path: Path) -> None:
    path = tmp_path / "run" / "secret"
    before = os.umask(0)
    try:
        first = cluster_secret.make_secret(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        path.chmod(0o644)
        second = cluster_secret.make_secret(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert cluster_secret.read_secret(path) == second != first
    assert len(second) >= 43


def test_make_secret_does_not_follow_a_symlink(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "secret").symlink_to(victim)
    cluster_secret.make_secret(tmp_path / "secret")
    assert victim.read_text() == "untouched"


def test_same_compares_whole_secrets() -> None:
    assert cluster_secret.same(b"abc", b"abc")
    assert not cluster_secret.same(b"ab", b"abc")
    assert not cluster_secret.same(b"", b"abc")
