"""A tiny random Mixtral, profiles for it, an engine that runs them, and what it must say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.config import Config
from service.engine.vllm.swapping_engine import Canary, Weights
from service.moe.steering_profile import LayerSteering, SteeringProfile, moe_shape, write_profile
from service.moe.virtual_expert_profiles import steering_of
from tests.support.engine.real_engines import greedy
from tests.support.engine.steering_reference import Reference
from tests.support.engine.tiny_mixtral import EXPERTS, LAYERS, mixtral

PROMPT = [917, 5, 40021, 333, 8, 1207, 29, 17777, 64]
TOKENS = 10
RULES: dict[str, dict[str, Any]] = {
    "masked": {"mask": [True, False, False, True]},
    "biased": {"bias": [0.0, 1.5, -0.75, 0.25]},
    "boosted": {"boost": [2.0, 0.25, 1.0, 1.5]},
    "one": {"top_k": 1},
    "three": {"top_k": 3},
    "sure": {"top_p": 0.6, "top_k": 4},
    "null": {"null": -0.9, "top_k": 4},
    "all": {"mask": [False, True, False, False], "bias": [0.5, 0, 0, 0], "boost": [1, 1, 3, 1]},
}


class Steering:
    """The engine, the reference, and the profiles. `engine`: of first, weights and canaries."""

    def __init__(
        self, root: Path, engine: Callable[[str, Mapping[str, Weights], dict[str, Canary]], Any]
    ) -> None:
        self.folder = mixtral(root / "plain", 0)
        self.other = mixtral(root / "other", 1)
        shape = moe_shape(self.folder)
        assert shape is not None
        self.profiles = {
            name: SteeringProfile(
                shape, {i: LayerSteering.of(EXPERTS, **rule) for i in range(LAYERS)}
            )
            for name, rule in RULES.items()
        }
        # One layer only: the other one's gate is vLLM's own.
        self.profiles["half"] = SteeringProfile(
            shape, {1: LayerSteering.of(EXPERTS, **RULES["masked"])}
        )
        experts: dict[str, Any] = {"plain": {"model": self.folder}}
        for name, profile in self.profiles.items():
            path = root / f"{name}.safetensors"
            write_profile(profile, path)
            assert path.stat().st_size < 4096
            experts[name] = {"base": "plain", "profile": str(path)}
        config = Config.model_validate(
            {"experts": experts, "pools": {"p": {"engine": "simulated"}}}
        )
        weights = {"plain": Weights(self.folder), "other": Weights(self.other)}
        for name in self.profiles:
            steering = steering_of(config, name, Path(self.folder))
            weights[name] = Weights(self.folder, steering=steering)
        odd = weights["one"].steering
        assert odd is not None
        weights["odd"] = Weights(self.folder, steering=replace(odd, top_k=3))
        weights["lost"] = Weights(self.folder, fault="experts.lost.profile: can't be read")
        self.canaries: dict[str, Canary] = {}
        self.engine = engine("plain", weights, self.canaries)
        self.reference = Reference(self.folder)
        self.runs = "plain"
        # What it says before anything was ever steered.
        self.first: tuple[list[int], list[float]] = ([], [])

    async def go_to(self, name: str) -> str:
        if self.runs == name:
            return ""
        done = await self.engine.swap_in(name)
        assert done.ok
        self.runs = name
        method: str = done.method
        return method

    async def say(self, name: str, tokens: int = TOKENS) -> tuple[list[int], list[float]]:
        """Greedy tokens and their logprobs."""
        choice = await greedy(self.engine, name, PROMPT, tokens, logprobs=1)
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]
