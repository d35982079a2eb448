"""Environments of other gateways: made once, and again when what they hold changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.routers import peer_environments
from loadtests.routers.peer_environments import (
    CannotInstallError,
    NodePackage,
    PythonPackage,
    environments_folder,
    made,
)
from loadtests.routers.peers import PEERS, Site


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class _Counted(PythonPackage):
    installs = 0

    def into(self, folder: Path) -> None:
        self.installs += 1
        (folder / "file").write_text("x")


def test_made_installs_once_and_again_for_other_overrides() -> None:
    first, second = _Counted("p", "1.0"), _Counted("p", "1.0", ["q==2"])
    folder = made("peer", first)
    assert made("peer", first) == folder
    assert first.installs == 1
    assert made("peer", second) == folder
    assert second.installs == 1
    assert (folder / "file").read_text() == "x"
    assert folder.is_relative_to(environments_folder())


def test_made_after_a_failed_installation_tries_again() -> None:
    class Failing(_Counted):
        def into(self, folder: Path) -> None:
            super().into(folder)
            if self.installs == 1:
                raise CannotInstallError("no index")

    package = Failing("p", "1.0")
    with pytest.raises(CannotInstallError, match="no index"):
        made("peer", package)
    made("peer", package)
    assert package.installs == 2


def test_node_package_without_npm_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peer_environments.shutil, "which", lambda name: None)
    with pytest.raises(CannotInstallError, match=r"@x/y needs node and npm"):
        NodePackage("@x/y", "1.0").into(tmp_path)


def test_a_failed_installation_says_what_and_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "npm"
    program.write_text("#!/bin/sh\necho no such host; exit 7\n")
    program.chmod(0o755)
    monkeypatch.setattr(peer_environments.shutil, "which", lambda name: str(program))
    with pytest.raises(CannotInstallError, match=r"@x/y 1\.0 can't be installed.*no such host"):
        NodePackage("@x/y", "1.0").into(tmp_path)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_every_peer_is_pinned_and_listens_where_it_is_asked(peer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    site = Site(8101, 8102, 8103, "fake", "sk-x", tmp_path)
    command = " ".join(peer.command(Path("/env"), site))
    assert "8101" in command
    told = command + str(peer.headers(site))
    written = "".join(path.read_text() for path in tmp_path.glob("*.yaml"))
    assert "http://127.0.0.1:8103" in told + written
    assert peer.package.version[0].isdigit()
    assert peer.target(site).request({}).count(b"authorization: Bearer sk-x\r\n") == 1
