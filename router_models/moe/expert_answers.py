"""Owns a dense expert's own greedy answers: texts for fields that have prompts only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BATCH = 32
ANSWER_TOKENS = 32


def greedy(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Its answer to each, through the chat template, at most ANSWER_TOKENS tokens long."""
    import torch

    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    # Alike in length together: less padding.
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
