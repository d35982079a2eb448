"""Small folders of LoRA adapters, with headers of weights and no sense in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HIDDEN = 64


def adapter_folder(folder: Path, *, rank: int = 4, hidden: int = HIDDEN, **config: Any) -> Path:
    """An adapter of one module of the first layer, in PEFT's format."""
    folder.mkdir(parents=True)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{at}.lora_A.weight": np.zeros((rank, hidden), np.float32),
        f"{at}.lora_B.weight": np.zeros((hidden, rank), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
