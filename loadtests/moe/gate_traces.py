"""Choices of gates to simulate expert slots on: random ones with real skew, and those of a model.

The random ones stay with their experts as Mixtral 8x7B does. Table 5 of "Mixtral of Experts"
(https://arxiv.org/abs/2401.04088) says how often the first choice of a layer is that of the token
before: 14 % in layer 0, 24 to 28 % in layer 15, and 20 to 26 % in layer 31, over eight fields.
By chance it would be 12.5 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.expert_offload.slot_simulation import GateTrace, one_by_one
from service.moe.steering_profile import moe_shape

# The favour of an expert is a stationary process with this correlation between tokens.
_CORRELATION = 0.9
# Its standard deviation against the noise of each token, which is of Gumbel's distribution, in the
# first layer and in the others: they give 14 % and 25 % of repeated first choices.
_FAVOUR_FIRST, _FAVOUR = 0.4, 1.2
_EXPERTS, _TOP_K = 8, 2


def random_text(layers: int, tokens: int, chance: np.random.Generator) -> NDArray[np.int16]:
    """Draw the choices for one text with 8 experts of which 2 are chosen, (layers, tokens, 2)."""
    favour = chance.standard_normal((tokens, layers, _EXPERTS))
    favour[1:] *= np.sqrt(1 - _CORRELATION**2)
    for at in range(1, tokens):
        favour[at] += _CORRELATION * favour[at - 1]
    spread = np.where(np.arange(layers) == 0, _FAVOUR_FIRST, _FAVOUR)[:, None]
    logits = favour * spread + chance.gumbel(size=favour.shape)
    order = np.argsort(-logits, axis=-1)[..., :_TOP_K]
    return order.transpose(1, 0, 2).astype(np.int16)


def random_trace(
    *, layers: int, texts: int, tokens: int, at_once: int, chance: np.random.Generator
) -> GateTrace:
    """Draw a trace of generated texts, `at_once` of them at the same time."""
    drawn = [random_text(layers, tokens, chance) for _ in range(texts)]
    return one_by_one(drawn, _EXPERTS, at_once)


def repeated_first_choices(choices: NDArray[np.int16]) -> NDArray[np.float64]:
    """Return how often each layer's first choice is that of the token before, (layers,)."""
    first = choices[:, :, 0]
    share: NDArray[np.float64] = (first[:, 1:] == first[:, :-1]).mean(axis=1)
    return share


def model_trace(
    folder: Path, texts: Sequence[str], *, at_once: int, tokens: int = 256
) -> GateTrace:
    """Record what a model's gates choose for texts, with transformers.

    The predictions are those of each layer's gate when it gets the input of the gate before it.

    Args:
        folder: A mixture whose gates choose by softmax and top-k.
        texts: The texts.
        at_once: How many texts the trace generates at the same time.
        tokens: The most tokens of a text.

    Raises:
        RuntimeError: The folder is no mixture, or its gates are not where they are looked for.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape = moe_shape(folder)
    if shape is None:
        raise RuntimeError(f"{folder} is no mixture of experts")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = [model.model.layers[index].mlp for index in shape.layers]
    gates = [layer.gate for layer in layers]
    inputs: list[Any] = [None] * len(gates)

    def keep(at: int) -> Any:
        def hook(_: Any, given: Any) -> None:
            inputs[at] = given[0].reshape(-1, given[0].shape[-1])

        return hook

    for at, gate in enumerate(gates):
        gate.register_forward_pre_hook(keep(at))

    def top(at: int, rows: Any) -> NDArray[np.int16]:
        logits = torch.nn.functional.linear(rows, gates[at].weight)
        found: NDArray[np.int16] = logits.topk(shape.top_k, dim=-1).indices.numpy().astype(np.int16)
        return found

    chosen, guessed = [], []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
            model(ids, use_cache=False)
            if any(rows is None for rows in inputs):
                raise RuntimeError(f"the gates of {type(model).__name__} are not called")
            chosen.append(np.stack([top(at, inputs[at]) for at in range(len(gates))]))
            guessed.append(np.stack([top(at, inputs[max(0, at - 1)]) for at in range(len(gates))]))
    trace = one_by_one(chosen, shape.experts, at_once)
    ahead = one_by_one(guessed, shape.experts, at_once)
    return GateTrace(shape.experts, trace.choices, trace.steps, ahead.choices)
