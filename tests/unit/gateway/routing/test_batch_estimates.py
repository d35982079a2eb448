"""Beginnings of prompts, by which the lines of a batch are ordered."""

from __future__ import annotations

import random
import sys
from itertools import pairwise

import orjson
import pytest

from service.gateway.request.parsing import parse_request
from service.gateway.routing.batch_estimates import _beginning


def beginning(system: str, question: str) -> str:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    body = orjson.dumps({"messages": messages})
    return _beginning(parse_request("/v1/chat/completions", body, {}, 1000))


def test_beginnings_sort_prompts_of_one_system_prompt_together() -> None:
    rng = random.Random(3)
    systems = [f"You answer as {name}. " + "Mind the rules. " * 40 for name in ("a", "b", "c")]
    asked = [(system, f"question {number}") for number in range(20) for system in systems]
    rng.shuffle(asked)
    found = sorted((beginning(*each), each[0]) for each in asked)
    order = [system for _, system in found]
    assert sum(a != b for a, b in pairwise(order)) == len(systems) - 1
    # Longer parts in common are nearer to each other.
    near, far = beginning(systems[0], "x"), beginning(systems[0][:300], "x")
    assert near[:8] == far[:8]
    assert near != far


@pytest.mark.parametrize("character", ["a", "é", "😀"])
def test_beginning_is_short_whatever_the_prompt(character: str) -> None:
    assert sys.getsizeof(beginning(character * 100_000, "x" * 100_000)) < 400
    assert beginning("", "") != beginning("", character)
