"""Owns what the gates of a mixture will see: a dense expert's hidden states on its own texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from router_models.experts.data import Example
from router_models.experts.forward import answer_logits
from router_models.experts.packing import Conversation, pack, shared_beginning, tokenize
from router_models.moe.gates import Moments

_ROW_TOKENS = 768


def moments(model: Any, texts: Sequence[Conversation], tokenizer: Any) -> tuple[Moments, int]:
    """Moments of what enters each FFN while the expert reads its texts; and of how many tokens.

    The tokens with which every conversation begins (the template's system prompt) say
    nothing of the field and are left out. ValueError where there are no texts.
    """
    if not texts:
        raise ValueError("no texts")
    layers = model.model.layers
    hidden = model.config.hidden_size
    second = torch.zeros(len(layers), hidden, hidden, dtype=torch.float64)
    first = torch.zeros(len(layers), hidden, dtype=torch.float64)
    own = torch.empty(0, dtype=torch.bool)

    def tap(layer: int) -> Any:
        def read(_: Any, inputs: tuple[torch.Tensor]) -> None:
            x = inputs[0][0][own]
            second[layer] += (x.T @ x).double()
            first[layer] += x.sum(dim=0).double()

        return read

    hooks = [layer.mlp.register_forward_pre_hook(tap(i)) for i, layer in enumerate(layers)]
    beginning = template_beginning(tokenizer)
    tokens = 0
    try:
        with torch.no_grad():
            for row in pack(texts, beginning, row_tokens=_ROW_TOKENS):
                own = torch.from_numpy(row.segments != 0)
                tokens += int(own.sum())
                answer_logits(model, row)
    finally:
        for hook in hooks:
            hook.remove()
    return Moments((second / tokens).numpy(), (first / tokens).numpy()), tokens


def template_beginning(tokenizer: Any) -> tuple[int, ...]:
    """The tokens with which the chat template begins every prompt, whatever is asked."""
    anything = [Example(prompt, "", "") for prompt in ("A", "7", "zebra", "¿?")]
    return shared_beginning(tokenize(anything, tokenizer, max_tokens=1 << 20))
