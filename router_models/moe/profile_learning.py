"""Learns a steering profile from a few dozen prompts of a domain, and measures its effect.

A quarter of the domain's texts is held out. Importance is measured on the others, and the best
experts of each layer stay. The held-out texts and those of other domains show the mask's quality
loss in bits per byte. The savings are counted and not timed: the number of experts that a batch of
tokens needs, the size of their weights, and the share of choices that are dropped for single
tokens. Only a real engine can measure tokens per second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from router_models.moe.expert_importance import Importance, keep_best, measure
from router_models.moe.gate_recording_and_steering import RoutedLayer, capture_logits, find_routed
from router_models.moe.profile_evaluation import ExpertReads, Judged, QualityLoss
from router_models.moe.profile_text_reader import ProfileError, read_texts, tokenized
from service.models import inspect_model, locate
from service.moe.steering_profile import (
    LayerSteering,
    MoeShape,
    SteeringProfile,
    check_profile,
    moe_shape,
    why_not_steerable,
    write_profile,
)

_EVERY = 4  # one text in so many is held out
_LEAST_TEXTS = 4


@dataclass(frozen=True, slots=True)
class LearnedProfile:
    """A learned profile, its sources and its quality loss. Shares are 0 to 1."""

    model: str
    profile: str
    keep: float
    layers: int
    experts: int
    top_k: int
    kept: int
    top_p: float | None
    null: float | None
    dropped: float
    importance_kept: float
    importance_kept_least: float
    protected: dict[int, tuple[int, ...]]
    learned_texts: int
    learned_tokens: int
    domain: QualityLoss
    others: QualityLoss | None
    reads: tuple[ExpertReads, ...]


def learn(
    *,
    model: str,
    prompts: Path,
    out: Path,
    keep: float = 0.5,
    others: Path | None = None,
    protect: Sequence[tuple[int, int]] = (),
    top_p: float | None = None,
    null: float | None = None,
    max_tokens: int = 512,
    models_dir: Path | None = None,
    say: Callable[[str], None],
) -> LearnedProfile:
    """Learn a profile and write it to `out`.

    protect: (layer, expert) that must stay, beside the super experts. top_p: of a token's choices
    only the first whose probabilities reach it stay. null: the share of each layer's choices, those
    with the smallest logits, that lose their place to null experts. max_tokens: longer texts are
    cut. Raises ProfileError, NotSteerableError, ModelStoreError, InvalidProfileError.
    """
    if not 0 < keep <= 1:
        raise ProfileError(f"keep is {keep:g}; allowed: above 0, at most 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ProfileError(f"top_p is {top_p:g}; allowed: above 0, at most 1")
    if null is not None and not 0 < null < 1:
        raise ProfileError(f"null is {null:g}; allowed: above 0, below 1")
    if out.exists():
        raise ProfileError(f"{out}: exists already; profiles are not written over")
    if not out.parent.is_dir():
        raise ProfileError(f"{out}: there is no folder {out.parent}")
    domain = read_texts(prompts)
    if len(domain) < _LEAST_TEXTS:
        raise ProfileError(
            f"{prompts}: {len(domain)} different texts in it; a few dozen are wanted, and at "
            f"least {_LEAST_TEXTS}"
        )
    strangers = read_texts(others) if others is not None else []
    folder, shape = _shape_of(model, models_dir)
    by_hand = _by_hand(protect, shape)
    say(f"loading {folder}")
    running, tokenizer = _load(folder)
    layers = find_routed(running, shape)
    texts = tokenized(domain, tokenizer, max_tokens)
    held_out, train = texts[::_EVERY], [t for i, t in enumerate(texts) if i % _EVERY]
    say(f"measuring {shape.experts} experts in {len(layers)} layers on {len(train)} texts")
    found = measure(running, layers, shape, [list(text.ids) for text in train])
    protected = _joined(found.super_experts(), by_hand)
    profile = make_profile(found, shape, keep, protected, f"{out.name}: {keep:g} kept")
    train_ids = [list(text.ids) for text in train]
    profile = with_drops(profile, running, layers, train_ids, top_p=top_p, null=null)
    check_profile(profile, shape)
    say(f"judging it on {len(held_out)} held-out texts, and {len(strangers)} of other domains")
    judged = Judged(running, layers, shape, profile)
    loss = judged.loss(held_out)
    foreign = judged.loss(tokenized(strangers, tokenizer, max_tokens)) if strangers else None
    share = _shares(found, profile)
    savings = judged.savings(held_out)
    learned = LearnedProfile(
        model=str(folder),
        profile=str(out),
        keep=keep,
        layers=len(layers),
        experts=shape.experts,
        top_k=shape.top_k,
        kept=max(int((~layer.mask).sum()) for layer in profile.layers.values()),
        top_p=top_p,
        null=null,
        dropped=savings.dropped,
        importance_kept=float(share.mean()),
        importance_kept_least=float(share.min()),
        protected=protected,
        learned_texts=len(train),
        learned_tokens=sum(len(text.ids) for text in train),
        domain=loss,
        others=foreign,
        reads=savings.reads,
    )
    write_profile(profile, out)
    return learned


def make_profile(
    found: Importance,
    shape: MoeShape,
    keep: float,
    protected: dict[int, tuple[int, ...]],
    about: str,
) -> SteeringProfile:
    """Masks that leave each layer the best share `keep` of its experts."""
    layers = {}
    for layer, score in zip(found.layers, found.score, strict=True):
        stay = keep_best(score, keep, least=shape.top_k, protected=protected.get(layer, ()))
        layers[layer] = LayerSteering.of(shape.experts, mask=~stay)
    return SteeringProfile(shape, layers, protected, about)


def with_drops(
    profile: SteeringProfile,
    model: Any,
    layers: list[RoutedLayer],
    texts: Sequence[list[int]],
    *,
    top_p: float | None,
    null: float | None,
) -> SteeringProfile:
    """Return a profile of masks that also drops choices of single tokens.

    The logit of a layer's null experts is the one below which the share `null` of the choices lies
    that the masks leave, over texts as token ids.
    """
    limits: dict[int, float | None] = dict.fromkeys(profile.layers)
    if null is not None:
        chosen: dict[int, list[NDArray[np.float32]]] = {layer.index: [] for layer in layers}

        def see(layer: int, logits: NDArray[np.float32]) -> None:
            left = np.where(profile.layers[layer].mask, np.float32(-np.inf), logits)
            chosen[layer].append(np.sort(left, axis=-1)[:, -profile.shape.top_k :])

        with capture_logits(layers, see), torch.no_grad():
            for ids in texts:
                model.model(input_ids=torch.tensor([ids]), use_cache=False)
        limits = {i: float(np.quantile(np.concatenate(c), null)) for i, c in chosen.items()}
    changed = {
        index: replace(layer, top_p=top_p, null=limits[index])
        for index, layer in profile.layers.items()
    }
    return replace(profile, layers=changed)


def as_json(learned: LearnedProfile) -> dict[str, Any]:
    """The outcome for programs."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(learned)))
    return found


def _shares(found: Importance, profile: SteeringProfile) -> NDArray[np.float64]:
    """Return the share of each layer's importance that unmasked experts have, (layers,)."""
    left = np.stack([~profile.layers[layer].mask for layer in found.layers])
    whole = found.score.sum(axis=1)
    return np.where(whole > 0, (found.score * left).sum(axis=1) / np.maximum(whole, 1e-300), 1.0)


def _shape_of(model: str, root: Path | None) -> tuple[Path, MoeShape]:
    folder = locate(model, root=root)
    if folder is None:
        raise ProfileError(f"{model!r} is not here; get it with: coe models pull {model}")
    info = inspect_model(folder)
    shape = moe_shape(folder) if getattr(info, "is_moe", False) else None
    if shape is None:
        what = getattr(info, "architecture", "a LoRA adapter")
        raise ProfileError(f"{folder}: {what} is no mixture of experts")
    if (why := why_not_steerable(folder)) is not None:
        raise ProfileError(f"{folder}: {getattr(info, 'architecture', '')}: {why}")
    return folder, shape


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, dtype="auto"
    )
    return model.eval(), tokenizer


def _by_hand(protect: Sequence[tuple[int, int]], shape: MoeShape) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    for layer, expert in protect:
        if layer not in shape.layers or not 0 <= expert < shape.experts:
            raise ProfileError(
                f"there is no expert {expert} in a layer {layer}: the model has experts 0 to "
                f"{shape.experts - 1} in {len(shape.layers)} layers, the last of them "
                f"{shape.layers[-1]}"
            )
        found[layer] = tuple(sorted({*found.get(layer, ()), expert}))
    return found


def _joined(
    first: dict[int, tuple[int, ...]], second: dict[int, tuple[int, ...]]
) -> dict[int, tuple[int, ...]]:
    return {
        layer: tuple(sorted({*first.get(layer, ()), *second.get(layer, ())}))
        for layer in sorted({*first, *second})
    }
