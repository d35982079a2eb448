"""Statistics of one engine, attributed to the expert of each request."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from service.engine.engine_interface import CANARY, EngineObserver, EngineTimings
from service.engine.vllm.async_llm_handle import FinishedRequest

# The number of requests whose expert is remembered. No engine has more requests in flight.
_REMEMBERED = 8192


class EngineStats:
    """Passes an engine's statistics on to the pool, by expert. Adapters are separate experts.

    Attributes:
        running: The expert whose weights the engine has now.
    """

    def __init__(self, observer: EngineObserver, running: str) -> None:
        self._observer = observer
        self.running = running
        self._expert_of: dict[str, str] = {}
        self._finished_tokens: dict[str, int] = {}

    def add_request(self, request_id: str, expert: str) -> None:
        """Record which expert a request is for."""
        self._expert_of[request_id] = expert
        if len(self._expert_of) > _REMEMBERED:
            del self._expert_of[next(iter(self._expert_of))]

    def registry(self, expert: str) -> CollectorRegistry:
        return self._observer.engine_registry(expert)

    def finished_tokens(self, vllm_id: str) -> int:
        """Return the number of tokens of a request's finished answers, by vLLM's request id."""
        return self._finished_tokens.get(vllm_id, 0)

    def record_finished(self, request: FinishedRequest) -> None:
        tokens = self.finished_tokens(request.vllm_id) + request.answer_tokens
        self._finished_tokens[request.vllm_id] = tokens
        if len(self._finished_tokens) > _REMEMBERED:
            del self._finished_tokens[next(iter(self._finished_tokens))]
        expert = self._expert_for(request.vllm_id)
        if expert is not None:
            self._observer.on_finished(
                EngineTimings(
                    expert,
                    queue_s=request.queue_s,
                    prefill_s=request.prefill_s,
                    decode_s=request.decode_s,
                    prompt_tokens=request.prompt_tokens,
                    answer_tokens=request.answer_tokens,
                )
            )

    def _expert_for(self, vllm_id: str) -> str | None:
        """Return the expert of a request. vLLM adds a prefix and maybe a suffix to the id."""
        ours = vllm_id.partition("-")[2]
        if ours.startswith(CANARY):
            return None
        expert = self._expert_of.get(ours) or self._expert_of.get(ours.rpartition("-")[0])
        return expert or self.running
