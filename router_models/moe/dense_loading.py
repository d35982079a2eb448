"""Loads dense experts one after another into a single transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from router_models.moe.dense_reader import Dense, UpcycleError


def blank(config: Mapping[str, Any]) -> Any:
    """Make a model of the base's shape in float32 with arbitrary weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    words = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    kind = words.pop("model_type")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **words), dtype=torch.float32, attn_implementation="sdpa"
    )
    model.requires_grad_(False)
    return model.eval()


def fill(model: Any, one: Dense) -> None:
    """Load an expert's weights into the model.

    Raises:
        UpcycleError: A weight is missing.
    """
    places = dict(model.named_parameters())
    left = set(places)
    with torch.no_grad():
        for name, weight in one.weights():
            if name in places:
                places[name].copy_(weight)
                left.discard(name)
    if left:
        raise UpcycleError(f"{one.name}: {one.folder} has no {sorted(left)[0]}")
