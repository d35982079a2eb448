"""The forward pass of a packed row, for both training and evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from router_models.experts.conversation_packing import Row


def answer_logits(model: Any, row: Row) -> Tensor:
    """Compute logits only at the answers' positions, because 49,152 tokens make them expensive."""
    hidden = model.model(
        input_ids=torch.from_numpy(row.token_ids)[None],
        attention_mask=torch.from_numpy(row.may_attend())[None, None],
        position_ids=torch.from_numpy(row.positions)[None],
        use_cache=False,
    ).last_hidden_state
    logits: Tensor = model.lm_head(hidden[0, torch.from_numpy(row.predictors)])
    return logits.float()
