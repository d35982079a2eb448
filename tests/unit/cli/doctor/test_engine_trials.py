"""The judgement of what capture saw in a trial."""

from __future__ import annotations

import numpy as np
import pytest

from service.cli.doctor.engine_trials import _capture_fault, _SampleCollector, prompts
from service.engine.engine_interface import RoutingSample

EXPERTS, TOP_K, BARRED, LAYERS = 8, 2, 3, 2
# Two times the prompts, each with an answer whose last token is not routed.
TOKENS = 2 * sum(len(prompt) + 15 for prompt in prompts())


def sample(expert: str, tokens: int, *, barred: int = 0, more: int = 0) -> RoutingSample:
    load = np.zeros((LAYERS, EXPERTS), np.int64)
    load[:, BARRED:] = tokens * TOP_K // (EXPERTS - BARRED)
    load[:, -1] += tokens * TOP_K - load.sum(axis=1)
    load[:, -1] -= barred
    load[:, 0] += barred
    load[1, -1] += more
    return RoutingSample(expert, (0, 1), EXPERTS, TOP_K, tokens, load)


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        ([("plain", TOKENS), ("masked", TOKENS)], None),
        ([("plain", TOKENS - 40), ("masked", TOKENS), ("plain", 40)], None),
        ([("plain", TOKENS)], "no choice of masked was seen"),
        ([("plain", TOKENS - 1), ("masked", TOKENS)], "plain: "),
        ([("plain", TOKENS), ("masked", TOKENS, 1)], "masked routed experts were chosen"),
        ([("plain", TOKENS, 5), ("masked", TOKENS)], None),
        ([("plain", TOKENS), ("masked", TOKENS, 0, 1)], "masked: "),
    ],
)
def test_capture_fault_needs_every_choice_and_no_masked_one(
    samples: list[tuple[str, int] | tuple[str, int, int, int]], why: str | None
) -> None:
    watch = _SampleCollector()
    watch.on_routing_sample(RoutingSample("plain", (0, 1), EXPERTS, TOP_K))  # as at a start
    for name, tokens, *rest in samples:
        barred, more = (*rest, 0, 0)[:2]
        watch.on_routing_sample(sample(name, tokens, barred=barred, more=more))
    found = _capture_fault(watch, TOP_K, BARRED)
    assert found == why if why is None else why in str(found)
