"""The compositions that fit a machine, and their configs. Pure functions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from service.cli.machine_resources import Machine
from service.cli.table_output import size
from service.models.public_models import TRIOS, Trio
from service.pool.gpu_memory_plan import ENGINE_BYTES as GPU_ENGINE_BYTES
from service.pool.gpu_memory_plan import VLLM_SHARE
from service.pool.memory_plan import ENGINE_BYTES, PACKING, REPLICA_BYTES

_GIB = 1024**3
# A little below the share that the memory plan allows, because weight files differ in size.
_GPU_SHARE = VLLM_SHARE - 0.02
_MEMORY_SHARE = 0.75
_DISK_SHARE = 0.8
# One core decodes about this many float32 parameters at reading speed.
PARAMETERS_PER_CORE = 0.4e9


@dataclass(frozen=True, slots=True)
class Proposal:
    """A composition for a machine.

    Attributes:
        trio: The models; None: the demo's small experts.
        on_gpu: The experts run on a GPU, and the memory is the GPU's; else the machine's.
        slots: Number of engines; None: one for each expert.
        kv_bytes: KV cache of each engine.
        required_bytes: Memory that all engines take.
        download_bytes: Size of the models.
        replicas: Number of GPUs, each of which has all of that.
    """

    trio: Trio | None
    on_gpu: bool
    slots: int | None
    kv_bytes: int
    required_bytes: int
    download_bytes: int
    replicas: int = 1

    @property
    def name(self) -> str:
        """The name that `coe init` shows."""
        return self.trio.name if self.trio else "SmolLM2 135M with three adapters"

    @property
    def licence(self) -> str:
        """The models' licence."""
        return self.trio.models[0].licence if self.trio else "Apache-2.0"


def propose(machine: Machine) -> list[Proposal]:
    """Return every composition that fits, the best one first. The demo always fits."""
    proposals = []
    for trio in TRIOS:
        if trio.total_bytes > _DISK_SHARE * machine.disk_bytes:
            continue
        proposal = _on_gpu(trio, machine) if machine.gpus else _on_cpu(trio, machine)
        if proposal is not None:
            proposals.append(proposal)
    return [*proposals, Proposal(None, False, None, _GIB // 2, 4 * _GIB, 93_000_000)]


def _on_gpu(trio: Trio, machine: Machine) -> Proposal | None:
    room = _GPU_SHARE * max(gpu.memory_bytes for gpu in machine.gpus)
    kv_bytes = max(_GIB, trio.largest_bytes // 8 // _GIB * _GIB)
    engine_bytes = kv_bytes + GPU_ENGINE_BYTES
    all_bytes = trio.total_bytes + engine_bytes * len(trio.models)
    count = len(machine.largest_gpus)
    if all_bytes <= room:
        return Proposal(trio, True, None, kv_bytes, count * all_bytes, trio.total_bytes, count)
    largest_bytes = trio.largest_bytes + engine_bytes
    if largest_bytes <= room:
        return Proposal(trio, True, 1, kv_bytes, count * largest_bytes, trio.total_bytes, count)
    return None


def _on_cpu(trio: Trio, machine: Machine) -> Proposal | None:
    if trio.parameters > PARAMETERS_PER_CORE * machine.cores:
        return None
    # The memory plan counts the same way: float32 takes twice the published bytes, loading packs
    # a copy, and all experts stay in memory.
    required_bytes = 2 * PACKING * trio.total_bytes + _GIB + ENGINE_BYTES + REPLICA_BYTES
    if required_bytes > _MEMORY_SHARE * machine.memory_bytes:
        return None
    return Proposal(trio, False, 1, _GIB, required_bytes, trio.total_bytes)


def config_text(proposal: Proposal, machine: Machine, artifacts: Path) -> str:
    """Write the config file's text.

    Args:
        proposal: The composition.
        machine: The machine that it is for.
        artifacts: Folder of the package `router_models`.
    """
    memory = "GPU" if proposal.on_gpu else "main"
    head = [
        "# Written by `coe init`. docs/reference/config.md describes every key.",
        f"# For: {describe(machine)}",
        f"# {proposal.name}, {proposal.licence}; downloads {size(proposal.download_bytes)},",
        f"# uses {size(proposal.required_bytes)} of {memory} memory.",
        *(
            ()
            if proposal.trio is None
            else (
                "# The first fetch takes the hub's present version of each model. To pin the",
                "# versions that you have tried: coe models pull --pin --config THIS_FILE",
            )
        ),
        "server:",
        "  port: 8000            # loopback only; make keys first, then set `host: 0.0.0.0`",
        "",
        *_router(proposal, artifacts),
        "",
        "experts:",
    ]
    return "\n".join([*head, *_experts(proposal, artifacts), "", *_pools(proposal, machine), ""])


def _router(proposal: Proposal, artifacts: Path) -> list[str]:
    if proposal.trio is None:
        return [
            "# The classifier of prompts, with a map that is fitted for these experts.",
            "router:",
            f"  artifact: {_text(artifacts / 'artifacts' / 'demo@2')}",
        ]
    return [
        "# The classifier of prompts is the built-in general@2, with 26 everyday categories.",
        "# Experts name those that they are best at. All others go to the expert for `general`.",
        "# A sentence encoder helps where it is unsure; `coe serve` fetches it (32 MB):",
        "# router: {encoder: {model: use-multilingual-v3}}",
    ]


def _text(path: Path) -> str:
    """Quote a path for YAML if needed."""
    plain = re.fullmatch(r"[A-Za-z0-9_./@+-]+", str(path)) is not None
    return str(path) if plain else json.dumps(str(path), ensure_ascii=False)


def _experts(proposal: Proposal, artifacts: Path) -> list[str]:
    lines = []
    if proposal.trio is not None:
        for model in proposal.trio.models:
            lines += [
                f"  {model.category}:",
                f"    model: {model.source}   # {model.licence}, {size(model.weight_bytes)}",
                f"    categories: [{', '.join(model.categories)}]",
                f"    description: {model.about}",
            ]
        return lines
    lines += [
        "  general:",
        "    model: smollm2-135m-instruct   # Apache-2.0",
        "    categories: [general]",
    ]
    for name in ("math", "intents", "code"):
        lines += [
            f"  {name}:",
            "    base: general              # a LoRA beside its base",
            f"    adapter: {_text(artifacts / 'experts' / 'artifacts' / name)}",
            f"    categories: [{name}]",
        ]
    return lines


def _pools(proposal: Proposal, machine: Machine) -> list[str]:
    lines = ["pools:", f"  {'gpu' if proposal.on_gpu else 'cpu'}:"]
    if proposal.on_gpu:
        lines += ["    gpus: 1"]
        if proposal.replicas > 1:
            lines += [f"    min_replicas: {proposal.replicas}     # one on each GPU"]
    if proposal.slots is not None:
        lines += [f"    slots: {proposal.slots}            # the experts take turns in it"]
    if not proposal.on_gpu:
        lines += [f"    memory_bytes: {-(-proposal.required_bytes // _GIB) + 2}GiB"]
    context = proposal.trio.context_tokens if proposal.trio else 2048
    lines += [
        "    vllm:",
        f"      dtype: {'bfloat16' if proposal.on_gpu else 'float32'}",
        f"      max_model_len: {context}",
        f"      kv_cache_bytes: {proposal.kv_bytes // 1024**2}MiB",
    ]
    if not proposal.on_gpu:
        lines += [
            f"      threads: {max(1, machine.cores)}",
            "      enforce_eager: true   # saves minutes at the start on a CPU",
        ]
    return [*lines, "      tool_call_parser: hermes"]


def unused_gpus(machine: Machine) -> str:
    """Return how to start a config that leaves GPUs out; empty where it uses all of them."""
    used = machine.largest_gpus
    if len(used) == len(machine.gpus):
        return ""
    named = ",".join(map(str, used))
    return (
        "the GPUs differ in size, and the config is for the largest: start it with "
        f"CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={named}"
    )


def describe(machine: Machine) -> str:
    """Describe the machine in one line."""
    gpus = ", ".join(f"{gpu.name} ({size(gpu.memory_bytes)})" for gpu in machine.gpus) or "no GPU"
    return (
        f"{gpus}; {machine.cores} cores, {size(machine.memory_bytes)} memory, "
        f"{size(machine.disk_bytes)} of disk free"
    )
