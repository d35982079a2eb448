"""Owns the one way that a packed row goes through the model, in training and in measuring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from router_models.experts.packing import Row


def answer_logits(model: Any, row: Row) -> Tensor:
    """Logits at the answers' positions only: over 49,152 tokens, the others are not free."""
    hidden = model.model(
        input_ids=torch.from_numpy(row.token_ids)[None],
        attention_mask=torch.from_numpy(row.may_attend())[None, None],
        position_ids=torch.from_numpy(row.positions)[None],
        use_cache=False,
    ).last_hidden_state
    logits: Tensor = model.lm_head(hidden[0, torch.from_numpy(row.predictors)])
    return logits.float()
