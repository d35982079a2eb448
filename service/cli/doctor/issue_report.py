"""`coe doctor --report`: versions, machine, config and records for a report of an issue.

Everything is listed here by name, so that nothing else gets in: no prompt, no key, no address, no
path of a folder, and no text that somebody wrote into the config.
"""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from service import __version__, host_memory
from service.config import Config, PoolConfig
from service.engine.swap_proof import SwapProof, proof_to_json
from service.engine.swap_proof_store import (
    SwapProofStore,
    cpu_name,
    version_of_package,
    vllm_build,
)
from service.errors import CoeError
from service.gpu_devices import driver_version, gpus
from service.models import inspect_model
from service.models.expert_folders import folder_here
from service.pool.swap_method import resolve_swap_method

_PACKAGES = ("torch", "transformers", "ray", "safetensors", "triton", "flashinfer-python")
_RECORDS = 8
# What a reason may quote of the machine, and what stands for it. Whole quotations come first, since
# paths may hold spaces.
_QUOTED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b[\w+.-]+://[^\s'\"]+"), "(address)"),
    (re.compile(r"(['\"])~?/[^'\"]*\1"), r"\1(path)\1"),
    (re.compile(r"(?<![\w:/])~?/[^\s'\",:;)]+"), "(path)"),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"), "(address)"),
    (re.compile(r"(\w*(?:key|token|secret|password)\w*)\s*[=:]\s*[^\s,;]+", re.I), r"\1=(key)"),
    (re.compile(r"\b(?:hf_|sk-|coe-)[\w-]{8,}"), "(key)"),
)
_POOL_FIELDS = (
    "engine",
    "slots",
    "min_replicas",
    "max_replicas",
    "gpus",
    "cpus",
    "memory_bytes",
    "max_queued_requests",
)
_VLLM_FIELDS = (
    "dtype",
    "max_model_len",
    "kv_cache_bytes",
    "max_num_seqs",
    "max_num_queued_reqs",
    "threads",
    "enforce_eager",
    "tensor_parallel_size",
    "max_lora_rank",
    "trust_remote_code",
    "moe_backend",
    "enable_expert_parallel",
    "enable_eplb",
)


def report_of(config: Config | None) -> dict[str, Any]:
    """Collect the facts. It starts nothing, and reads no text of prompts."""
    root = config.models_dir if config is not None else None
    store = SwapProofStore(Path(root) if root is not None else None)
    return {
        "versions": {
            "coe": __version__,
            "vllm": vllm_build(),
            "python": platform.python_version(),
            **{name: version for name in _PACKAGES if (version := version_of_package(name))},
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_bytes": host_memory.total_bytes(),
            "shared_memory_bytes": _shared_memory_bytes(),
            "gpus": [{"name": gpu.name, "memory_bytes": gpu.memory_bytes} for gpu in gpus()],
            "driver": driver_version(),
        },
        "config": _config(config) if config is not None else None,
        "records": [_record(proof) for proof in store.all()[:_RECORDS]],
    }


def without_places(reason: str) -> str:
    """Return a reason without paths, addresses and keys."""
    for pattern, instead in _QUOTED:
        reason = pattern.sub(instead, reason)
    return reason


def _record(proof: SwapProof) -> dict[str, Any]:
    """Return a record whose reasons name no folder. They may quote an exception."""
    findings = {
        part: replace(finding, reason=without_places(finding.reason))
        for part, finding in proof.findings.items()
    }
    record: dict[str, Any] = json.loads(proof_to_json(replace(proof, findings=findings)))
    return record


def _shared_memory_bytes() -> int | None:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def _config(config: Config) -> dict[str, Any]:
    return {
        "pools": {kind: _pool(config, kind) for kind in config.pools},
        "experts": {name: _expert(config, name) for name in config.experts},
        "gateways": {"max_body_bytes": config.server.max_body_bytes},
    }


def _pool(config: Config, kind: str) -> dict[str, Any]:
    pool: PoolConfig = config.pools[kind]
    resolved = resolve_swap_method(config, kind)
    offload = pool.vllm.expert_offload
    return {
        **{name: getattr(pool, name) for name in _POOL_FIELDS},
        "experts": list(config.local_experts(kind)),
        "swap": pool.swap.model_dump(mode="json"),
        "swap_method_in_use": resolved.choice.method if resolved is not None else None,
        "vllm": {
            **{name: getattr(pool.vllm, name) for name in _VLLM_FIELDS},
            "moe_capture": pool.vllm.moe_capture is not None,
            "expert_offload": offload.model_dump() if offload is not None else None,
            "args": {name: _plain(value) for name, value in pool.vllm.args.items()},
        },
    }


def _plain(value: object) -> object:
    """Return a number or a truth value as it is, and the kind of anything that may be a text."""
    if isinstance(value, bool | int | float) or value is None:
        return value
    # Names of dtypes and methods are short words. Paths, addresses and templates are not.
    if isinstance(value, str) and len(value) <= 24 and value.replace("_", "").isalnum():
        return value
    return f"({type(value).__name__})"


def _expert(config: Config, name: str) -> dict[str, Any]:
    expert = config.experts[name]
    if config.experts[config.owner_of(name)].remote is not None:
        return {"form": "remote"}
    if config.experts[config.owner_of(name)].command is not None:
        return {"form": "command"}
    facts: dict[str, Any] = {
        "form": "variant" if expert.is_variant else expert.form if expert.base else "model",
        "base": expert.base,
        "pinned": expert.pinned,
    }
    try:
        folder = folder_here(config, name)
        info = inspect_model(folder) if folder is not None else None
    except CoeError:
        info = None
    if info is None:
        return {**facts, "weights": "not here, or not readable"}
    for field in ("architecture", "dtype", "quantization", "weight_bytes", "family", "layers"):
        facts[field] = getattr(info, field, None)
    return facts
