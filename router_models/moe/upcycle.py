"""Joins dense experts of one family into a mixture of experts, without training.

Attention, embeddings and norms come from the base. The FFNs of base and experts become the experts
of each layer. The gates have a closed form, computed from hidden states on each expert's own texts
(`gates`). The result is a standard Mixtral. A base that is such a mixture is extended, and neither
its experts nor their texts are read again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from router_models.experts.conversation_packing import tokenize
from router_models.moe import (
    dense_loading,
    dense_reader,
    expert_answers,
    mixtral_checkpoint,
    mixture_card,
    upcycling_texts,
)
from router_models.moe.dense_reader import Dense, UpcycleError
from router_models.moe.gate_fit import Origin, Statistics
from router_models.moe.gate_inputs import moments

BASE = "base"
TEXTS = 200
"""Most texts per field; fewer once MAX_FIELD_TOKENS are reached."""
ANSWERED = 96
"""Most texts if the expert has to generate the answers first, which is slower."""
MAX_TOKENS = 256
MAX_FIELD_TOKENS = 10_000
TOP_K = 1
SCALE = 8.0
"""Of the gates' columns: what two chosen experts weigh depends on it, which are chosen does not."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The checked inputs of a mixture. `statistics` are those of an earlier mixture."""

    base: Path
    config: Mapping[str, Any]
    statistics: Statistics | None
    experts: tuple[Dense, ...]
    fields: Mapping[str, upcycling_texts.Field]


def plan(base: Path, experts: Mapping[str, Path], data: Path | None) -> Plan:
    """Check all inputs before the work begins.

    Args:
        base: The folder of the base.
        experts: The folders of the experts by name.
        data: A folder of texts.

    Raises:
        ArtifactError: An input does not fit.
    """
    config = dense_reader.check_base(base)
    before = dense_reader.statistics_of(base)
    if not experts:
        raise UpcycleError("no experts to join with the base")
    named = {upcycling_texts.GENERAL: base, **experts} if before is None else dict(experts)
    taken = before.experts if before is not None else (upcycling_texts.GENERAL,)
    for name in experts:
        if name in taken:
            raise UpcycleError(f"an expert {name!r} is in {base} already: give it another name")
    joined = tuple(
        Dense(name, base)
        if folder is base
        else dense_reader.check_expert(name, folder, base, dict(config))
        for name, folder in named.items()
    )
    return Plan(
        base,
        config,
        before,
        joined,
        {expert.name: upcycling_texts.read(expert.name, data) for expert in joined},
    )


def build(
    work: Plan, out: Path, *, top_k: int, say: Callable[[str], None] = lambda _: None
) -> Statistics:
    """Make the mixture in `out`, which must not exist. A failure leaves no files there.

    The work takes minutes on a CPU. `top_k` is the number of experts for each token.

    Raises:
        ArtifactError: An input does not fit.
    """
    count = len(work.experts) + (len(work.statistics.experts) if work.statistics else 0)
    if not 1 <= top_k <= count:
        raise UpcycleError(f"top-k {top_k}: there are {count} experts")
    if out.exists():
        raise UpcycleError(f"{out} exists already: remove it or choose another folder")
    shared = mixtral_checkpoint.split(Dense(BASE, work.base))
    for expert in work.experts:
        _tell_lost(expert, shared, say)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        statistics = _fill(partial, work, shared, top_k, say)
        partial.rename(out)
    except OSError as error:
        raise UpcycleError(f"{out}: can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return statistics


def _fill(
    folder: Path,
    work: Plan,
    shared: dict[str, torch.Tensor],
    top_k: int,
    say: Callable[[str], None],
) -> Statistics:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(work.base), local_files_only=True)
    model = dense_loading.blank(work.config)
    layers, hidden = work.config["num_hidden_layers"], work.config["hidden_size"]
    statistics = work.statistics or Statistics.empty(layers, hidden)
    if work.statistics is not None:
        mixtral_checkpoint.keep_experts(work.base, folder, len(statistics.experts))
    for expert in work.experts:
        began_s = time.monotonic()
        dense_loading.fill(model, expert)
        statistics = _learn(statistics, expert, work.fields[expert.name], model, tokenizer)
        mixtral_checkpoint.write_expert(folder, len(statistics.experts) - 1, expert.weights())
        origin = statistics.origins[-1]
        took_s = time.monotonic() - began_s
        say(f"{expert.name}: {origin.rows} texts, {origin.tokens:,} tokens, {took_s:.0f} s")
    mixtral_checkpoint.write_shared(folder, shared, statistics.gates(scale=SCALE))
    text = mixture_card.text(statistics, top_k=top_k, hidden=hidden, layers=layers)
    mixtral_checkpoint.finish(folder, work.base, work.config, statistics, top_k=top_k, card=text)
    return statistics


def _learn(
    statistics: Statistics, expert: Dense, field: upcycling_texts.Field, model: Any, tokenizer: Any
) -> Statistics:
    """Add this expert's own statistics. `model` has the expert's weights."""
    answered = upcycling_texts.answered(
        upcycling_texts.Field(field.name, field.train, (), field.source, field.licence),
        lambda prompts: expert_answers.greedy(model, tokenizer, prompts),
        TEXTS if all(row.answer for row in field.train[:TEXTS]) else ANSWERED,
    )
    read = tokenize(answered.train, tokenizer, max_tokens=MAX_TOKENS)
    kept, total = [], 0
    for conversation in read:
        if total >= MAX_FIELD_TOKENS:
            break
        kept.append(conversation)
        total += len(conversation)
    if not kept:
        raise upcycling_texts.NoTextsError(
            f"texts of {expert.name}: none of {len(field.train)} has an answer and fits "
            f"{MAX_TOKENS} tokens"
        )
    own, tokens = moments(model, kept, tokenizer)
    weights = (expert.adapter or expert.folder).resolve().name
    origin = Origin(expert.name, weights, field.source, field.licence, len(kept), tokens)
    return statistics.added(origin, own)


def _tell_lost(expert: Dense, shared: dict[str, torch.Tensor], say: Callable[[str], None]) -> None:
    changed, share = (
        dense_reader.lost(expert, shared) if expert.name != upcycling_texts.GENERAL else (0, 0.0)
    )
    if changed:
        say(
            f"{expert.name}: {changed} weights outside its FFNs differ from the base's by "
            f"{share:.2%} of their norm; the base's are shared, so that is lost"
        )
