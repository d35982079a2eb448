"""The shared secret of gateways and pools: its file, and how it is compared."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from service.rpc import auth


def test_a_secret_is_its_owner_s_alone_and_new_each_time(tmp_path: Path) -> None:
    path = tmp_path / "run" / "secret"
    before = os.umask(0)
    try:
        first = auth.make_secret(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        path.chmod(0o644)
        second = auth.make_secret(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert auth.read_secret(path) == second != first
    assert len(second) >= 43


def test_a_link_in_the_secret_s_place_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "secret").symlink_to(victim)
    auth.make_secret(tmp_path / "secret")
    assert victim.read_text() == "untouched"


def test_secrets_are_compared_whole() -> None:
    assert auth.same(b"abc", b"abc")
    assert not auth.same(b"ab", b"abc")
    assert not auth.same(b"", b"abc")
