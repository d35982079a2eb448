"""Section `pools`: the processes that run experts."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from service.config.autoscaling import AutoscalingConfig, refuse_changes
from service.config.moe_options import ExpertOffload, MoeKernelOptions
from service.config.section_base import Bytes, Section
from service.config.vllm_args import PARALLEL, EngineArguments


class MoeCapture(Section):
    """Sampling of the gates of mixtures of experts. `{}`: the defaults. GPU: not tested."""

    every: int = Field(
        16,
        ge=1,
        description="One of this many engine steps is sampled, on average. 1: exact counts.",
    )
    stretches: int = Field(
        4,
        ge=0,
        le=64,
        description="Stretches of prompts recorded per expert every 10 s, to compute how cacheable "
        "its routed experts are. Their text is not recorded.",
    )
    tokens: int = Field(
        64, ge=32, le=1024, description="Most tokens of a stretch; shorter than 32 is left out."
    )


class EngineOptions(Section):
    """A pool's options for all models."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "auto", description="Weights and activations. On CPU float32 is often the fastest."
    )
    max_model_len: int | None = Field(
        None, ge=16, description="Context in tokens, prompt and answer. Default: the model's own."
    )
    kv_cache_bytes: Bytes | None = Field(
        None,
        description="KV cache of each worker of an engine, in bytes. Needed on CPU; on a GPU the "
        "default is vLLM's own share of the free memory.",
    )
    max_num_seqs: int = Field(32, ge=1, description="Sequences in one batch.")
    max_num_queued_reqs: int = Field(
        4096,
        ge=1,
        description="Waiting and running sequences of an engine; each choice and prompt of a "
        "request counts. More gets 503.",
    )
    threads: int = Field(
        1, ge=1, description="OMP threads of each engine on CPU. Too many make it very slow."
    )
    enforce_eager: bool = Field(
        False, description="No compilation: saves minutes at the start on CPU."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one engine.")
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = Field(8, description="Largest adapter rank.")
    spare_adapters: int = Field(
        0,
        ge=0,
        le=256,
        description="Adapters that may be added beside each base while its engine runs. The engine "
        "starts with room for them, which takes memory, and computes a little slower.",
    )
    moe_capture: MoeCapture | None = Field(
        None, description="Sample which routed experts each layer chooses. Default: off."
    )
    expert_offload: ExpertOffload | None = Field(
        None,
        description="Hold fewer routed experts of a mixture in memory than it has; CPU only. "
        "Default: all are in memory.",
    )
    tool_call_parser: str | None = Field(
        None, description="vLLM's parser for tool calls; needed for tool_choice auto."
    )
    reasoning_parser: str | None = Field(None, description="vLLM's parser for reasoning text.")
    media_domains: tuple[str, ...] = Field(
        (),
        description="Hosts from which images, audio and video of requests may be fetched. "
        "Default: none; data URLs are always allowed.",
    )
    trust_remote_code: bool = Field(
        False, description="Run code from model folders. Off: model folders are data only."
    )
    args: EngineArguments = Field(
        default_factory=dict,
        description="Other engine arguments of vLLM by name, with the values of its config file, "
        "such as `kv_cache_dtype: fp8`. Arguments that this config sets itself are refused, each "
        "with the key to use.",
    )

    def parallel(self, name: str) -> int:
        """Return a parallel size of `args`, by default 1."""
        return int(self.args.get(name, 1))

    @property
    def engine_gpus(self) -> int:
        """The GPUs of one engine on GPUs: the product of its parallel sizes."""
        return self.tensor_parallel_size * math.prod(map(self.parallel, PARALLEL))


class VllmOptions(MoeKernelOptions, EngineOptions):  # the second's fields come first
    """Options of vLLM in a pool, with vLLM's own names if it has them."""


class SwapOptions(Section):
    """Swaps between the experts of a pool that share a slot."""

    min_stay_s: float = Field(
        1.0, ge=0, description="Shortest time that an expert with work keeps the slot, in s."
    )
    max_wait_s: float = Field(
        30.0, gt=0, description="Longest wait for a swap that the planner aims at, in s."
    )
    host_bytes: Bytes | None = Field(
        None,
        description="Host memory for the weights of experts that share slots, in bytes, for all "
        "slots of a replica together and including running experts. The slots divide it by need. "
        "It must hold each slot's largest expert and the pinned ones. Default: no bound.",
    )
    running: Literal["wait", "preempt"] = Field(
        "wait",
        description="Running requests at a swap. wait: they end first. preempt: if a request would "
        "wait longer than max_wait_s, running requests of which nothing has been sent return to "
        "the head of their queue, once; requests that stream end first.",
    )
    method: Literal["auto", "inplace", "sleep", "respawn"] = Field(
        "auto",
        description="Method of swaps. inplace: load other weights into the running engine, for "
        "experts of one family; on a GPU from pinned memory. sleep: one engine per expert, one of "
        "them awake; GPU only. respawn: start another engine. auto: inplace on CPU; on a GPU the "
        "fastest method that `coe doctor` has proven on such a machine, else respawn. Virtual "
        "experts run in their base's engine, with every method but sleep.",
    )
    sleep_level: Literal[1, 2] = Field(
        1,
        description="sleep: 1 keeps a sleeping engine's weights in host memory, 2 reloads them.",
    )
    idle_unload_s: float = Field(
        0.0,
        ge=0,
        le=31_536_000,
        description="Seconds without a request after which an expert gives its memory back, until "
        "the next request; pinned experts stay. 0: never.",
    )
    idle_keep: Literal["host", "disk"] | None = Field(
        None,
        description="Where the weights of such experts stay. host: the engine sleeps, with swap "
        "method sleep or by a command's own call, and keeps its weights in host memory where "
        "sleep_level is 1. disk: its process ends. Default: host if it can sleep, else disk.",
    )
    prefetch: bool = Field(
        True, description="Load the experts most in demand into host memory ahead of requests."
    )
    canary_interval: int = Field(
        50,
        ge=1,
        description="Swaps of an expert between two checks that its first greedy tokens equal "
        "those of its first load.",
    )


class SimulatedOptions(Section):
    """The simulated engine: deterministic text at set speeds, for tests and load tests only."""

    load_s: float = Field(0.0, ge=0, description="Time to start an engine, in s.")
    fill_s: float = Field(0.0, ge=0, description="Time to load an expert into host memory, in s.")
    swap_s: float = Field(0.0, ge=0, description="Time of a swap in place, in s.")
    prefill_tokens_per_s: float = Field(
        0.0, ge=0, description="Prompt tokens per second; 0: no delay."
    )
    decode_ms: float = Field(0.0, ge=0, description="Time per chunk of one token, in ms.")
    tokens: int = Field(16, ge=1, description="Tokens in an answer that sets no max_tokens.")
    max_model_len: int = Field(2048, ge=16, description="Context in tokens.")
    max_num_seqs: int = Field(256, ge=1, description="Concurrent requests.")
    fail: Literal["none", "load", "first_byte", "mid_stream"] = Field(
        "none", description="Stage at which requests fail on purpose."
    )
    poison: str = Field(
        "", description="Text of a request that ends the pool's process; empty: none."
    )


class PoolConfig(Section):
    """One kind of pool: a Ray Serve deployment `pool-<kind>`, one replica per accelerator group."""

    engine: Literal["vllm", "simulated"] = Field("vllm", description="Engine of the experts.")
    experts: tuple[str, ...] | None = Field(
        None,
        description="Experts of this kind of pool. Default: every expert that is not remote.",
    )
    slots: int | None = Field(
        None,
        ge=1,
        description="Engines of a replica. Default: one for each expert with full weights. With "
        "fewer, experts share slots and are swapped in on demand.",
    )
    min_replicas: int = Field(1, ge=0, le=1024, description="Replicas kept running.")
    max_replicas: int | None = Field(
        None, ge=1, le=1024, description="Replicas under load. Default: min_replicas (at least 1)."
    )
    autoscaling: AutoscalingConfig | None = Field(
        None,
        description="When replicas are added and removed, where max_replicas is above "
        "min_replicas. Default: the section's defaults.",
    )
    gpus: float = Field(
        0,
        ge=0,
        description="GPUs that a replica requests from Ray: a whole number, or a share below 1.",
    )
    cpus: float = Field(
        0.5, ge=0, description="CPUs that a replica requests from Ray, for placement only."
    )
    memory_bytes: Bytes | None = Field(
        None, description="Memory of a replica, in bytes; the memory plan is checked against it."
    )
    max_queued_requests: int = Field(
        256,
        ge=0,
        description="Requests that may wait per expert; more get 503. A request counts once per "
        "answer, or once per 2,048 tokens of its prompt, whichever is more.",
    )
    vllm: VllmOptions = Field(default_factory=lambda: VllmOptions())
    swap: SwapOptions = Field(default_factory=lambda: SwapOptions())
    simulated: SimulatedOptions = Field(default_factory=lambda: SimulatedOptions())

    @model_validator(mode="after")
    def _check_replicas(self) -> PoolConfig:
        if self.max_replicas is not None and self.max_replicas < max(1, self.min_replicas):
            raise ValueError("max_replicas must be at least min_replicas, and at least 1")
        if (scaling := self.autoscaling) is None:
            return self
        if not self.scales:
            try:
                refuse_changes(scaling)
            except ValueError as error:
                raise ValueError(f"autoscaling: {error}") from None
            return self
        first = scaling.initial_replicas
        if first is not None and not self.min_replicas <= first <= self.most_replicas:
            raise ValueError(
                f"autoscaling.initial_replicas: input should be from {self.min_replicas} "
                f"(min_replicas) to {self.most_replicas} (max_replicas), not {first}"
            )
        if scaling.downscale_to_zero_delay_s is not None and self.min_replicas > 0:
            raise ValueError(
                "autoscaling.downscale_to_zero_delay_s: without effect, because min_replicas is "
                f"{self.min_replicas} and not 0"
            )
        return self

    @model_validator(mode="after")
    def _check_sleep(self) -> PoolConfig:
        if self.swap.method == "sleep" and self.gpus == 0:
            raise ValueError("swap.method sleep needs a GPU; on CPU use inplace")
        return self

    @model_validator(mode="after")
    def _check_capture(self) -> PoolConfig:
        if self.vllm.moe_capture is not None and not self.vllm.enforce_eager and self.gpus == 0:
            raise ValueError(
                "vllm.moe_capture needs enforce_eager: true on CPU, because compiled code there "
                "has no hook for the choice of experts"
            )
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> PoolConfig:
        if self.vllm.expert_offload is None:
            return self
        if self.engine != "vllm":
            raise ValueError(f"vllm.expert_offload needs engine: vllm, not {self.engine}")
        if self.gpus > 0:
            raise ValueError("vllm.expert_offload works on CPU only, and this pool has gpus")
        if not self.vllm.enforce_eager:
            raise ValueError(
                "vllm.expert_offload needs enforce_eager: true, because compiled code computes "
                "with all experts"
            )
        if self.vllm.spare_adapters:
            raise ValueError(
                "vllm.expert_offload: adapters beside a mixture need a GPU, so "
                "spare_adapters must be 0"
            )
        return self

    @model_validator(mode="after")
    def _check_moe_kernels(self) -> PoolConfig:
        if self.engine == "vllm":
            devices = self.vllm.tensor_parallel_size * self.vllm.parallel("data_parallel_size")
            if (reason := self.vllm.why_not(gpus=self.gpus, devices=devices)) is not None:
                raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _check_parallel(self) -> PoolConfig:
        spread = [name for name in PARALLEL if self.vllm.parallel(name) > 1]
        if self.engine != "vllm" or (self.gpus == 0 and not spread):
            return self
        where = f"vllm.args.{spread[0]}" if spread else "vllm.tensor_parallel_size"
        if self.gpus == 0:
            raise ValueError(
                f"{where}: on CPU an engine is one process; min_replicas and max_replicas add more"
            )
        needed = self.vllm.engine_gpus
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(
                f"gpus: should be a whole number, or a share below 1, not {self.gpus:g}"
            )
        if needed == 1:
            return self
        if self.gpus < needed:
            raise ValueError(
                f"{where}: an engine needs {needed} GPUs (tensor_parallel_size × "
                f"pipeline_parallel_size × data_parallel_size), and a replica has {self.gpus:g} "
                "(gpus)"
            )
        if spread and self.vllm.moe_capture is not None:
            raise ValueError(f"{where}: vllm.moe_capture sees one pipeline stage of one rank only")
        return self

    @property
    def most_replicas(self) -> int:
        """The value of `max_replicas`, or its default."""
        return self.max_replicas if self.max_replicas is not None else max(1, self.min_replicas)

    @property
    def scales(self) -> bool:
        """Whether the number of replicas changes with the load."""
        return self.most_replicas > self.min_replicas

    @property
    def scaling(self) -> AutoscalingConfig:
        """The value of `autoscaling`, or its default."""
        return self.autoscaling or AutoscalingConfig()

    @property
    def max_running(self) -> int:
        """Concurrent requests of one engine; the rest wait in the pool's queues."""
        if self.engine == "simulated":
            return self.simulated.max_num_seqs
        return self.vllm.max_num_seqs
