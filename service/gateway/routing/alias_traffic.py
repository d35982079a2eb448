"""Counts how requests by aliases end, rolls targets back, and shares that with other gateways.

A roll-back holds until the config is read again, or the admin restores the alias. Gateways with a
shared store follow the newest of both, whichever gateway it came from.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

import orjson

from service.broker.alias_rollback import AliasOutcome, Rollback, SharedTraffic
from service.config import Config
from service.config.aliases import resolve_aliases
from service.engine.engine_interface import Message, Send
from service.errors import CoeError, DeadlineExceededError, InfeasibleBoundsError, UnknownModelError
from service.gateway.request_record import RequestRecord
from service.store.record_names import join_name
from service.store.volatile_store import VolatileStore
from service.task_cancellation import cancel_and_wait
from service.telemetry import metric_declarations
from service.telemetry.metrics_registry import MetricsRegistry

log = logging.getLogger("coe.aliases")

_FOLLOW_S = 5.0
_KEPT_S = 30 * 86_400
# Statuses that say nothing of a target: whose key it is, what it may use, and how often it asks.
_NOT_THE_TARGET = frozenset({401, 403, 404, 408, 429})
# How refusals look in the APIs. JSON escapes quotes inside of texts, so these match only fields.
_REFUSAL = re.compile(
    rb'"finish_reason"\s*:\s*"content_filter"'
    rb'|"refusal"\s*:\s*"[^"]'
    rb'|"stop_reason"\s*:\s*"refusal"'
    rb'|"type"\s*:\s*"(?:refusal|response\.refusal\.\w+)"'
    rb'|"reason"\s*:\s*"content_filter"'
)
_WORDS = (b"refusal", b"content_filter")
# Longer than any match, so that one across two messages is found.
_OVERLAP = 64


class AliasTraffic:
    """The aliases of one config that share requests, with the outcomes of these.

    Args:
        config: The config.
        registry: Counts requests and roll-backs.
        store: The volatile store.
        shared: Whether other gateways use the same store.
        clock: Seconds since 1970, which all gateways agree on.
        after: The traffic of the config before, where that is of the same file. Its counts and
            roll-backs go on.
    """

    def __init__(
        self,
        config: Config,
        registry: MetricsRegistry,
        store: VolatileStore,
        *,
        shared: bool,
        clock: Callable[[], float] = time.time,
        after: AliasTraffic | None = None,
    ) -> None:
        resolved = resolve_aliases(config.aliases)
        self._traffic = {
            name: SharedTraffic(resolved[name].targets, config.aliases[name].rollback)
            for name, alias in resolved.items()
            if alias.shared_by == name
        }
        self._registry = registry
        self._store = store
        self._shared = shared
        self._clock = clock
        # When each alias was rolled back or restored last, by any gateway.
        self._changed_s = dict.fromkeys(self._traffic, 0.0)
        for name, traffic in self._traffic.items():
            before = after._traffic.get(name) if after is not None else None
            if before is None or after is None:
                continue
            if before.weights == traffic.weights and before.rule == traffic.rule:
                self._traffic[name] = before
                self._changed_s[name] = after._changed_s[name]
        self._follower: asyncio.Task[None] | None = None
        self._writes: set[asyncio.Task[None]] = set()

    async def start(self, *, anew: bool) -> None:
        """Begin to follow other gateways.

        Args:
            anew: Whether roll-backs of before are undone, because the config was read again.
        """
        if not self._shared or not self._traffic:
            return
        if anew:
            for alias in self._traffic:
                self._changed_s[alias] = self._clock()
                await self._write(alias)
        else:
            await self._read_all()
        self._follower = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Stop following."""
        await asyncio.gather(*self._writes)
        await cancel_and_wait(self._follower)

    def left_out(self, alias: str | None) -> Collection[str]:
        """The targets of an alias that were rolled back."""
        found = self._traffic.get(alias or "")
        return () if found is None else found.rolled_back

    def watch(self, record: RequestRecord, send: Send) -> Send:
        """Return a send that notes whether the answer is a refusal, where that counts."""
        counts = record.alias is not None and record.alias.shared_by is not None
        return RefusalSend(record, send) if counts else send

    def finished(self, record: RequestRecord) -> None:
        """Count a request that has ended, if it named an alias."""
        if (choice := record.alias) is None:
            return
        outcome = outcome_of(record)
        self._registry.add(
            metric_declarations.ALIAS_REQUESTS, 1, choice.alias, choice.target, outcome.value
        )
        alias = choice.shared_by
        if alias is None or (traffic := self._traffic.get(alias)) is None:
            return
        found = traffic.record(choice.target, outcome, record.tenant, self._clock())
        if found is not None:
            self._rolled_back(alias, choice.target, found)

    def _rolled_back(self, alias: str, target: str, why: Rollback) -> None:
        self._registry.add(metric_declarations.ALIAS_ROLLBACKS, 1, alias, target, why.reason)
        log.error("alias %s: target %s was rolled back: %s", alias, target, why.text)
        self._changed(alias)

    def _changed(self, alias: str) -> None:
        self._changed_s[alias] = self._clock()
        if self._shared:
            task = asyncio.create_task(self._write(alias))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)

    def restore(self, alias: str) -> list[str]:
        """Give the targets of an alias their requests again; return those that had none.

        Raises:
            UnknownModelError: No such alias shares requests.
        """
        if (traffic := self._traffic.get(alias)) is None:
            names = ", ".join(self._traffic) or "none"
            raise UnknownModelError(
                f"no alias {alias[:128]!r} shares requests; those that do: {names}"
            )
        restored = traffic.restore()
        if restored:
            log.warning("alias %s: %s restored", alias, ", ".join(restored))
        self._changed(alias)
        return restored

    def refresh_metrics(self) -> None:
        """Put the gauges of this config's aliases."""
        self._registry.forget(metric_declarations.ALIAS_ROLLED_BACK)
        for alias, traffic in self._traffic.items():
            for target in traffic.weights:
                self._registry.put(
                    metric_declarations.ALIAS_ROLLED_BACK,
                    target in traffic.rolled_back,
                    alias,
                    target,
                )

    def to_json(self) -> dict[str, Any]:
        """Each alias that shares requests: its targets, what this gateway counted, roll-backs."""
        return {
            alias: {
                target: {
                    "weight": weight,
                    **asdict(traffic.tally(target)),
                    "baseline": target == traffic.baseline,
                    "rolled_back": None
                    if (why := traffic.rolled_back.get(target)) is None
                    else {**asdict(why), "text": why.text},
                }
                for target, weight in traffic.weights.items()
            }
            for alias, traffic in self._traffic.items()
        }

    # --- other gateways

    def _name(self, alias: str) -> str:
        traffic = self._traffic[alias]
        made = orjson.dumps([sorted(traffic.weights.items()), traffic.rule.model_dump()])
        return join_name("alias", alias, hashlib.blake2b(made, digest_size=8).hexdigest())

    async def _write(self, alias: str) -> None:
        traffic = self._traffic[alias]
        value = {
            "at_s": self._changed_s[alias],
            "rolled_back": {name: asdict(why) for name, why in traffic.rolled_back.items()},
        }
        with contextlib.suppress(CoeError):
            await self._store.put(self._name(alias), orjson.dumps(value), ttl_s=_KEPT_S)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_FOLLOW_S)
            await self._read_all()

    async def _read_all(self) -> None:
        for alias in self._traffic:
            with contextlib.suppress(CoeError):
                self._adopt(alias, await self._store.get(self._name(alias)))

    def _adopt(self, alias: str, value: bytes | None) -> None:
        """Take over what another gateway has decided later than this one."""
        try:
            told = orjson.loads(value or b"{}")
            at_s = float(told.get("at_s", 0.0))
            rolled_back = {
                str(target): Rollback(**why) for target, why in told.get("rolled_back", {}).items()
            }
        except (orjson.JSONDecodeError, AttributeError, TypeError, ValueError):
            return
        traffic = self._traffic[alias]
        if at_s <= self._changed_s[alias]:
            return
        self._changed_s[alias] = at_s
        before = set(traffic.rolled_back)
        traffic.restore()
        traffic.rolled_back = {
            target: why for target, why in rolled_back.items() if target in traffic.weights
        }
        for target in traffic.rolled_back.keys() - before:
            why = traffic.rolled_back[target]
            log.error(
                "alias %s: target %s was rolled back by another gateway: %s",
                alias,
                target,
                why.text,
            )


def outcome_of(record: RequestRecord) -> AliasOutcome:
    """How a request has ended, as far as the target of its alias is to blame."""
    code = record.fault or record.outcome
    if code == DeadlineExceededError.code and record.own_deadline:
        return AliasOutcome.UNCOUNTED
    if record.ours:
        return AliasOutcome.ERROR
    if record.outcome == "client_gone" or code == InfeasibleBoundsError.code:
        return AliasOutcome.UNCOUNTED
    if record.status in _NOT_THE_TARGET:
        return AliasOutcome.UNCOUNTED
    if record.status >= 400 or record.refused:
        return AliasOutcome.REFUSED
    # An answer of the cache calls nobody.
    return AliasOutcome.OK if record.attempts else AliasOutcome.UNCOUNTED


class RefusalSend:
    """An ASGI send that forwards an answer, and notes in its record whether it is a refusal."""

    def __init__(self, record: RequestRecord, send: Send) -> None:
        self._record = record
        self._send = send
        self._tail = b""

    async def __call__(self, message: Message) -> None:
        body = message.get("body", b"")
        if body and not self._record.refused:
            seen = self._tail + body
            self._tail = seen[-_OVERLAP:]
            if any(word in seen for word in _WORDS):
                self._record.refused = _REFUSAL.search(seen) is not None
        await self._send(message)
