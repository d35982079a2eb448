"""The metrics by which an endpoint picker of Kubernetes chooses among model servers. Pure.

They follow the model server protocol of the Gateway API Inference Extension, with vLLM's names: one
series of each, over all experts. `/metrics` has the same figures by expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from service.rpc.snapshot import Snapshot
from service.types import Residency


@dataclass(frozen=True, slots=True)
class ModelServerLoad:
    """The load of a model server: of a pool, or of a gateway with its pools.

    Attributes:
        waiting: Requests that wait in queues.
        running: Requests in engines.
        kv_usage: Used share of the KV cache, in [0, 1]; that of the fullest engine.
        max_lora: LoRA adapters that may be loaded beside their bases.
        ready_adapters: Adapters that are loaded and answer.
        waiting_adapters: Adapters that are being loaded, or have waiting requests.
    """

    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0
    max_lora: int = 0
    ready_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()

    @classmethod
    def of_pool(
        cls, now: Snapshot, adapters: Iterable[str], max_lora: int, kv_usage: float
    ) -> ModelServerLoad:
        """Return a pool's load.

        Args:
            now: The pool's snapshot.
            adapters: The experts that are LoRA adapters beside a base.
            max_lora: Adapters that its engines were started for.
            kv_usage: Used share of the KV cache of its fullest engine.
        """
        here = sorted(name for name in adapters if name in now.experts)
        ready = [name for name in here if now.experts[name].state is Residency.DEVICE]
        waits = [
            name
            for name in here
            if now.experts[name].state is Residency.LOADING or now.queues[name].waiting
        ]
        return cls(
            waiting=sum(queue.waiting for queue in now.queues.values()),
            running=sum(queue.running for queue in now.queues.values()),
            kv_usage=kv_usage,
            max_lora=max_lora,
            ready_adapters=tuple(ready),
            waiting_adapters=tuple(waits),
        )

    @classmethod
    def sum_of(cls, loads: Iterable[ModelServerLoad]) -> ModelServerLoad:
        """Return the load of several together. The KV cache is as full as the fullest one."""
        loads = list(loads)
        return cls(
            waiting=sum(load.waiting for load in loads),
            running=sum(load.running for load in loads),
            kv_usage=max((load.kv_usage for load in loads), default=0.0),
            max_lora=sum(load.max_lora for load in loads),
            ready_adapters=tuple(sorted({n for load in loads for n in load.ready_adapters})),
            waiting_adapters=tuple(sorted({n for load in loads for n in load.waiting_adapters})),
        )

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> ModelServerLoad:
        """Read what `to_wire` made and JSON has carried."""
        known = {**data}
        for name in ("ready_adapters", "waiting_adapters"):
            known[name] = tuple(known[name])
        return cls(**known)

    def text(self, now_s: float) -> str:
        """Render it as Prometheus text.

        Args:
            now_s: Seconds since 1970, the value of the series about adapters.
        """
        lines = [
            "# HELP vllm:num_requests_waiting Requests that wait, of all experts.",
            "# TYPE vllm:num_requests_waiting gauge",
            f"vllm:num_requests_waiting {self.waiting}",
            "# HELP vllm:num_requests_running Requests in engines, of all experts.",
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running {self.running}",
            "# HELP vllm:kv_cache_usage_perc Used share of the fullest KV cache, from 0 to 1.",
            "# TYPE vllm:kv_cache_usage_perc gauge",
            f"vllm:kv_cache_usage_perc {self.kv_usage}",
        ]
        if self.max_lora:
            labels = (
                f'max_lora="{self.max_lora}",'
                f'running_lora_adapters="{",".join(self.ready_adapters)}",'
                f'waiting_lora_adapters="{",".join(self.waiting_adapters)}"'
            )
            lines += [
                "# HELP vllm:lora_requests_info LoRA adapters that are loaded or waited for.",
                "# TYPE vllm:lora_requests_info gauge",
                f"vllm:lora_requests_info{{{labels}}} {now_s}",
            ]
        return "\n".join(lines) + "\n"
