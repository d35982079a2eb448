"""Traffic moves from the best expert to the next best where waiting costs more than the lead."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from service.config import Config
from tests.support.answer_gate import held_answers
from tests.support.in_process_service import chat, run_gateway
from tests.support.polling import until

# A lead of 10 points is worth 0.4 s at auto:fast, 2 s at auto and 12 s at auto:best.
_LEAD, _ROOM, _TOKENS, _STEP_MS = 0.1, 2, 6, 20
_REQUESTS = 30
_SIMULATED = {"decode_ms": _STEP_MS, "max_num_seqs": _ROOM, "tokens": _TOKENS}
CONFIG = Config.model_validate(
    {
        "experts": {
            "best": {"model": "m", "categories": ["general"], "quality": {"general": 0.9}},
            "next": {"model": "m", "quality": {"general": 0.9 - _LEAD}},
        },
        "pools": {
            "a": {"engine": "simulated", "experts": ["best"], "simulated": _SIMULATED},
            "b": {
                "engine": "simulated",
                "experts": ["next"],
                "simulated": {**_SIMULATED, "max_num_seqs": 256},
            },
        },
    }
)


@pytest.mark.parametrize(
    ("preset", "least", "most"),
    [
        # Some eight wait for 0.4 s, and two run.
        ("auto:fast", 3, 20),
        # All thirty are done after 1.5 s.
        ("auto:best", _REQUESTS, _REQUESTS),
    ],
)
async def test_auto_under_load_leaves_the_best_expert_when_waiting_outweighs_its_lead(
    preset: str, least: int, most: int
) -> None:
    async with run_gateway(CONFIG) as s:
        body = chat(model=preset, max_tokens=_TOKENS)
        # Pools measure their speed with the first answers.
        for expert in ("best", "next"):
            for _ in range(4):
                assert (await s.ask({**body, "model": expert}))[0] == 200
        told: Counter[str] = Counter()

        async def ask() -> None:
            status, headers, _ = await s.ask(body)
            assert status == 200
            told[headers["x-coe-expert"]] += 1

        # However long it takes until all of them are there, none makes room for another.
        with held_answers() as gate:
            asked = [asyncio.create_task(ask()) for _ in range(_REQUESTS)]
            pools = [pool.process.pool for pool in s.pools.values()]
            await until(lambda: sum(p.queued() for p in pools) == _REQUESTS, "all are there")
            gate.open()
            await asyncio.gather(*asked)
        assert least <= told["best"] <= most, told
        assert told.total() == _REQUESTS
