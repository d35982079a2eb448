"""LoRA adapters on the MLP projections, in PEFT's format on disk.

Only the MLP is adapted, because a mixture of experts made of these adapters uses only differences
in the MLP.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TARGETS = ("gate_proj", "up_proj", "down_proj")
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


class LoraLinear(nn.Module):
    """A frozen linear layer plus scale · B(A(x))."""

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.frozen = frozen
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, frozen.in_features))
        self.lora_b = nn.Parameter(torch.zeros(frozen.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.lora_a)
        out: Tensor = self.frozen(x) + nn.functional.linear(low, self.lora_b) * self.scale
        return out


def load_base(folder: Path, *, fast: bool) -> Any:
    """Load the frozen base model. `fast` keeps linear weights in bfloat16, all else in float32.

    A bfloat16 autocast multiplies in bfloat16 anyway. Frozen weights in bfloat16 need no cast in
    every step.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    model.requires_grad_(False)
    if fast:
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
    return model


def attach(model: Any, *, rank: int, alpha: float) -> dict[str, LoraLinear]:
    """Attach new adapters with B = 0 to the model, and return them by PEFT's module name."""
    attached = {}
    for index, layer in enumerate(model.model.layers):
        for target in TARGETS:
            lora = LoraLinear(getattr(layer.mlp, target), rank, alpha)
            setattr(layer.mlp, target, lora)
            attached[f"base_model.model.model.layers.{index}.mlp.{target}"] = lora
    return attached


def save(
    attached: dict[str, LoraLinear], folder: Path, *, base: str, rank: int, alpha: float
) -> None:
    """Write float16, which takes half of float32 and is finer than bfloat16 for these numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, lora in attached.items():
        tensors[f"{name}.lora_A.weight"] = lora.lora_a.detach().to(torch.float16).contiguous()
        tensors[f"{name}.lora_B.weight"] = lora.lora_b.detach().to(torch.float16).contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors creates files that only the owner can read
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_into(model: Any, folder: Path) -> None:
    """Attach a saved adapter to a newly loaded base."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS_FILE)
    attached = attach(model, rank=int(config["r"]), alpha=float(config["lora_alpha"]))
    expected = {f"{name}.lora_{side}.weight" for name in attached for side in "AB"}
    if expected != set(tensors):
        odd = min(expected ^ set(tensors))
        raise ValueError(f"{folder}: the adapter does not fit this base, first at {odd}")
    with torch.no_grad():
        for name, lora in attached.items():
            lora.lora_a.copy_(tensors[f"{name}.lora_A.weight"])
            lora.lora_b.copy_(tensors[f"{name}.lora_B.weight"])
            lora.requires_grad_(False)
