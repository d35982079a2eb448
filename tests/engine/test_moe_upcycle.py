"""An upcycled mixture in vLLM answers as transformers' Mixtral does on the same files.

And one whose experts change nothing says what the dense base says. One engine: the two are of
one family and exchanged in it.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from router_models.moe import upcycle
from service.engine.vllm.swapping_engine import Weights
from tests.support import tiny_dense_family as family
from tests.support.engine.real_engines import ENVIRONMENT, Swapping, greedy

pytestmark = [
    pytest.mark.engine,
    # vLLM's and torch's own.
    pytest.mark.filterwarnings("ignore"),
]
_NAMES = ("sums", "law")
_PROMPT = [ord(letter) % 250 for letter in "what is 12 + 30, and who may know it?"]
_TOKENS = 24


def _make(root: Path, name: str, size: float) -> Path:
    for seed, expert in enumerate(_NAMES):
        family.adapter(root / name / expert, "base", seed + 1, size=size)
    experts = {expert: root / name / expert for expert in _NAMES}
    work = upcycle.plan(root / "base", experts, root / "texts")
    upcycle.build(work, root / name / "moe", top_k=2)
    return root / name / "moe"


async def test_upcycled_model_in_the_engine_equals_transformers(tmp_path: Path) -> None:
    os.environ.update(ENVIRONMENT)
    family.base(tmp_path / "base")
    family.texts(tmp_path / "texts", general="abcdefgh ", sums="0123456789+=", law="QRSTUVWX")
    changed = await asyncio.to_thread(_make, tmp_path, "changed", 1.0)
    unchanged = await asyncio.to_thread(_make, tmp_path, "unchanged", 0.0)
    weights = {"changed": Weights(str(changed)), "unchanged": Weights(str(unchanged))}
    engine = Swapping("changed", weights, {})
    try:
        await engine.start()
        first = await _said(engine, "changed")
        await engine.load_to_host("unchanged")
        assert (await engine.swap_in("unchanged")).ok
        second = await _said(engine, "unchanged")
    finally:
        await engine.stop()
    _hold(first, changed)
    _hold(second, unchanged)
    _hold(second, tmp_path / "base")
    with pytest.raises(AssertionError):
        _hold(first, tmp_path / "base")


async def _said(engine: Any, expert: str) -> tuple[list[int], list[float]]:
    """Greedy tokens and the logarithm of each one's probability."""
    choice = await greedy(engine, expert, _PROMPT, _TOKENS, logprobs=1)
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def _hold(answer: tuple[list[int], list[float]], folder: Path) -> None:
    """The same tokens are the most probable ones in transformers, and as probable."""
    from transformers import AutoModelForCausalLM

    tokens, logs = answer
    assert len(tokens) == len(logs) == _TOKENS
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True
    ).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([_PROMPT + tokens])).logits[0]
    logprobs = torch.log_softmax(logits[len(_PROMPT) - 1 : -1], dim=-1)
    own = logprobs[torch.arange(_TOKENS), torch.tensor(tokens)]
    torch.testing.assert_close(own, torch.tensor(logs), rtol=0, atol=1e-3)
    # Equal ones aside, these are the greedy choices.
    assert bool((logprobs.max(dim=-1).values - own <= 1e-3).all())
