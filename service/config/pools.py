"""Section `pools`: where experts run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from service.config.base import Bytes, Section
from service.config.moe_kernels import MoeKernelOptions


class MoeCapture(Section):
    """What is seen of the routers of mixtures of experts. `{}`: as by default. GPU: not tested."""

    every: int = Field(
        16,
        ge=1,
        description="One step of the engine of how many is looked at, on average. 1: exact counts.",
    )
    stretches: int = Field(
        4,
        ge=0,
        le=64,
        description="Stretches of prompts kept of each expert every 10 s, to tell how cacheable "
        "its routed experts are. Their text is not kept.",
    )
    tokens: int = Field(
        64, ge=32, le=1024, description="Tokens of a stretch at most; those under 32 are left out."
    )


class EngineOptions(Section):
    """What a pool's `vllm` says of any model."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "auto", description="Weights and activations. On CPU float32 is often the fastest."
    )
    max_model_len: int | None = Field(
        None, ge=16, description="Context in tokens, prompt and answer. Default: the model's own."
    )
    kv_cache_bytes: Bytes | None = Field(
        None,
        description="KV cache of each engine, in bytes. Needed on CPU; on a GPU the default is "
        "vLLM's own share of the free memory.",
    )
    max_num_seqs: int = Field(32, ge=1, description="Sequences in one batch.")
    max_num_queued_reqs: int = Field(
        4096,
        ge=1,
        description="Sequences that an engine may have waiting or running, each choice and prompt "
        "of a request counted; more gets 503.",
    )
    threads: int = Field(
        1, ge=1, description="OMP threads of each engine on CPU. Too many make it crawl."
    )
    enforce_eager: bool = Field(False, description="No compilation: starts minutes sooner on CPU.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one engine.")
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = Field(8, description="Largest adapter rank.")
    moe_capture: MoeCapture | None = Field(
        None, description="Record which experts each layer chooses, in samples. Default: off."
    )
    tool_call_parser: str | None = Field(
        None, description="vLLM's parser for tool calls; needed for tool_choice auto."
    )
    reasoning_parser: str | None = Field(None, description="vLLM's parser for reasoning text.")
    media_domains: tuple[str, ...] = Field(
        (),
        description="Hosts that images, audio and video in a request may be fetched from. "
        "Default: none; data URLs are always allowed.",
    )
    trust_remote_code: bool = Field(
        False, description="Run code from model folders. Off: a model folder is data."
    )


class VllmOptions(MoeKernelOptions, EngineOptions):  # the second's fields come first
    """How vLLM runs in a pool. Names follow vLLM's own where it has one."""


class SwapOptions(Section):
    """How the experts of a pool that share a slot take turns."""

    min_stay_s: float = Field(
        1.0, ge=0, description="Shortest time an expert with work keeps the slot, in s."
    )
    max_wait_s: float = Field(
        30.0, gt=0, description="Bound on waiting for a swap that the slot aims at, in s."
    )
    host_bytes: Bytes | None = Field(
        None,
        description="Host memory for the weights of experts that share slots, in bytes: of all "
        "slots of a replica together, the running experts' included. Divided over them by need; "
        "it must hold each slot's largest expert, and the pinned ones. Default: no bound.",
    )
    running: Literal["wait", "preempt"] = Field(
        "wait",
        description="What becomes of running requests when another expert's turn comes. wait: "
        "they end first. preempt: where somebody would wait longer than max_wait_s, those of which "
        "nothing has been sent go back to the head of their queue, once, and are run again; those "
        "that stream end first.",
    )
    method: Literal["auto", "inplace", "sleep", "respawn"] = Field(
        "auto",
        description="How experts that share a slot take each other's place. inplace: other weights "
        "in the running engine, for those of one family; on a GPU copied from pinned memory. "
        "sleep: an engine each, of which one is awake; GPU only. respawn: another engine is "
        "started. auto: inplace on CPU, respawn on a GPU, where the other two have not been "
        "measured yet. Virtual experts run in their base's engine, by any but sleep.",
    )
    sleep_level: Literal[1, 2] = Field(
        1,
        description="sleep: 1 keeps a sleeping engine's weights in host memory, 2 reads them anew.",
    )
    prefetch: bool = Field(
        True, description="Bring the experts most in demand to host memory before they are asked."
    )
    canary_interval: int = Field(
        50,
        ge=1,
        description="Every how many swaps of an expert its first greedy tokens are compared with "
        "those of its first load.",
    )


class SimulatedOptions(Section):
    """The simulated engine: deterministic text at set speeds, for tests and load tests only."""

    load_s: float = Field(0.0, ge=0, description="Time to start an engine, in s.")
    fill_s: float = Field(0.0, ge=0, description="Time to bring an expert to host memory, in s.")
    swap_s: float = Field(0.0, ge=0, description="Time of a swap in place, in s.")
    prefill_tokens_per_s: float = Field(
        0.0, ge=0, description="Prompt tokens per second; 0: at once."
    )
    decode_ms: float = Field(0.0, ge=0, description="Time per chunk of one token, in ms.")
    tokens: int = Field(16, ge=1, description="Tokens in an answer that sets no max_tokens.")
    max_model_len: int = Field(2048, ge=16, description="Context in tokens.")
    max_num_seqs: int = Field(256, ge=1, description="Requests that run at once.")
    fail: Literal["none", "load", "first_byte", "mid_stream"] = Field(
        "none", description="Where it breaks on purpose."
    )
    poison: str = Field(
        "", description="Text of a request that ends the pool's whole process; empty: none."
    )


class PoolConfig(Section):
    """One kind of pool: a Ray Serve deployment `pool-<kind>`, one replica per accelerator group."""

    engine: Literal["vllm", "simulated"] = Field("vllm", description="What runs the experts.")
    experts: tuple[str, ...] | None = Field(
        None,
        description="Experts that this kind may hold. Default: every expert that is not remote.",
    )
    slots: int | None = Field(
        None,
        ge=1,
        description="Engines of a replica. Default: one for each expert with full weights. With "
        "fewer, experts share them and are swapped in when asked for.",
    )
    min_replicas: int = Field(1, ge=0, le=1024, description="Replicas kept running.")
    max_replicas: int | None = Field(
        None, ge=1, le=1024, description="Replicas under load. Default: min_replicas (at least 1)."
    )
    target_ongoing_requests: float = Field(
        16.0, gt=0, description="Requests running or waiting per replica that autoscaling aims at."
    )
    gpus: float = Field(0, ge=0, description="GPUs a replica asks Ray for.")
    cpus: float = Field(0.5, ge=0, description="CPUs a replica asks Ray for (placement only).")
    memory_bytes: Bytes | None = Field(
        None, description="Memory a replica may use, in bytes; the memory plan is held against it."
    )
    max_queued_requests: int = Field(
        256,
        ge=0,
        description="Requests that may wait per expert; more get 503. One counts for each of its "
        "answers, or for each 2,048 tokens of its prompt, whichever is more.",
    )
    vllm: VllmOptions = Field(default_factory=lambda: VllmOptions())
    swap: SwapOptions = Field(default_factory=lambda: SwapOptions())
    simulated: SimulatedOptions = Field(default_factory=lambda: SimulatedOptions())

    @model_validator(mode="after")
    def _replicas(self) -> PoolConfig:
        if self.max_replicas is not None and self.max_replicas < max(1, self.min_replicas):
            raise ValueError("max_replicas is at least min_replicas, and at least 1")
        return self

    @model_validator(mode="after")
    def _can_sleep(self) -> PoolConfig:
        if self.swap.method == "sleep" and self.gpus == 0:
            raise ValueError("swap.method sleep needs a GPU; on CPU use inplace")
        return self

    @model_validator(mode="after")
    def _can_capture(self) -> PoolConfig:
        if self.vllm.moe_capture is not None and not self.vllm.enforce_eager and self.gpus == 0:
            raise ValueError(
                "vllm.moe_capture needs enforce_eager: true on CPU; compiled code there chooses "
                "experts without asking anybody"
            )
        return self

    @model_validator(mode="after")
    def _can_route(self) -> PoolConfig:
        if self.engine == "vllm":
            devices = self.vllm.tensor_parallel_size
            if (why := self.vllm.why_not(gpus=self.gpus, devices=devices)) is not None:
                raise ValueError(why)
        return self

    @property
    def most_replicas(self) -> int:
        """`max_replicas`, or its default."""
        return self.max_replicas if self.max_replicas is not None else max(1, self.min_replicas)

    @property
    def max_running(self) -> int:
        """Requests that one engine runs at once; the rest wait in the pool's queues."""
        if self.engine == "simulated":
            return self.simulated.max_num_seqs
        return self.vllm.max_num_seqs
