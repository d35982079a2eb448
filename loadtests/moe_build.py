"""Measures upcycling: bits per byte of the mixture, each dense expert and the base.

`python -m loadtests.moe_build --data DIR [--model FOLDER]` builds the demo's mixture, or takes a
folder that was built before. It evaluates the mixture on rows from which neither its gates nor the
experts learned. transformers' own Mixtral reads the mixture from its files.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loadtests.lib.command_line import parser, tell
from loadtests.lib.machine_load import Watch
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from router_models.experts.conversation_packing import Conversation, pack, shared_beginning
from router_models.experts.evaluate import ARTIFACTS, RowScore
from router_models.experts.training_texts import EXPERTS
from router_models.moe import bits_per_byte, dense_loading, expert_answers, upcycle, upcycling_texts
from router_models.moe.dense_reader import Dense, read_config
from service.errors import ModelStoreError
from service.models import locate

TARGET = 0.95
_BASE = "smollm2-135m-instruct"
# Held-out rows of each field that are judged; short answers are cheap.
ROWS = {upcycling_texts.GENERAL: 40, "math": 100, "intents": 400, "code": 100}


def base_folder() -> Path:
    """The demo's base on this machine. Raises ModelStoreError."""
    folder = locate(_BASE)
    if folder is None:
        raise ModelStoreError(f"{_BASE} is not here: coe models pull {_BASE}")
    return folder


def build(out: Path, data: Path | None, *, top_k: int = upcycle.TOP_K) -> float:
    """Makes the demo's mixture in `out`; returns seconds."""
    began_s = time.monotonic()
    experts = {name: ARTIFACTS / name for name in EXPERTS}
    work = upcycle.plan(base_folder(), experts, data)
    upcycle.build(work, out, top_k=top_k, say=lambda line: print(line, file=sys.stderr))
    return time.monotonic() - began_s


def judge(
    model: Path, data: Path, rows: Mapping[str, int]
) -> tuple[dict[str, bits_per_byte.GainRetention], dict[str, NDArray[np.float64]]]:
    """Return the mixture's retained gain by field, and its expert's tokens by layer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = base_folder()
    tokenizer = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
    dense = dense_loading.blank(read_config(base))
    dense_loading.fill(dense, Dense(upcycling_texts.GENERAL, base))

    def ask(prompts: list[str]) -> list[str]:
        return expert_answers.greedy(dense, tokenizer, prompts)

    fields: dict[str, list[Conversation]] = {}
    scores: dict[tuple[str, str], list[RowScore]] = {}
    for name in (upcycling_texts.GENERAL, *EXPERTS):
        field = upcycling_texts.read(name, data)
        short = upcycling_texts.Field(name, (), field.held_out, field.source, field.licence)
        done = upcycling_texts.answered(short, ask, rows[name])
        fields[name] = bits_per_byte.conversations(done.held_out, tokenizer)
    for name, held_out in fields.items():
        scores[name, "base"] = bits_per_byte.measure(dense, held_out)
    for name in EXPERTS:
        dense_loading.fill(dense, Dense(name, base, ARTIFACTS / name))
        scores[name, "expert"] = bits_per_byte.measure(dense, fields[name])
    scores[upcycling_texts.GENERAL, "expert"] = scores[upcycling_texts.GENERAL, "base"]
    mixture = AutoModelForCausalLM.from_pretrained(
        str(model), dtype=torch.float32, local_files_only=True
    ).eval()
    result, shares = {}, {}
    for index, (name, held_out) in enumerate(fields.items()):
        shares[name] = right_share(mixture, held_out, index)
        scores[name, "model"] = bits_per_byte.measure(mixture, held_out)
        three = (scores[name, part] for part in ("base", "expert", "model"))
        result[name] = bits_per_byte.kept(*three, seed=0)
    return result, shares


def right_share(model: Any, held_out: list[Conversation], expert: int) -> NDArray[np.float64]:
    """Return by layer the share of a field's tokens whose first choice is its expert."""
    chosen: list[list[int]] = [[] for _ in model.model.layers]
    own = torch.empty(0, dtype=torch.bool)

    def tap(layer: int) -> Any:
        def read(_module: Any, _inputs: Any, out: Any) -> None:
            chosen[layer] += (out[2][own, 0] == expert).tolist()

        return read

    hooks = [
        layer.mlp.gate.register_forward_hook(tap(i)) for i, layer in enumerate(model.model.layers)
    ]
    some = held_out[:30]
    try:
        with torch.no_grad():
            for row in pack(some, shared_beginning(some), row_tokens=768):
                own = torch.from_numpy(row.segments != 0)
                model.model(
                    input_ids=torch.from_numpy(row.token_ids)[None],
                    attention_mask=torch.from_numpy(row.may_attend())[None, None],
                    position_ids=torch.from_numpy(row.positions)[None],
                    use_cache=False,
                )
    finally:
        for hook in hooks:
            hook.remove()
    return np.array([np.mean(layer) for layer in chosen])


def reach(kept: Mapping[str, bits_per_byte.GainRetention]) -> list[TargetCheck]:
    """Return a target per expert: the retained gain on its field."""
    return [
        TargetCheck(
            f"share of the gain of {name} over the base that the mixture keeps, at least",
            TARGET,
            round(kept[name].share, 4),
            kept[name].share >= TARGET,
        )
        for name in EXPERTS
    ]


def report(data: Path, model: Path | None, rows: Mapping[str, int] = ROWS) -> Report:
    """Everything: built in a folder of its own where `model` is none."""
    made = Report("moe_build")
    with tempfile.TemporaryDirectory() as scratch:
        folder = model or Path(scratch) / "demo-moe"
        if model is None:
            made.facts["build_s"] = round(build(folder, data), 1)
            made.notes.append(f"Built in {made.facts['build_s']:.0f} s.")
        kept, shares = judge(folder, data, rows)
    table = Table(
        "Bits per byte on held-out answers",
        ("field", "rows", "base", "expert", "mixture", "kept", "±", "tokens gone to its expert"),
    )
    for name, item in kept.items():
        gained = name != upcycling_texts.GENERAL
        table.rows.append(
            (
                name,
                f"{item.rows}",
                f"{item.base:.4f}",
                f"{item.expert:.4f}" if gained else "–",
                f"{item.model:.4f}",
                f"{item.share:.1%}" if gained else "–",
                f"{item.share_error:.1%}" if gained else "–",
                f"{shares[name].mean():.0%} (by layer {shares[name].min():.0%} to "
                f"{shares[name].max():.0%})",
            )
        )
    made.tables.append(table)
    made.notes.append(f"The answers of {upcycling_texts.GENERAL} are the base's own greedy ones.")
    made.reach = reach(kept)
    made.facts["fields"] = {
        name: asdict(item)
        if name != upcycling_texts.GENERAL
        else {"base": item.base, "model": item.model}
        for name, item in kept.items()
    }
    made.facts["right_by_layer"] = {
        name: [round(float(x), 3) for x in share] for name, share in shares.items()
    }
    return made


def main() -> int:
    """0: measured."""
    words = parser("moe_build", __doc__)
    words.add_argument("--data", type=Path, required=True, help="folder with recorded texts")
    words.add_argument("--model", type=Path, help="folder of a mixture that was built before")
    words.add_argument("--threads", type=int, default=2)
    given = words.parse_args()
    torch.set_num_threads(given.threads)

    def measure(_: Watch) -> Report:
        return report(given.data, given.model)

    return tell(measure, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
