"""The weights that a LoRA adapter adds to full weights: strength · alpha / rank · B A.

It reads PEFT's files: `base_model.model.<name>.lora_A.weight` (rank × in) and `lora_B.weight`
(out × rank).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from service.errors import ModelStoreError
from service.models.lora_adapters import CONFIG_NAME, keys_not_merged, refuse_variants

# The dtypes of base weights that a merge supports. Weights of other dtypes are quantised and need
# their scales.
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LoraDelta:
    """The weights that a LoRA adapter adds to full weights: strength · alpha / rank · B A.

    Raises:
        ValueError: The config needs other arithmetic, a tensor has no weight to be added to, or
            such a weight is quantised.
    """

    def __init__(self, folder: Path, strength: float) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            config = json.loads((folder / CONFIG_NAME).read_text())
            tensors = load_file(str(folder / "adapter_model.safetensors"))
            rank = int(config["r"])
            alpha = float(config["lora_alpha"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"the adapter in {folder} can't be read: {type(error).__name__}: {error}"
            ) from error
        try:
            refuse_variants(config, folder / CONFIG_NAME)
        except ModelStoreError as error:
            raise ValueError(error.message) from error
        if others := keys_not_merged(config):
            raise ValueError(f"the adapter in {folder} uses {others[0]}, which can't be merged")
        self._scale = strength * alpha / (rank**0.5 if config.get("use_rslora") else rank)
        self._pairs: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, which = key.removeprefix("base_model.model.").partition(".lora_")
            if which not in ("A.weight", "B.weight"):
                raise ValueError(f"the adapter in {folder} has {key}, which can't be merged")
            self._pairs.setdefault(name + ".weight", {})[which[0]] = tensor
        for name, pair in self._pairs.items():
            shapes = {which: tuple(tensor.shape) for which, tensor in pair.items()}
            if len(pair) != 2 or shapes["A"][0] != rank or shapes["B"][1] != rank:
                raise ValueError(f"{name}: the adapter of rank {rank} has {shapes}")

    def check_base(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the adapter fits a base with weights of these shapes.

        Raises:
            ValueError: The adapter does not fit.
        """
        for name in sorted(self._pairs):
            if name not in shapes:
                raise ValueError(_no_such(name))
            self._check(name, shapes[name])

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        adds = self._pairs[name]["B"].shape[0], self._pairs[name]["A"].shape[1]
        if adds != shape:
            raise ValueError(f"{name}: the adapter adds {adds} to {shape}")

    def applied(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        left = set(self._pairs)
        for name, weight in weights:
            pair = self._pairs.get(name)
            if pair is not None:
                left.discard(name)
                if weight.dtype not in _PLAIN_DTYPES:
                    dtype = str(weight.dtype).removeprefix("torch.")
                    raise ValueError(
                        f"{name} is quantised ({dtype}): nothing can be merged into it; "
                        "use form: adapter"
                    )
                self._check(name, tuple(weight.shape))
                a, b = pair["A"].float(), pair["B"].float()
                weight = torch.addmm(weight.float(), b, a, alpha=self._scale).to(weight.dtype)
            yield name, weight
        if left:
            raise ValueError(_no_such(sorted(left)[0]))


def _no_such(name: str) -> str:
    return f"the base has no {name}, which the adapter changes"
