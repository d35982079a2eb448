"""Which composition fits a machine, and the config that says so. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from service.cli.machine import Machine
from service.cli.output import size
from service.models.presets import TRIOS, Trio
from service.pool.memory_plan import ENGINE_BYTES, PACKING, REPLICA_BYTES

_GIB = 1024**3
# On a GPU: vLLM and its workspace, for each engine.
_ENGINE_BYTES = 2 * _GIB
_GPU_SHARE = 0.9
_MEMORY_SHARE = 0.75
_DISK_SHARE = 0.8
# About what two cores decode at reading speed, in float32.
_PARAMETERS_A_CORE = 0.4e9


@dataclass(frozen=True, slots=True)
class Proposal:
    """A composition for a machine. `trio` None: the demo's small experts.

    `slots`: engines at once (None: one for each expert). Memory is that of the GPU
    where `on_gpu`, else the machine's.
    """

    trio: Trio | None
    on_gpu: bool
    slots: int | None
    kv_bytes: int
    needs_bytes: int
    download_bytes: int

    @property
    def name(self) -> str:
        """For people."""
        return self.trio.name if self.trio else "SmolLM2 135M with three adapters"

    @property
    def licence(self) -> str:
        """Of its models."""
        return self.trio.models[0].licence if self.trio else "Apache-2.0"


def propose(machine: Machine) -> list[Proposal]:
    """Every composition that fits, the best first. The demo's always does."""
    found = []
    for trio in TRIOS:
        if trio.total_bytes > _DISK_SHARE * machine.disk_bytes:
            continue
        one = _on_gpu(trio, machine) if machine.gpus else _on_cpu(trio, machine)
        if one is not None:
            found.append(one)
    return [*found, Proposal(None, False, None, _GIB // 2, 4 * _GIB, 93_000_000)]


def _on_gpu(trio: Trio, machine: Machine) -> Proposal | None:
    room = _GPU_SHARE * max(gpu.memory_bytes for gpu in machine.gpus)
    kv_bytes = max(_GIB, trio.largest_bytes // 8 // _GIB * _GIB)
    each = kv_bytes + _ENGINE_BYTES
    together = trio.total_bytes + each * len(trio.models)
    if together <= room:
        return Proposal(trio, True, None, kv_bytes, together, trio.total_bytes)
    alone = trio.largest_bytes + each
    if alone <= room:
        return Proposal(trio, True, 1, kv_bytes, alone, trio.total_bytes)
    return None


def _on_cpu(trio: Trio, machine: Machine) -> Proposal | None:
    if trio.parameters > _PARAMETERS_A_CORE * machine.cores:
        return None
    # As the memory plan will count: float32 is twice what was published, packed beside
    # itself while it loads, and all of them stay in memory.
    needs = 2 * PACKING * trio.total_bytes + _GIB + ENGINE_BYTES + REPLICA_BYTES
    if needs > _MEMORY_SHARE * machine.memory_bytes:
        return None
    return Proposal(trio, False, 1, _GIB, needs, trio.total_bytes)


def config_text(proposal: Proposal, machine: Machine, artifacts: Path) -> str:
    """The config file. `artifacts`: the folder of the package `router_models`."""
    head = [
        "# Written by `coe init`. Every field: the config reference in service/README.md.",
        f"# Made for: {describe(machine)}",
        f"# {proposal.name}, {proposal.licence}; about {size(proposal.download_bytes)} to fetch,",
        f"# {size(proposal.needs_bytes)} of {'GPU' if proposal.on_gpu else 'main'} memory in use.",
        *(
            ()
            if proposal.trio is None
            else (
                "# Models are taken as they are on the hub when first fetched. To stay with what",
                "# you have tried: coe models pull --pin --config THIS_FILE",
            )
        ),
        "server:",
        "  port: 8000            # on loopback; `host: 0.0.0.0` opens it, after you made keys",
        "",
        "# Finds out what kind of prompt it is. Yours: `coe router fit`.",
        "router:",
        f"  artifact: {_text(artifacts / 'artifacts' / 'demo@1')}",
        "",
        "experts:",
    ]
    return "\n".join([*head, *_experts(proposal, artifacts), "", *_pools(proposal, machine), ""])


def _text(path: Path) -> str:
    """A path as YAML takes it for a text, whatever is in it."""
    plain = re.fullmatch(r"[A-Za-z0-9_./@+-]+", str(path)) is not None
    return str(path) if plain else json.dumps(str(path), ensure_ascii=False)


def _experts(proposal: Proposal, artifacts: Path) -> list[str]:
    lines = []
    if proposal.trio is not None:
        for model in proposal.trio.models:
            lines += [
                f"  {model.category}:",
                f"    model: {model.source}   # {model.licence}, {size(model.weight_bytes)}",
                f"    categories: [{model.category}]",
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
    if proposal.slots is not None:
        lines += [f"    slots: {proposal.slots}            # the experts take turns in it"]
    if not proposal.on_gpu:
        lines += [f"    memory_bytes: {-(-proposal.needs_bytes // _GIB) + 2}GiB"]
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
            "      enforce_eager: true   # starts minutes sooner on a CPU",
        ]
    return [*lines, "      tool_call_parser: hermes"]


def describe(machine: Machine) -> str:
    """The machine in one line."""
    gpus = ", ".join(f"{gpu.name} ({size(gpu.memory_bytes)})" for gpu in machine.gpus) or "no GPU"
    return (
        f"{gpus}; {machine.cores} cores, {size(machine.memory_bytes)} memory, "
        f"{size(machine.disk_bytes)} of disk free"
    )
