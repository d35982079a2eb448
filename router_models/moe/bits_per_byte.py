"""Computes bits per byte of a field's answers, and the share of a gain that a model retains.

Bits per byte are those of `router_models.experts.evaluate`: the answer's bits under the
model, given the prompt through the chat template, without the end of turn, over the
answer's UTF-8 bytes. Standard errors come from resampling groups of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from router_models.experts.conversation_packing import Conversation, tokenize
from router_models.experts.evaluate import RowScore, score
from router_models.experts.training_texts import Example

MAX_TOKENS = 256
"""Longer conversations are left out: a few hundred short ones say enough."""
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class GainRetention:
    """The share of an expert's gain over the base that a model retains on one field.

    `share` is 1 where it is as good as the expert, 0 where as the base; `share_error` its
    standard error over groups of rows, the three models resampled together. Both are NaN where
    the expert gains nothing.
    """

    rows: int
    base: float
    expert: float
    model: float
    share: float
    share_error: float


def conversations(
    examples: Sequence[Example], tokenizer: Any, *, max_tokens: int = MAX_TOKENS
) -> list[Conversation]:
    """Return the answered examples as token sequences. Longer examples are left out."""
    return tokenize((row for row in examples if row.answer), tokenizer, max_tokens=max_tokens)


def measure(model: Any, held_out: Sequence[Conversation]) -> list[RowScore]:
    """Compute the bits of each answer under a transformers model in its own dtype."""
    return score(model, held_out, bf16=False)


def per_byte(scores: Sequence[RowScore]) -> float:
    """Return bits per byte over all rows, or NaN without rows."""
    count = sum(row.bytes for row in scores)
    return sum(row.bits for row in scores) / count if count else float("nan")


def kept(
    base: Sequence[RowScore], expert: Sequence[RowScore], model: Sequence[RowScore], *, seed: int
) -> GainRetention:
    """Return the retained share of the expert's gain over the base, on the same rows."""
    names, group = np.unique(np.array([row.group for row in base]), return_inverse=True)
    bits = np.zeros((3, len(names)))
    for total, rows in zip(bits, (base, expert, model), strict=True):
        np.add.at(total, group, [row.bits for row in rows])
    # The bytes are the same for all three and cancel.
    draw = np.random.default_rng(seed)
    chosen = draw.integers(0, len(names), (_RESAMPLES, len(names)))
    share, error = float("nan"), float("nan")
    gained = bits[0].sum() - bits[1].sum()
    if gained:
        share = float((bits[0].sum() - bits[2].sum()) / gained)
        sums = bits[:, chosen].sum(axis=2)
        some = sums[0] != sums[1]
        shares = (sums[0] - sums[2])[some] / (sums[0] - sums[1])[some]
        error = float(shares.std(ddof=1))
    return GainRetention(
        rows=len(base),
        base=per_byte(base),
        expert=per_byte(expert),
        model=per_byte(model),
        share=share,
        share_error=error,
    )
