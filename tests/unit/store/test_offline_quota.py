"""The offline quotas of a gateway, and the heartbeat that exchanges them."""

from __future__ import annotations

from typing import Any, cast

import pytest

from service.store.limit_windows import NOW
from service.store.offline_quota import OfflineQuotas
from service.store.redis_store import RedisStore
from service.store.store_interface import Account, Charge, Granted, StoreClaim
from tests.support.polling import until

AT_ONCE = Account("acme/concurrent", 10, NOW)


def test_offline_quota_unused_claim_is_reported_after_its_slice_is_forgotten() -> None:
    quotas = OfflineQuotas(0.5)
    claim = StoreClaim("c", (Charge(AT_ONCE, 1),))
    quotas.track(claim, 0.0)
    quotas.update([(AT_ONCE.name, 5, 10)], 0.0)
    granted = quotas.take(claim, 0)
    assert isinstance(granted, Granted)
    quotas.release_unused(granted, [0])
    # Redis comes back minutes later, and resizes the quotas first.
    assert quotas.plan(200.0) == [(AT_ONCE, 0, 0)]
    quotas.update([(AT_ONCE.name, 0, 10)], 200.0)
    quotas.release_unused(granted, [0])
    quotas.mark_delivered(granted, [0])
    assert quotas.plan(200.0) == []


class Client:
    """A Redis client that only shuts down."""

    async def leave(self) -> None:
        """Nothing is held."""

    async def close(self) -> None:
        """Nothing is open."""


async def test_heartbeat_after_an_error_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    store = RedisStore(cast(Any, Client()), share=0.1, lease_s=30, heartbeat_s=0.001)
    beats: list[int] = []

    async def beat() -> None:
        store.up = True
        beats.append(len(beats))
        if len(beats) == 2:
            raise KeyError("what nobody thought of")

    monkeypatch.setattr(store, "_heartbeat", beat)
    await store.start()
    try:
        await until(lambda: len(beats) > 3, "it is heard of again")
    finally:
        await store.stop()
