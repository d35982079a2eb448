"""Options for mixtures of experts in vLLM: kernels, expert parallelism, load balancing.

The names are those of vLLM 0.32. Options that a platform does not support are refused here, before
an engine starts.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.config.section_base import Bytes, Section

MoeBackend = Literal[
    "auto",
    "triton",
    "batched_triton",
    "deep_gemm",
    "deep_gemm_mega_moe",
    "cutlass",
    "flashinfer_trtllm",
    "flashinfer_cutlass",
    "flashinfer_cutedsl",
    "flashinfer_moe_ep_cutedsl",
    "flashinfer_b12x",
    "b12x",
    "flashinfer_moe_ep_mega_deep_gemm",
    "marlin",
    "humming",
    "triton_unfused",
    "aiter",
    "aiter_mega_moe",
    "aiter_triton_mxfp4_bf16",
    "flydsl",
    "hpc",
    "emulation",
    "rdna3",
]

# `service.expert_offload.slot_policies` has the policies.
SlotPolicyName = Literal["lru", "lfu", "segment", "decay", "cacheable"]
ExpertPrefetch = Literal["none", "frequency", "next_gate"]


class ExpertOffload(Section):
    """Routed experts that do not all fit into memory. The others wait in a file on the disk."""

    bytes: Bytes = Field(
        description="Memory for the routed experts of one engine, in bytes; each layer gets the "
        "same number of slots. It must hold one expert of each layer."
    )
    prefetch: ExpertPrefetch = Field(
        "next_gate",
        description="What is read ahead of a layer's step: nothing, the experts that the policy "
        "finds worth most, or those that the next layer's gate chooses for this layer's input.",
    )
    policy: SlotPolicyName = Field(
        "cacheable",
        description="Which expert keeps its slot: by last use, by uses, by uses in the last 16 "
        "steps, by uses that fade, or by uses that fade as fast as suits the layer.",
    )


class EplbOptions(Section):
    """vLLM's load balancing (EPLB) of routed experts over the GPUs of one engine."""

    window_size: int = Field(1000, ge=1, description="Engine steps over which loads are measured.")
    step_interval: int = Field(3000, ge=1, description="Engine steps between two rearrangements.")
    num_redundant_experts: int = Field(
        0, ge=0, description="Copies of busy experts per layer; `coe moe place` proposes a number."
    )
    log_balancedness: bool = Field(False, description="Log each step's balance; costs some speed.")
    use_async: bool = Field(True, description="Move experts while requests run.")


class ExpertKernels(Section):
    """An expert's own options for mixtures of experts; they override its pool's `vllm`."""

    moe_backend: MoeBackend | None = Field(
        None, description="Kernels for its routed experts. Default: the pool's."
    )
    tuned_config_folder: str | None = Field(
        None, description="Folder of tuned kernel configs. Default: the pool's."
    )


class MoeKernelOptions(Section):
    """A pool's options for mixtures of experts."""

    moe_backend: MoeBackend = Field(
        "auto", description="Kernels for mixture-of-experts layers, as vLLM names them; GPU only."
    )
    tuned_config_folder: str | None = Field(
        None,
        description="Folder of tuned configs for Triton's mixture-of-experts kernels, as vLLM's "
        "benchmark_moe writes them (VLLM_TUNED_CONFIG_FOLDER); GPU only.",
    )
    enable_expert_parallel: bool = Field(
        False,
        description="Whole experts on each of the engine's GPUs instead of slices of all; needs "
        "tensor_parallel_size of at least 2.",
    )
    expert_placement_strategy: Literal["linear", "round_robin"] = Field(
        "linear",
        description="Placement of experts on GPUs. round_robin: for models with expert groups.",
    )
    enable_eplb: bool = Field(
        False, description="Balance experts over the GPUs by load; needs enable_expert_parallel."
    )
    eplb_config: EplbOptions = Field(default_factory=lambda: EplbOptions())

    def why_not(self, *, gpus: float, devices: int) -> str | None:
        """Return why a pool can't use these options, or None.

        Args:
            gpus: GPUs of a replica.
            devices: GPUs of each engine.
        """
        if gpus == 0:
            for name, default in (
                ("enable_eplb", False),
                ("enable_expert_parallel", False),
                ("moe_backend", "auto"),
                ("tuned_config_folder", None),
            ):
                if getattr(self, name) != default:
                    return f"vllm.{name}: {ON_CPU[name]}"
        if self.enable_expert_parallel and devices < 2:
            what = "enable_eplb" if self.enable_eplb else "enable_expert_parallel"
            return (
                f"vllm.{what}: spreading experts needs several GPUs; vllm.tensor_parallel_size is 1"
            )
        if self.enable_expert_parallel and gpus < devices:
            return (
                f"vllm.enable_expert_parallel: needs {devices} GPUs (vllm.tensor_parallel_size), "
                f"and a replica has {gpus:g} (gpus)"
            )
        if self.enable_eplb and not self.enable_expert_parallel:
            return "vllm.enable_eplb: it balances whole experts; set enable_expert_parallel too"
        if not self.enable_eplb and self.eplb_config != EplbOptions():
            return "vllm.eplb_config: it has no effect without enable_eplb"
        if self.expert_placement_strategy != "linear":
            if not self.enable_expert_parallel:
                return "vllm.expert_placement_strategy: it has no effect without " + (
                    "enable_expert_parallel"
                )
            if self.enable_eplb:
                return "vllm.expert_placement_strategy: EPLB always begins with linear"
        return None


ON_CPU = {
    "enable_eplb": "load balancing is for several GPUs; this pool runs on CPU",
    "enable_expert_parallel": "on CPU an engine is one device, with all experts on it",
    "moe_backend": "on CPU vLLM has one kernel for each format of weights; only auto is possible",
    "tuned_config_folder": "tuned configs are for Triton's kernels, on GPUs; this pool runs on CPU",
}
"""The reason why an option is not possible on CPU."""
