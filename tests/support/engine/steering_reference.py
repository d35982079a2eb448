"""transformers' eager Mixtral with its gates steered by hand: what a steered engine must say."""

from __future__ import annotations

import math
from typing import Any

from service.moe.steering_profile import LayerSteering, SteeringProfile


class Reference:
    """One model; `say` with a profile or without."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()

    def say(
        self, prompt: list[int], tokens: int, profile: SteeringProfile | None
    ) -> tuple[list[int], dict[int, list[list[int]]]]:
        """Greedy tokens, and by layer the experts that had a part in each token but the last."""
        import torch

        chosen = self._steer(profile)
        token_ids = list(prompt)
        with torch.inference_mode():
            for _ in range(tokens):
                logits = self._model(torch.tensor([token_ids]), use_cache=False).logits
                token_ids.append(int(logits[0, -1].argmax()))
        return token_ids[len(prompt) :], chosen

    def weigh(
        self, prompt: list[int], said: list[int], profile: SteeringProfile | None
    ) -> tuple[list[float], dict[int, list[list[int]]]]:
        """The log probability of each token that somebody said, and the experts as in `say`."""
        import torch

        chosen = self._steer(profile)
        whole = torch.tensor([[*prompt, *said[:-1]]])
        with torch.inference_mode():
            logits = self._model(whole, use_cache=False).logits[0, len(prompt) - 1 :]
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        return logprobs[range(len(said)), said].tolist(), chosen

    def _steer(self, profile: SteeringProfile | None) -> dict[int, list[list[int]]]:
        """From now on its gates choose so, and the experts of the last step are written there."""
        chosen: dict[int, list[list[int]]] = {}
        for index, layer in enumerate(self._model.model.layers):
            rule = profile.layers.get(index) if profile is not None else None
            layer.mlp.gate.forward = self._gate(layer.mlp.gate, rule, chosen, index)
        return chosen

    @staticmethod
    def _gate(
        gate: Any, rule: LayerSteering | None, chosen: dict[int, list[list[int]]], index: int
    ) -> Any:
        import torch

        def forward(hidden: Any) -> tuple[Any, Any, Any]:
            logits = torch.nn.functional.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
            rows = [_choice(row, rule, gate.top_k) for row in logits.tolist()]
            chosen[index] = [[e for e, weight in row.items() if weight] for row in rows]
            return (
                logits,
                torch.tensor([list(row.values()) for row in rows]),
                torch.tensor([list(row) for row in rows]),
            )

        return forward


def _choice(logits: list[float], rule: LayerSteering | None, top_k: int) -> dict[int, float]:
    """Weight by chosen expert for one token, by the words of a profile's definition."""
    experts = range(len(logits))
    if rule is not None:
        logits = [logits[e] + float(rule.bias[e]) for e in experts]
    allowed = [e for e in experts if rule is None or not rule.mask[e]]
    highest = max(logits[e] for e in allowed)
    odds = {e: math.exp(logits[e] - highest) for e in allowed}
    total = sum(odds.values())
    k = top_k if rule is None or rule.top_k is None else rule.top_k
    weights = {e: odds[e] / total for e in sorted(odds, key=lambda e: (-odds[e], e))[:k]}
    if rule is not None and rule.top_p is not None:
        reached = 0.0
        for e in weights:
            if reached >= rule.top_p:
                weights[e] = 0.0
            reached += weights[e]
    if rule is not None and rule.null is not None:
        weights = {e: w if logits[e] >= rule.null else 0.0 for e, w in weights.items()}
    kept = sum(weights.values()) or 1.0
    boost = [1.0] * len(logits) if rule is None else [float(b) for b in rule.boost]
    return {e: weight / kept * boost[e] for e, weight in weights.items()}
