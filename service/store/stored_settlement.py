"""Settlements as bytes, so that they can be stored before they are delivered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from service.store.limit_windows import Window
from service.store.store_interface import (
    Account,
    Charge,
    Granted,
    Settlement,
    StoreClaim,
    UsageNote,
)


def dumps(settlements: Sequence[Settlement]) -> bytes:
    """Serialize settlements as JSON. They hold names of accounts and numbers, and no prompts."""
    return orjson.dumps([_to_json(settlement) for settlement in settlements])


def loads(data: bytes) -> list[Settlement]:
    """Parse settlements that `dumps` wrote."""
    return [_from_json(item) for item in orjson.loads(data)]


def _to_json(settlement: Settlement) -> dict[str, Any]:
    granted, note = settlement.granted, settlement.note
    lines = [
        {
            "account": line.account.name,
            "limit": line.account.limit,
            "window": [
                line.account.window.kind,
                line.account.window.length_ms,
                line.account.window.parts,
            ],
            "start_ms": start,
            "reserved": amount,
            "used": used,
        }
        for line, start, amount, used in zip(
            granted.claim.lines, granted.starts_ms, granted.amounts, settlement.used, strict=True
        )
    ]
    noted = None if note is None else [note.name, dict(note.counts), note.keep_s]
    return {"claim": granted.claim.id, "lines": lines, "note": noted}


def _from_json(item: dict[str, Any]) -> Settlement:
    lines = item["lines"]
    charges = tuple(
        Charge(Account(line["account"], line["limit"], Window(*line["window"])), line["reserved"])
        for line in lines
    )
    granted = Granted(
        StoreClaim(item["claim"], charges),
        0,
        tuple(line["reserved"] for line in lines),
        tuple(line["start_ms"] for line in lines),
    )
    noted = item["note"]
    note = None if noted is None else UsageNote(*noted)
    return Settlement(granted, tuple(line["used"] for line in lines), note)
