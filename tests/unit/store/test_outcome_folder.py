"""The folder of outcomes: tenants apart, modes, expiry, and a forgetting that lasts."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from service.store.outcome_folder import OutcomeFolder

DAY_S = 86_400.0
NOW_S = 1_800_000_000.0
NAMES = ["acme", "a/b", "..", ".", "a:b", "A", "a", "x" * 128]


@pytest.fixture
def folder(tmp_path: Path) -> OutcomeFolder:
    return OutcomeFolder(tmp_path / "outcomes")


def contents(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())


def test_rows_of_tenants_stay_apart_whatever_their_names(folder: OutcomeFolder) -> None:
    for name in NAMES:
        assert folder.add(name, {"of": name}, NOW_S)
    for name in NAMES:
        assert list(folder.rows(name)) == [(name, {"of": name})]
    assert {tenant for tenant, _ in folder.rows()} == set(NAMES)
    inside = [file for file in folder.path.rglob("*")]
    assert all(folder.path in file.parents for file in inside)
    assert not [p for p in folder.path.parent.iterdir() if p != folder.path]


def test_files_are_for_their_owner_only(folder: OutcomeFolder) -> None:
    folder.add("acme", {"prompt": "secret"}, NOW_S)
    folder.hash_of("secret")
    for path in [folder.path, *folder.path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("tenant", ["acme", None])
def test_forget_deletes_and_refuses_what_was_answered_before(
    folder: OutcomeFolder, tenant: str | None
) -> None:
    for name in ("acme", "other"):
        for day in range(3):
            folder.add(name, {"prompt": f"a secret of {name}"}, NOW_S - day * DAY_S)
    assert folder.forget(NOW_S + 1, tenant) == (3 if tenant else 6)
    assert list(folder.rows("acme")) == []
    assert len(list(folder.rows("other"))) == (3 if tenant else 0)
    assert b"a secret of acme" not in contents(folder.path)
    # A gateway that still evaluates an earlier request must not bring it back.
    assert not folder.add("acme", {"prompt": "late"}, NOW_S + 0.5)
    assert folder.add("acme", {"prompt": "new"}, NOW_S + 2)
    assert [row for _, row in folder.rows("acme")] == [{"prompt": "new"}]


def test_expire_deletes_the_days_beyond_retention(folder: OutcomeFolder) -> None:
    assert folder.expire(NOW_S, 30) == 0
    for day in (0, 29, 31, 400):
        folder.add("acme", {"day": day}, NOW_S - day * DAY_S)
    assert folder.expire(NOW_S, 30) == 2
    assert sorted(row["day"] for _, row in folder.rows()) == [0, 29]


def test_hash_is_stable_keyed_and_tells_prompts_apart(tmp_path: Path) -> None:
    one, other = OutcomeFolder(tmp_path / "a"), OutcomeFolder(tmp_path / "b")
    assert one.hash_of("hello") == OutcomeFolder(tmp_path / "a").hash_of("hello")
    assert one.hash_of("hello") != one.hash_of("hello ")
    assert one.hash_of("hello") != other.hash_of("hello")


def test_unfinished_last_line_is_left_out(folder: OutcomeFolder) -> None:
    folder.add("acme", {"a": 1}, NOW_S)
    (file,) = folder.path.rglob("*.jsonl")
    with file.open("ab") as end:
        end.write(b'{"a": ')
    assert [row for _, row in folder.rows()] == [{"a": 1}]
