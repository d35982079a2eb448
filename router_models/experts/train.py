"""Trains one demo expert: a plain LoRA loop in torch.

`python -m router_models.experts.train --expert math|intents|code --data DIR
 --base PATH --out DIR [--minutes M] [--steps N]`

The learning rate follows a cosine over the steps or over the minutes, whichever
is further, so that a run on a busy machine still ends with a small one. With
`--steps` alone a run repeats exactly.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from router_models.experts import evaluate, lora_adapters, model_card, training_texts
from router_models.experts.answer_logits import answer_logits
from router_models.experts.conversation_packing import (
    Conversation,
    Row,
    pack,
    shared_beginning,
    tokenize,
)

_WARM_UP = 0.03
_REPORT_EVERY_S = 20.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """Training settings of one expert."""

    peak_lr: float
    row_tokens: int
    max_tokens: int
    steps: int


RECIPES = {
    "math": Recipe(peak_lr=1e-3, row_tokens=640, max_tokens=320, steps=700),
    "intents": Recipe(peak_lr=2e-3, row_tokens=512, max_tokens=96, steps=1200),
    "code": Recipe(peak_lr=1e-3, row_tokens=640, max_tokens=320, steps=700),
}
RANK = 8
ALPHA = 16.0


def lr_factor(progress: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: short warm-up, then a cosine."""
    if progress < _WARM_UP:
        return max(progress, 1e-3) / _WARM_UP
    rest = min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))
    return 0.5 * (1 + math.cos(math.pi * rest))


def endless_rows(
    conversations: Sequence[Conversation], row_tokens: int, seed: int
) -> Iterator[Row]:
    """Rows epoch after epoch, shuffled anew for each."""
    draw = random.Random(seed)
    beginning = shared_beginning(conversations)
    order = list(conversations)
    while True:
        draw.shuffle(order)
        yield from pack(order, beginning, row_tokens=row_tokens)


def train(
    model: Any,
    attached: dict[str, lora_adapters.LoraLinear],
    rows: Iterator[Row],
    *,
    peak_lr: float,
    steps: int,
    budget_s: float | None,
    bf16: bool,
) -> tuple[int, int, int, float]:
    """Trains in place; returns steps, conversations, tokens and seconds."""
    parameters = [p for module in attached.values() for p in (module.lora_a, module.lora_b)]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.0)
    started = reported = time.monotonic()
    examples = tokens = step = 0
    recent: list[float] = []
    model.train()
    while step < steps:
        elapsed_s = time.monotonic() - started
        progress = step / steps
        if budget_s is not None:
            if elapsed_s >= budget_s:
                break
            progress = max(progress, elapsed_s / budget_s)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * lr_factor(progress)
        row = next(rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = answer_logits(model, row)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(row.targets))
        loss.backward()  # type: ignore[no-untyped-call]  # torch is not read
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        examples += len(row.conversations)
        tokens += len(row.token_ids)
        recent = [*recent[-49:], float(loss.detach())]
        now = time.monotonic()
        if now - reported >= _REPORT_EVERY_S:
            reported = now
            say(
                f"step {step}/{steps}  {now - started:.0f} s  loss {sum(recent) / len(recent):.3f}"
                f"  {tokens / (now - started):.0f} tokens/s"
            )
    return step, examples, tokens, time.monotonic() - started


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(
        prog="python -m router_models.experts.train", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--expert", choices=training_texts.EXPERTS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data files")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--minutes", type=float, help="stop after this long (default: no limit)")
    parser.add_argument("--steps", type=int, help="default: the expert's own")
    parser.add_argument("--lr", type=float, help="peak learning rate; default: the expert's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    recipe = RECIPES[given.expert]
    peak_lr = given.lr if given.lr is not None else recipe.peak_lr
    steps = given.steps if given.steps is not None else recipe.steps
    bf16 = given.dtype == "bfloat16"
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    split = training_texts.load(given.expert, given.data, seed=given.seed)
    tokenizer = AutoTokenizer.from_pretrained(str(given.base), local_files_only=True)
    conversations = tokenize(split.train, tokenizer, max_tokens=recipe.max_tokens)
    say(f"{given.expert}: {len(conversations)} conversations to learn from")
    model = lora_adapters.load_base(given.base, fast=bf16)
    attached = lora_adapters.attach(model, rank=RANK, alpha=ALPHA)
    rows = endless_rows(conversations, recipe.row_tokens, given.seed)
    done, examples, tokens, wall_s = train(
        model,
        attached,
        rows,
        peak_lr=peak_lr,
        steps=steps,
        budget_s=None if given.minutes is None else given.minutes * 60,
        bf16=bf16,
    )
    base_name = given.base.name
    lora_adapters.save(attached, given.out, base=base_name, rank=RANK, alpha=ALPHA)
    say(f"{given.expert}: {done} steps in {wall_s:.0f} s; measuring")
    result = evaluate.measure(
        given.expert, given.out, given.base, split.held_out, bf16=bf16, seed=given.seed, say=say
    )
    run = model_card.TrainingRun(
        expert=given.expert,
        base=base_name,
        rank=RANK,
        alpha=ALPHA,
        peak_lr=peak_lr,
        row_tokens=recipe.row_tokens,
        max_tokens=recipe.max_tokens,
        seed=given.seed,
        steps=done,
        examples=examples,
        tokens=tokens,
        wall_s=wall_s,
        threads=given.threads,
        dtype=given.dtype,
        torch_version=torch.__version__,
    )
    model_card.write(given.out, run, split, result)
    (given.out / "metrics.json").write_text(
        json.dumps({"run": asdict(run), "measured": asdict(result)}, indent=2) + "\n",
        encoding="utf-8",
    )
    print(evaluate.describe(result))


if __name__ == "__main__":
    main()
