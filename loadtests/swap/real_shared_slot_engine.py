"""The real engine of a config's shared slot, in this process, and requests to it."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from pathlib import Path

import orjson

from service.config import Config, VllmOptions, load_config
from service.engine.engine_interface import Engine, EngineReport, EngineRequest, Message
from service.engine.vllm.swapping_engine import SwappingVllmEngine, Weights
from service.models import locate

CONFIG = Path(__file__).parents[2] / "deploy" / "config" / "swap.yaml"
# vLLM reads these when it is imported, its engine core when it starts.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_requests = itertools.count()
# Tokens of the demo's vocabulary that are plain words.
_WORDS = range(1000, 40_000)


def prepare() -> None:
    """Set what vLLM reads when it is imported. Before any engine is made."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})


def settings(path: Path = CONFIG) -> Config:
    """The config. Raises ConfigError."""
    return load_config(path)


def weights(config: Config) -> dict[str, Weights]:
    """Return each expert's weights. Raises RuntimeError if a model is missing."""
    found = {}
    for name, expert in config.experts.items():
        source = expert.model if expert.base is None else config.experts[expert.base].model
        assert source is not None
        folder = locate(source)
        if folder is None:
            raise RuntimeError(f"{source} is not here yet; get it with: coe models pull {source}")
        found[name] = Weights(str(folder), expert.adapter, expert.strength)
    return found


class SharedEngine(SwappingVllmEngine):
    """The engine, which several slots in turn may believe they start."""

    def __init__(self, sources: dict[str, Weights], options: VllmOptions) -> None:
        first = next(iter(sources))
        super().__init__(first, sources, options, on_cpu=True, canary_interval=50, canaries={})
        self._told: EngineReport | None = None

    async def start(self) -> EngineReport:
        """Start, the first time."""
        if self._told is None:
            self._told = await super().start()
        return self._told

    async def stop(self) -> None:
        """Nothing: see `close`."""

    async def close(self) -> None:
        """Stop."""
        await super().stop()

    async def only(self, expert: str, experts: Sequence[str]) -> None:
        """Run one expert and hold no other."""
        await self.load_to_host(expert)
        await self.swap_in(expert)
        for name in experts:
            await self.evict(name)


async def ask(
    engine: Engine, expert: str, prompt_tokens: int, tokens: int, words: range = _WORDS
) -> int:
    """Exactly `tokens` tokens to a prompt of that length, of `words`; returns how many came."""
    number = next(_requests)
    chance = random.Random(number)
    body = orjson.dumps(
        {
            "model": expert,
            "prompt": [chance.choice(words) for _ in range(prompt_tokens)],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
    )
    parts: list[bytes] = []

    async def collect(message: Message) -> None:
        parts.append(message.get("body", b""))

    await engine.run(EngineRequest("/v1/completions", expert, body, f"load-{number}"), collect)
    answer = orjson.loads(b"".join(parts))
    if "usage" not in answer:
        raise RuntimeError(f"{expert} did not answer: {answer}")
    came: int = answer["usage"]["completion_tokens"]
    return came
