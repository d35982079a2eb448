"""Generates a dense expert's greedy answers as texts for fields that have only prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BATCH = 32
ANSWER_TOKENS = 32


def greedy(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Answer each prompt through the chat template, with at most ANSWER_TOKENS tokens."""
    import torch

    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    # Prompts of similar length share a batch, which needs less padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers = [""] * len(texts)
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        for begin in range(0, len(order), _BATCH):
            chosen = order[begin : begin + _BATCH]
            batch = tokenizer(
                [texts[i] for i in chosen],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            )
            with torch.no_grad():
                made = model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    max_new_tokens=ANSWER_TOKENS,
                    do_sample=False,
                )
            decoded = tokenizer.batch_decode(
                made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for i, text in zip(chosen, decoded, strict=True):
                answers[i] = text
    finally:
        tokenizer.padding_side = side
    return answers
