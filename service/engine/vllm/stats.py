"""vLLM's own metrics of one engine, kept by expert and out of the process's common registry.

vLLM's stat logger takes every `vllm:` metric of the process away when another engine
starts, and names them after the model that the engine started with. Here each expert of an
engine has a registry of its own, filled while that expert runs; and each request that ends
is told to the pool with the expert that it was for, adapters included.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from service.engine.base import EngineObserver, EngineTimings

# Requests whose expert is remembered: more than any engine has in flight.
_REMEMBERED = 8192
CANARY = "canary-"


class EngineStats:
    """What one `AsyncLLM` tells of itself. `running` is the expert whose weights it has now."""

    def __init__(self, watch: EngineObserver, running: str) -> None:
        self._watch = watch
        self.running = running
        self._expert_of: dict[str, str] = {}
        self._made: dict[str, int] = {}

    def asked(self, request_id: str, expert: str) -> None:
        """A request with this id is for this expert."""
        self._expert_of[request_id] = expert
        if len(self._expert_of) > _REMEMBERED:
            del self._expert_of[next(iter(self._expert_of))]

    def logger(self) -> type:
        """The stat logger to give to `AsyncLLM`, in place of its own."""
        from vllm.v1.metrics.loggers import PrometheusStatLogger
        from vllm.v1.metrics.stats import SchedulerStats

        stats = self

        class Logger(PrometheusStatLogger):  # type: ignore[misc]  # vllm has no types here
            """One of vLLM's for each expert, made when it first runs."""

            def __init__(self, vllm_config: Any, engine_indexes: Any = None) -> None:
                # Not vLLM's: it would clear the common registry.
                self._config = vllm_config
                self.engine_indexes = engine_indexes or [0]
                self._of: dict[str, Any] = {}
                self._initialized = False
                self._last = stats.running

            def _logger(self, expert: str) -> Any:
                found = self._of.get(expert)
                if found is None:
                    registry = stats._watch.registry(expert)
                    made = _logger_in(registry)(self._config, self.engine_indexes)
                    if made.gauge_lora_info is not None:
                        # Its labels are lists of names: any combination of them.
                        registry.unregister(made.gauge_lora_info)
                        made.gauge_lora_info = None
                    if self._initialized:
                        made.log_engine_initialized()
                    found = self._of[expert] = made
                return found

            def record(
                self,
                scheduler_stats: Any,
                iteration_stats: Any,
                mm_cache_stats: Any = None,
                engine_idx: int = 0,
            ) -> None:
                now = stats.running
                if now != self._last:
                    # Nothing runs or waits for the one that was swapped out.
                    self._logger(self._last).record(SchedulerStats(), None, None, engine_idx)
                    self._last = now
                self._logger(now).record(
                    scheduler_stats, iteration_stats, mm_cache_stats, engine_idx
                )
                if iteration_stats is not None:
                    for finished in iteration_stats.finished_requests:
                        stats._finished(finished)

            def log_engine_initialized(self) -> None:
                self._logger(stats.running).log_engine_initialized()
                self._initialized = True

            def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
                for made in self._of.values():
                    made.record_sleep_state(sleep, level)

            def record_admission_rejection(self, reason: str) -> None:
                self._logger(stats.running).record_admission_rejection(reason)

        return Logger

    def made(self, vllm_id: str) -> int:
        """Tokens of those answers to a request, by vLLM's id of it, that have ended."""
        return self._made.get(vllm_id, 0)

    def _finished(self, finished: Any) -> None:
        self._made[finished.request_id] = self.made(finished.request_id) + (
            finished.num_generation_tokens
        )
        if len(self._made) > _REMEMBERED:
            del self._made[next(iter(self._made))]
        expert = self._asked_for(str(finished.request_id))
        if expert is not None:
            self._watch.on_finished(
                EngineTimings(
                    expert,
                    queue_s=max(0.0, finished.queued_time),
                    prefill_s=max(0.0, finished.prefill_time),
                    decode_s=max(0.0, finished.decode_time),
                    prompt_tokens=finished.num_prompt_tokens,
                    answer_tokens=finished.num_generation_tokens,
                )
            )

    def _asked_for(self, vllm_id: str) -> str | None:
        """The expert of a request by vLLM's id of it, which is ours with something around it."""
        ours = vllm_id.partition("-")[2]
        if ours.startswith(CANARY):
            return None
        found = self._expert_of.get(ours) or self._expert_of.get(ours.rpartition("-")[0])
        return found or self.running


def _logger_in(registry: CollectorRegistry) -> type:
    """vLLM's stat logger with its metrics in `registry`."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    kinds: dict[str, Any] = {
        "_gauge_cls": staticmethod(partial(Gauge, registry=registry)),
        "_counter_cls": staticmethod(partial(Counter, registry=registry)),
        "_histogram_cls": staticmethod(partial(Histogram, registry=registry)),
    }
    parts = {
        name: type(name, (getattr(PrometheusStatLogger, name),), kinds)
        for name in (
            "_spec_decoding_cls",
            "_kv_connector_cls",
            "_ec_connector_cls",
            "_perf_metrics_cls",
        )
    }
    return type("StatLogger", (PrometheusStatLogger,), kinds | parts)
