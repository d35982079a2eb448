"""Measures the demo experts on held-out rows, each against the base.

`python -m router_models.experts.evaluate --data DIR --base PATH [--json]`

Bits per byte: the answer's bits under the model (without the end of turn) over
the answer's UTF-8 bytes, given the prompt through the chat template. Its
standard error comes from resampling groups (problems, or whole modules for
code), and the difference to the base is resampled in pairs.

Exact match: greedy decoding yields exactly the intent's name and then the end
of turn. Greedy decoding yields a text exactly if each of its tokens is the most
probable one after those before it, so one pass over the right answer decides it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from router_models.experts import lora_adapters, training_texts
from router_models.experts.answer_logits import answer_logits
from router_models.experts.conversation_packing import (
    Conversation,
    pack,
    shared_beginning,
    tokenize,
)

ARTIFACTS = Path(__file__).parent / "artifacts"
MAX_TOKENS = 640
"""Held-out rows longer than this are left out: the packed row must hold them."""
_ROW_TOKENS = 768
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class RowScore:
    group: str
    bits: float
    bytes: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """A measure of base and expert on the same held-out rows."""

    expert: str
    measure: str
    rows: int
    base: float
    base_error: float
    tuned: float
    tuned_error: float
    gain: float
    gain_error: float
    """`gain` > 0 means better than the base, whichever way the measure points."""


def score(model: Any, conversations: Sequence[Conversation], *, bf16: bool) -> list[RowScore]:
    """Scores each conversation's answer; the order is that of `conversations`."""
    scores: list[RowScore] = []
    beginning = shared_beginning(conversations)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for row in pack(conversations, beginning, row_tokens=_ROW_TOKENS):
            logits = answer_logits(model, row)
            targets = torch.from_numpy(row.targets)
            nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy()
            right = (logits.argmax(-1) == targets).numpy()
            for index, conversation in enumerate(row.conversations):
                own = row.owners == index
                scores.append(
                    RowScore(
                        group=conversation.group,
                        bits=float(nats[own][:-1].astype(np.float64).sum() / np.log(2)),
                        bytes=conversation.answer_bytes,
                        exact=bool(right[own].all()),
                    )
                )
    return scores


def compare(
    expert: str, base: Sequence[RowScore], tuned: Sequence[RowScore], *, seed: int
) -> Comparison:
    """The expert's measure for both, with standard errors by resampling groups."""
    if expert == "intents":
        measure = "exact match"
        parts = [np.array([[float(row.exact), 1.0] for row in rows]) for rows in (base, tuned)]
        sign = 1.0
    else:
        measure = "bits per byte"
        parts = [np.array([[row.bits, float(row.bytes)] for row in rows]) for rows in (base, tuned)]
        sign = -1.0
    by_group = [_sum_groups([row.group for row in base], part) for part in parts]
    values = [_ratio(part.sum(axis=0)) for part in by_group]
    errors = _resample(by_group, seed)
    return Comparison(
        expert=expert,
        measure=measure,
        rows=len(base),
        base=values[0],
        base_error=errors[0],
        tuned=values[1],
        tuned_error=errors[1],
        gain=sign * (values[1] - values[0]),
        gain_error=errors[2],
    )


def _ratio(total: NDArray[np.float64]) -> float:
    return float(total[0] / total[1])


def _sum_groups(groups: Sequence[str], values: NDArray[np.float64]) -> NDArray[np.float64]:
    names, index = np.unique(np.array(groups), return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, index, values)
    return sums


def _resample(by_group: Sequence[NDArray[np.float64]], seed: int) -> tuple[float, float, float]:
    draw = np.random.default_rng(seed)
    count = len(by_group[0])
    found = []
    for _ in range(_RESAMPLES):
        chosen = draw.integers(0, count, count)
        base, tuned = (_ratio(part[chosen].sum(axis=0)) for part in by_group)
        found.append((base, tuned, tuned - base))
    errors = np.array(found).std(axis=0, ddof=1)
    return float(errors[0]), float(errors[1]), float(errors[2])


def measure(
    expert: str,
    adapter: Path,
    base: Path,
    held_out: Sequence[training_texts.Example],
    *,
    bf16: bool,
    seed: int,
    say: Callable[[str], None],
) -> Comparison:
    """Loads the base, scores it, puts the saved adapter on it, scores again."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
    conversations = tokenize(held_out, tokenizer, max_tokens=MAX_TOKENS)
    model = lora_adapters.load_base(base, fast=bf16)
    say(f"{expert}: measuring the base on {len(conversations)} held-out rows")
    before = score(model, conversations, bf16=bf16)
    lora_adapters.load_into(model, adapter)
    say(f"{expert}: measuring the expert")
    after = score(model, conversations, bf16=bf16)
    return compare(expert, before, after, seed=seed)


def describe(result: Comparison) -> str:
    verdict = "better" if result.gain > 3 * result.gain_error else "NOT clearly better"
    return (
        f"{result.expert:8} {result.measure:14} {result.rows:5} rows   "
        f"base {result.base:.4f} ± {result.base_error:.4f}   "
        f"expert {result.tuned:.4f} ± {result.tuned_error:.4f}   "
        f"gain {result.gain:+.4f} ± {result.gain_error:.4f}   {verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m router_models.experts.evaluate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--expert", choices=training_texts.EXPERTS, action="append", help="default: all"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the data files")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--artifacts", type=Path, default=ARTIFACTS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="that of the training run")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = []
    for expert in given.expert or training_texts.EXPERTS:
        split = training_texts.load(expert, given.data, seed=given.seed)
        result = measure(
            expert,
            given.artifacts / expert,
            given.base,
            split.held_out,
            bf16=given.dtype == "bfloat16",
            seed=given.seed,
            say=lambda _: None,
        )
        results.append(result)
        if not given.json:
            print(describe(result), flush=True)
    if given.json:
        print(json.dumps({"dtype": given.dtype, "experts": [asdict(r) for r in results]}))


if __name__ == "__main__":
    main()
