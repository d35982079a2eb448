"""Computes the inputs of a mixture's gates: a dense expert's hidden states on its own texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from router_models.experts.answer_logits import answer_logits
from router_models.experts.conversation_packing import (
    Conversation,
    pack,
    shared_beginning,
    tokenize,
)
from router_models.experts.training_texts import Example
from router_models.moe.gate_fit import Moments

_ROW_TOKENS = 768


def moments(model: Any, texts: Sequence[Conversation], tokenizer: Any) -> tuple[Moments, int]:
    """Return the moments of each FFN's inputs over the expert's texts, and the number of tokens.

    Prompts and answers have equal weight, independent of their lengths. The tokens with which every
    conversation begins (the template's system prompt) do not depend on the field and are left out.

    Raises:
        ValueError: There are no texts.
    """
    if not texts:
        raise ValueError("no texts")
    layers = model.model.layers
    hidden = model.config.hidden_size
    second = torch.zeros(2, len(layers), hidden, hidden, dtype=torch.float64)
    first = torch.zeros(2, len(layers), hidden, dtype=torch.float64)
    tokens = torch.zeros(2, dtype=torch.float64)
    parts: tuple[torch.Tensor, ...] = ()

    def tap(layer: int) -> Any:
        def read(_: Any, inputs: tuple[torch.Tensor]) -> None:
            for side, positions in enumerate(parts):
                x = inputs[0][0][positions]
                second[side, layer] += (x.T @ x).double()
                first[side, layer] += x.sum(dim=0).double()

        return read

    hooks = [layer.mlp.register_forward_pre_hook(tap(i)) for i, layer in enumerate(layers)]
    beginning = template_beginning(tokenizer)
    try:
        with torch.no_grad():
            for row in pack(texts, beginning, row_tokens=_ROW_TOKENS):
                # A token that predicts an answer's token counts as part of the answer.
                answer = torch.zeros(len(row.token_ids), dtype=torch.bool)
                answer[torch.from_numpy(row.predictors)] = True
                parts = (torch.from_numpy(row.segments != 0) & ~answer, answer)
                tokens += torch.stack([positions.sum() for positions in parts])
                answer_logits(model, row)
    finally:
        for hook in hooks:
            hook.remove()
    share = 0.5 / tokens
    own = Moments(
        torch.einsum("slij,s->lij", second, share).numpy(),
        torch.einsum("sli,s->li", first, share).numpy(),
    )
    return own, int(tokens.sum())


def template_beginning(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens with which the chat template begins every prompt."""
    anything = [Example(prompt, "", "") for prompt in ("A", "7", "zebra", "¿?")]
    return shared_beginning(tokenize(anything, tokenizer, max_tokens=1 << 20))
