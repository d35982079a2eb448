"""The audit log of refused keys and admin actions, which holds no key."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import orjson
import pytest

from service.errors import ConflictError
from service.gateway.audit_log import REFUSALS, RefusalLog
from service.telemetry.json_logging import JsonLines
from tests.support.in_process_service import ADMIN_KEY, chat, run_gateway, simulated

KEY = "a-key-of-the-tests-0123456789"


@contextmanager
def written_by(name: str) -> Iterator[list[dict[str, object]]]:
    """The lines of a logger, as they would be written."""
    found: list[dict[str, object]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(orjson.loads(JsonLines().format(record)))

    logger, handler = logging.getLogger(name), Kept()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def lines() -> Iterator[list[dict[str, object]]]:
    """The lines of the audit log, with nothing refused so far."""
    REFUSALS._allowance.clear()
    with written_by("coe.audit") as found:
        yield found


def test_audit_log_repeated_refusals_are_counted_and_not_each_written(
    lines: list[dict[str, object]],
) -> None:
    now_s = 0.0
    log = RefusalLog(lambda: now_s)
    for _ in range(1000):
        log.refused("unknown", {})
    log.refused("revoked", {}, key="k1", tenant="acme")
    assert len(lines) == 21
    assert {"reason": "revoked", "key": "k1", "tenant": "acme"}.items() <= lines[-1].items()
    now_s = 5.0
    for _ in range(10):
        log.refused("unknown", {})
    assert len(lines) == 26
    assert lines[21]["unsaid"] == 980


def test_audit_log_client_text_stays_on_one_short_line(lines: list[dict[str, object]]) -> None:
    headers = {b"x-request-id": b"a\nb", b"x-forwarded-for": b"1.2.3.4, " * 100}
    RefusalLog().refused("none", headers)
    assert "request_id" not in lines[0]
    assert len(str(lines[0]["client"])) <= 64


async def test_audit_log_has_a_line_for_each_admin_action_and_refused_key(
    lines: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_TESTS", KEY)
    given = simulated({"cpu": {"tokens": 1}}, keys={"ci": {"key_env": "KEY_OF_TESTS"}})
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    async with run_gateway(given) as s:
        status, _, made = await s.ask({"tenant": "acme"}, "/admin/keys", headers=admin)
        assert status == 200, made
        _, _, rotated = await s.ask({}, f"/admin/keys/{made['id']}/rotate", headers=admin)
        await s.ask({}, f"/admin/keys/{made['id']}/revoke", headers=admin)
        await s.ask({}, "/admin/keys/nobody/revoke", headers=admin)
        await s.ask({}, "/admin/reload", headers=admin)
        async with s.client.get(s.url + "/admin/keys", headers=admin) as reply:
            assert reply.status == 200
        acts = [line for line in lines if "act" in line]
        assert [(line["act"], line["outcome"], line.get("key")) for line in acts] == [
            ("POST /admin/keys", "200", made["id"]),
            (f"POST /admin/keys/{made['id']}/rotate", "200", made["id"]),
            (f"POST /admin/keys/{made['id']}/revoke", "200", made["id"]),
            ("POST /admin/keys/nobody/revoke", "key_not_found", None),
            ("POST /admin/reload", ConflictError.code, None),
        ]
        assert {line.get("tenant") for line in acts[:3]} == {"acme"}
        lines.clear()
        for headers in (
            {},
            {"authorization": "Bearer wrong-0123456789"},
            {"x-api-key": rotated["key"]},
        ):
            status, _, _ = await s.ask(chat(), headers=headers)
            assert status == 401
        await s.ask({}, "/admin/reload", headers={"authorization": f"Bearer {KEY}"})
        await s.ask({}, "/admin/reload")
        reasons = [line["reason"] for line in lines]
        assert reasons == ["none", "unknown", "revoked", "admin", "admin, none"]
        assert lines[2]["key"] == made["id"]
        written = orjson.dumps(lines).decode()
        for secret in (KEY, ADMIN_KEY, made["key"], rotated["key"], "wrong-0123456789"):
            assert secret not in written


async def test_access_log_names_tenant_and_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KEY_OF_TESTS", KEY)
    given = simulated(
        {"cpu": {"tokens": 1}},
        server={"access_log": True},
        tenants={"acme": {}},
        keys={"ci": {"key_env": "KEY_OF_TESTS", "tenant": "acme"}},
    )
    async with run_gateway(given) as s:
        with written_by("coe.access") as written:
            for body in (chat(), chat(model="nobody"), {"messages": "none"}):
                await s.ask(body, headers={"x-api-key": KEY})
    assert [(line["tenant"], line["key"]) for line in written] == [("acme", "ci")] * 3
    assert KEY not in str(written)
