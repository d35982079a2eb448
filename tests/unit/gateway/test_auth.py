"""API keys: storage, identification, and listening without any."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from service.cli import cli
from service.config import Config
from service.errors import (
    ConfigError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    StoreUnavailableError,
    UnauthorizedError,
    UnknownModelError,
)
from service.gateway.api_key_requests import NewKey, new_key_record
from service.gateway.auth import Authenticator, any_key, configured
from service.gateway.store_setup import keys_marker
from service.launch.supervisor import _restrict_host
from service.store.api_keys import (
    FileKeyRepository,
    KeyRecord,
    KeyService,
    KeyTable,
    StoreKeyRepository,
    digest_of,
    new_key,
)
from service.store.locked_file import LockedFile
from service.store.memory_store import MemoryStore
from service.types import NOBODY, Limits

WANTED = KeyRecord("", "acme", "", limits=Limits(requests_per_min=5), experts=("general",))


def config(**sections: Any) -> Config:
    return Config.model_validate(
        {
            "experts": {"general": {"model": "m"}, "math": {"model": "n"}},
            "pools": {"cpu": {"engine": "simulated"}},
            **sections,
        }
    )


def books(tmp_path: Path) -> list[Any]:
    return [FileKeyRepository(tmp_path / "deep" / "keys.jsonl"), StoreKeyRepository(MemoryStore())]


@pytest.mark.parametrize("which", [0, 1])
async def test_keys_create_rotate_and_revoke_change_what_is_accepted(
    tmp_path: Path, which: int
) -> None:
    book = books(tmp_path)[which]
    keys = KeyService(book)
    empty = await book.version()
    record, key = await keys.create(WANTED, 100.0)
    assert await book.version() != empty
    assert (await keys.records()) == [record]
    table = KeyTable(await book.load())
    assert table.find(key, 101.0) == record
    assert table.find(key + "x", 101.0) is None
    assert record.limits == WANTED.limits
    rotated, second = await keys.rotate(record.id, 200.0, 50.0)
    table = KeyTable(await book.load())
    assert table.find(key, 249.0) == table.find(second, 249.0) == rotated
    assert table.find(key, 251.0) is None
    revoked = await keys.revoke(record.id, 300.0)
    assert revoked.state(300.0) == "revoked"
    assert (await keys.revoke(record.id, 400.0)).revoked_s == 300.0
    with pytest.raises(ConflictError):
        await keys.rotate(record.id, 500.0, 0)
    with pytest.raises(UnknownModelError):
        await keys.revoke("nobody", 1.0)


async def test_file_book_stores_digests_only_in_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    _, key = await KeyService(FileKeyRepository(path)).create(WANTED, 1.0)
    assert key not in path.read_text()
    assert key.rpartition("-")[2] not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert digest_of(key) in path.read_text()


def test_key_record_state_and_public_view_without_digest() -> None:
    record = replace(WANTED, id="x", digest="d" * 64, expires_s=10.0)
    assert [record.state(now_s) for now_s in (9.9, 10.0)] == ["active", "expired"]
    wire = record.to_public(11.0)
    assert wire["state"] == "expired"
    assert not any("digest" in name for name in wire)


async def test_identify_returns_the_key_s_tenant_or_raises_unauthorized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KEY_A", "0123456789abcdef")
    given = config(
        keys={"a": {"tenant": "acme", "key_env": "KEY_A", "experts": ["general", "math"]}},
        tenants={"acme": {"priority": "low", "weight": 3, "experts": ["math"]}},
    )
    book = StoreKeyRepository(MemoryStore())
    _, made = await KeyService(book).create(replace(WANTED, priority="high", expires_s=1.0), 0.5)
    ring = Authenticator(given, book)
    await ring.look()
    tenant = ring.identify({b"authorization": b"Bearer 0123456789abcdef"})
    assert (tenant.name, tenant.key, tenant.priority, tenant.weight) == ("acme", "a", "low", 3)
    assert tenant.experts == frozenset({"math"})
    for headers in (
        {},
        {b"authorization": b"Basic 0123456789abcdef"},
        {b"authorization": b"Bearer \xff\xfe"},
        {b"x-api-key": b"0123456789abcdeX"},
        {b"x-api-key": made.encode()},
    ):
        with pytest.raises(UnauthorizedError) as caught:
            ring.identify(headers)
        assert "0123456789" not in caught.value.message


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"{}",
        b'{"limits": {}}',
        b'{"id":"x","tenant":"t","digest":"no hex","limits":{},"experts":null}',
        b'{"id":"x","tenant":"t","digest":"00","limits":{},"experts":null,"of_a_later":1}',
    ],
)
async def test_authenticator_damaged_record_raises_at_start_and_keeps_known_keys(
    tmp_path: Path, line: bytes
) -> None:
    path = tmp_path / "keys.jsonl"
    book = FileKeyRepository(path)
    _, key = await KeyService(book).create(replace(WANTED, experts=None), 1.0)
    ring = Authenticator(config(), book)
    await ring.look()
    whole = path.read_bytes()
    path.write_bytes(whole + line + b"\n")
    with pytest.raises(ConfigError, match=r"keys\.jsonl: a record of an API key is damaged"):
        await any_key(config(), book)
    await ring.look()
    assert ring.identify({b"x-api-key": key.encode()}).name == "acme"
    path.unlink()
    await KeyService(book).create(WANTED, 2.0)
    await ring.look()
    with pytest.raises(UnauthorizedError):
        ring.identify({b"x-api-key": key.encode()})


def test_configured_key_too_short_raises_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_A", "short-key")
    with pytest.raises(ConfigError) as caught:
        configured(config(keys={"a": {"key_env": "KEY_A"}}))
    assert "short-key" not in caught.value.message


async def test_authenticator_needed_when_listening_beyond_loopback() -> None:
    book = StoreKeyRepository(MemoryStore())
    for server, needed in (
        ({}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", "allow_unauthenticated": True}, False),
    ):
        ring = Authenticator(config(server=server), book)
        await ring.look()
        assert ring.needed is needed
    assert ring.identify({}) == NOBODY


async def test_identify_before_the_keys_are_loaded_raises_store_unavailable() -> None:
    ring = Authenticator(config(), StoreKeyRepository(MemoryStore()))
    with pytest.raises(StoreUnavailableError):
        ring.identify({})


async def test_authenticator_store_that_came_back_empty_accepts_nobody(tmp_path: Path) -> None:
    """Emptied, or another one in its place: what was told once holds until the next start."""
    store = MemoryStore()
    book = StoreKeyRepository(store)
    _, key = await KeyService(book).create(WANTED, 1.0)
    ring = Authenticator(config(), book, marker=tmp_path / "home" / "keys.needed")
    await ring.look()
    assert ring.identify({b"x-api-key": key.encode()}).name == "acme"
    store._tables.clear()
    store._versions.clear()
    for _ in range(2):
        await ring.look()
        for headers in ({}, {b"x-api-key": key.encode()}):
            with pytest.raises(UnauthorizedError):
                ring.identify(headers)
    heir = Authenticator(config(), book, after=ring)
    await heir.look()
    with pytest.raises(UnauthorizedError):
        heir.identify({})


async def test_authenticator_started_after_its_keys_were_lost_accepts_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("coe"), "propagate", True)
    given = config(store={"keys_file": str(tmp_path / "keys.jsonl")})
    book, marker = FileKeyRepository(tmp_path / "keys.jsonl"), keys_marker(given)
    assert not await any_key(given, book, marker)
    await KeyService(book).create(WANTED, 1.0)
    await Authenticator(given, book, marker=marker).look()
    (tmp_path / "keys.jsonl").unlink()
    assert await any_key(given, book, marker)
    ring = Authenticator(given, book, marker=marker)
    await ring.look()
    with pytest.raises(UnauthorizedError):
        ring.identify({})
    assert f"remove {marker} and start again" in caplog.text
    marker.unlink()
    ring = Authenticator(given, book, marker=marker)
    await ring.look()
    assert ring.identify({}) == NOBODY


def test_keys_marker_differs_by_store_and_ignores_the_password() -> None:
    urls = ["redis://a:1/0", "redis://a:1/1", "redis://b:1/0"]
    markers = [keys_marker(config(store={"kind": "redis", "url": url})) for url in urls]
    assert len(set(markers)) == 3
    assert keys_marker(config(store={"kind": "redis", "url": urls[0]})) == markers[0]


async def test_require_keys_without_any_key_accepts_nobody() -> None:
    given, book = config(server={"require_keys": True}), StoreKeyRepository(MemoryStore())
    assert await any_key(given, book)
    ring = Authenticator(given, book)
    await ring.look()
    with pytest.raises(UnauthorizedError):
        ring.identify({})


async def test_identify_key_of_a_tenant_missing_in_the_config_raises_forbidden() -> None:
    book = StoreKeyRepository(MemoryStore())
    _, key = await KeyService(book).create(WANTED, 1.0)
    _, other = await KeyService(book).create(replace(WANTED, tenant="default"), 1.0)
    for tenants, allowed in (({}, True), ({"acme": {}}, True), ({"acne": {}}, False)):
        ring = Authenticator(config(tenants=tenants), book)
        await ring.look()
        if allowed:
            assert ring.identify({b"x-api-key": key.encode()}).name == "acme"
        else:
            with pytest.raises(ForbiddenError, match="tenant of this API key is not in the config"):
                ring.identify({b"x-api-key": key.encode()})
        assert ring.identify({b"x-api-key": other.encode()}).name == "default"


def test_record_of_tenant_missing_in_the_config_raises_with_a_suggestion() -> None:
    given = config(tenants={"acme": {"requests_per_min": 5}})
    for tenant in ("acme", "default"):
        assert new_key_record(given, NewKey(tenant=tenant), 1.0).tenant == tenant
    with pytest.raises(
        InvalidRequestError, match=r"no tenant 'acne'; did you mean 'acme'\? tenants: "
    ):
        new_key_record(given, NewKey(tenant="acne"), 1.0)
    assert new_key_record(config(), NewKey(tenant="acne"), 1.0).tenant == "acne"


@pytest.mark.parametrize("which", [0, 1])
async def test_revoke_during_concurrent_rotations_stays_revoked(tmp_path: Path, which: int) -> None:
    keys = KeyService(books(tmp_path)[which])
    for _ in range(10):
        made, _ = await keys.create(WANTED, 1.0)
        await asyncio.gather(
            *(keys.rotate(made.id, 2.0, 60.0) for _ in range(3)),
            keys.revoke(made.id, 2.0),
            *(keys.rotate(made.id, 2.0, 60.0) for _ in range(3)),
            return_exceptions=True,
        )
        after = {record.id: record for record in await keys.records()}[made.id]
        assert after.state(3.0) == "revoked"


async def test_file_book_lock_held_elsewhere_does_not_block_the_loop(tmp_path: Path) -> None:
    book = FileKeyRepository(tmp_path / "keys.jsonl")
    made, _ = await KeyService(book).create(WANTED, 1.0)
    with LockedFile(tmp_path / "keys.jsonl").locked():
        revoking = asyncio.create_task(KeyService(book).revoke(made.id, 2.0))
        await asyncio.sleep(0.05)  # the loop runs on
        assert not revoking.done()
    assert (await revoking).revoked_s == 2.0


def test_supervisor_without_keys_listens_on_loopback_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        given = config(server={"host": host})
        assert _restrict_host(given)[0].server.host == "127.0.0.1"
    output = capsys.readouterr().err
    assert "no API key yet" in output
    assert "listening on 127.0.0.1 only, not on 0.0.0.0" in output
    opened = config(server={"host": "0.0.0.0", "allow_unauthenticated": True})
    assert _restrict_host(opened)[0].server.host == "0.0.0.0"
    assert "warning" in capsys.readouterr().err
    keyed = config(server={"host": "0.0.0.0"}, keys={"a": {"sha256": "0" * 64}})
    assert _restrict_host(keyed)[0].server.host == "0.0.0.0"


def test_keys_command_without_a_service_manages_the_keys_file(tmp_path: Path) -> None:
    path = tmp_path / "coe.json"
    given = json.loads(config(store={"keys_file": "./keys.jsonl"}).model_dump_json())
    path.write_text(json.dumps(given))

    def run(*arguments: str) -> str:
        ran = CliRunner().invoke(cli, ["keys", "-c", str(path), *arguments])
        assert ran.exit_code == 0, ran.output
        return ran.stdout

    limits = ["--requests-per-min", "9", "--budget", "2.5", "--period", "month"]
    key = run("create", "--tenant", "acme", "--expires", "90d", *limits).strip()
    (one,) = json.loads(run("list", "--json"))["keys"]
    assert (one["tenant"], one["state"]) == ("acme", "active")
    assert (one["limits"]["budget"], one["limits"]["period"]) == (2.5, "month")
    assert "9 requests/min" in run("list")
    assert run("rotate", one["id"], "--grace", "1h").strip() != key
    assert "revoked" in run("revoke", one["id"])
    ran = CliRunner().invoke(cli, ["keys", "-c", str(path), "create", "--expires", "soon"])
    assert ran.exit_code != 0


def test_new_key_is_unique_long_and_matches_its_digest() -> None:
    made = [new_key() for _ in range(100)]
    assert len({key for _, key, _ in made}) == 100
    assert all(len(key) > 50 and digest == digest_of(key) for _, key, digest in made)


async def test_on_behalf_is_the_tenant_while_its_key_is_valid(tmp_path: Path) -> None:
    book = books(tmp_path)[1]
    keys = KeyService(book)
    given = config(tenants={"acme": {"priority": "high"}})
    authenticator = Authenticator(given, book)
    await authenticator.look()
    # No key is needed yet, and none was shown when the work was asked for.
    assert authenticator.on_behalf(NOBODY.name, "") == NOBODY
    record, key = await keys.create(WANTED, 100.0)
    await authenticator.look()
    tenant = authenticator.on_behalf("acme", record.id)
    assert tenant == authenticator.identify({b"authorization": f"Bearer {key}".encode()})
    assert (tenant.name, tenant.key, tenant.priority) == ("acme", record.id, "high")
    # A rotation keeps the key's id.
    await keys.rotate(record.id, 200.0, 0.0)
    await authenticator.look()
    assert authenticator.on_behalf("acme", record.id).key == record.id
    for name, key_id in (("other", record.id), ("acme", "nobody"), (NOBODY.name, "")):
        with pytest.raises(UnauthorizedError):
            authenticator.on_behalf(name, key_id)
    await keys.revoke(record.id, 300.0)
    await authenticator.look()
    with pytest.raises(UnauthorizedError):
        authenticator.on_behalf("acme", record.id)
