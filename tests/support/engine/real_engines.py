"""Real vLLM engines for tests: where the demo's weights are, asking greedily, killing a core."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtests.swap.real_shared_slot_engine import ENVIRONMENT as ENVIRONMENT
from service.config import VllmOptions
from service.engine.engine_interface import EngineRequest, Message
from service.engine.vllm.async_llm_handle import LaunchSettings
from service.engine.vllm.swapping_engine import Canary, SwappingVllmEngine, Weights
from service.telemetry.pool_metrics import PoolMetrics

ADAPTERS = Path(__file__).parents[3] / "router_models/experts/artifacts"
MODELS = Path(os.environ.get("COE_MODELS", Path.home() / ".cache/coe/models"))
BASE = str(MODELS / "smollm2-135m-instruct")
DEMO = ("base", "math", "intents", "code")
OPTIONS = VllmOptions(
    dtype="float32",
    max_model_len=512,
    kv_cache_bytes=128 * 1024**2,
    max_num_seqs=8,
    threads=1,
    enforce_eager=True,
    args={"max_logprobs": 21},  # one of vLLM's own, which nothing here depends on
)
# For modules whose tests share an engine, as `pytestmark`.
ON_ONE_ENGINE = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM's and torch's own.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not Path(BASE).is_dir(), reason="coe models pull smollm2-135m-instruct"),
]
# Between them, each of the demo's experts goes on in its own way.
_PROMPTS = (
    "A train leaves at 9 and drives 60 km an hour. When has it driven 150 km?",
    "what is my account balance after paying 40 for tickets",
    "import os\n\ndef newest(folder):\n    files =",
)


def demo() -> dict[str, Weights]:
    """The base, and each adapter merged into it."""
    merged = {name: Weights(BASE, str(ADAPTERS / name)) for name in DEMO[1:]}
    return {"base": Weights(BASE), **merged}


_count = itertools.count()


class Swapping(SwappingVllmEngine):
    """The engine itself; `die_at` names a call at which its core is killed, once."""

    die_at = ""

    def __init__(
        self,
        first: str,
        weights: dict[str, Weights],
        canaries: dict[str, Canary],
        options: VllmOptions = OPTIONS,
    ) -> None:
        self.metrics = PoolMetrics()
        super().__init__(
            first,
            weights,
            options,
            on_cpu=True,
            canary_interval=10,
            canaries=canaries,
            observer=self.metrics,
        )

    def _launch_settings(self) -> LaunchSettings:
        settings = super()._launch_settings()
        settings.worker_extension_cls = "tests.support.engine.spoiling_extension.BreakableExtension"
        return settings

    async def worker_rpc(self, method: str, *args: object) -> Any:
        if method == self.die_at:
            self.die_at = ""
            kill(self)
        return await super().worker_rpc(method, *args)


def core_of(engine: Any) -> int:
    """The process id of an engine's core."""
    pid: int = engine.vllm.core_pid
    return pid


def kill(engine: Any) -> None:
    """Kill the engine's core with SIGKILL."""
    os.kill(core_of(engine), signal.SIGKILL)


async def ask(engine: Any, expert: str, tokens: int = 12) -> str:
    """Greedy answers to all prompts, one after the other, as token ids."""
    return "; ".join([await ask_one(engine, expert, prompt, tokens) for prompt in _PROMPTS])


async def ask_one(engine: Any, expert: str, prompt: str = _PROMPTS[0], tokens: int = 12) -> str:
    """The greedy answer to one prompt, as token ids."""
    return " ".join(map(str, (await greedy(engine, expert, prompt, tokens))["token_ids"]))


async def greedy(
    engine: Any, expert: str, prompt: str | list[int], tokens: int, **more: Any
) -> dict[str, Any]:
    """The choice of a greedy answer of exactly so many tokens. `more`: of the request's body."""
    body = {
        "model": expert,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }
    parts: list[bytes] = []

    async def collect(message: Message) -> None:
        parts.append(message.get("body", b""))

    request = EngineRequest("/v1/completions", expert, orjson.dumps(body), f"test-{next(_count)}")
    await engine.run(request, collect)
    answer = orjson.loads(b"".join(parts))
    assert "choices" in answer, answer
    choice: dict[str, Any] = answer["choices"][0]
    return choice


async def metric_values(metrics: PoolMetrics) -> dict[tuple[str, str], float]:
    """Every sample by its name and expert; of answers where tokens have kinds."""
    text = await metrics.text({})
    return {
        (sample.name, sample.labels["expert"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "expert" in sample.labels and sample.labels.get("kind", "answer") == "answer"
    }
