"""A process of its own with vLLM's worker: what its layers compute with and without slots.

`python -m tests.support.engine.offload_worker_child FOLDER STORE` prints one JSON object: what each
number of slots gives, against all experts in memory. No engine runs, because a model's routed
experts need neither attention nor a KV cache.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from loadtests.swap.real_shared_slot_engine import prepare

prepare()

import torch  # noqa: E402  # vLLM reads its variables when it is imported
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.forward_context import set_forward_context  # noqa: E402
from vllm.v1.worker.cpu_worker import CPUWorker  # noqa: E402

from service.engine.steering_data import OFFLOAD_KEY  # noqa: E402
from service.engine.vllm.worker.offload_worker import OffloadWorker  # noqa: E402

# One token often, and steps that need more experts than there are slots.
_STEPS = (1, 1, 1, 2, 7, 33, 1)


def _blocks(model: Any) -> list[Any]:
    """The modules with gate and routed experts."""
    layers = model.model.layers
    return [getattr(layer, "block_sparse_moe", None) or layer.mlp for layer in layers]


def _outputs(model: Any, config: VllmConfig) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    hidden = config.model_config.hf_config.hidden_size
    rows = [torch.randn(count, hidden, generator=generator) for count in _STEPS]
    with torch.inference_mode(), set_forward_context(None, config):
        return [[block(step.clone()).clone() for block in _blocks(model)] for step in rows]


def main(folder: str, store: str) -> dict[str, Any]:
    """Return the report."""
    config = EngineArgs(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        load_format="safetensors",
        kv_cache_memory_bytes=2**26,
    ).create_engine_config()
    experts = int(
        getattr(config.model_config.hf_config, "num_local_experts", 0)
        or config.model_config.hf_config.num_experts
    )
    report: dict[str, Any] = {}
    with set_current_vllm_config(config):
        worker = OffloadWorker(
            vllm_config=config,
            local_rank=0,
            rank=0,
            distributed_init_method=f"file://{store}/rendezvous",
            is_driver_worker=True,
        )
        worker.init_device()

        def load(slot_bytes: int | None, prefetch: str = "next_gate") -> list[list[torch.Tensor]]:
            config.compilation_config.static_forward_context.clear()
            if slot_bytes is None:
                CPUWorker.load_model(worker)
            else:
                config.additional_config = {
                    OFFLOAD_KEY: {
                        "bytes": slot_bytes,
                        "policy": "cacheable",
                        "prefetch": prefetch,
                        "folder": f"{store}/packed",
                    }
                }
                worker.load_model()
            return _outputs(worker.get_model(), config)

        resident = load(None)
        whole = load(10**12)
        first = worker.expert_slot_counters()[0]
        expert_bytes = int(first["read_bytes"] // (first["waits"] + first["prefetched"]))
        layers = len(resident[0])
        runs = {experts: whole}
        counters = {experts: worker.expert_slot_counters()}
        for slots, prefetch in ((1, "next_gate"), (experts // 2, "frequency")):
            runs[slots] = load(slots * layers * expert_bytes, prefetch)
            counters[slots] = worker.expert_slot_counters()
        for slots, found in runs.items():
            pairs = [
                (a, b)
                for x, y in zip(resident, found, strict=True)
                for a, b in zip(x, y, strict=True)
            ]
            report[str(slots)] = {
                "same_bits": all(torch.equal(a, b) for a, b in pairs),
                "difference": max(float((a - b).abs().max()) for a, b in pairs),
                "largest": max(float(a.abs().max()) for a, _ in pairs),
                "counters": counters[slots],
            }
        (packed,) = Path(store, "packed").iterdir()
        with packed.open("r+b") as file:
            file.seek(5000)
            byte = file.read(1)[0]
            file.seek(5000)
            file.write(bytes([byte ^ 1]))
        for name, slot_bytes in (("damaged", 10**12), ("too_small", expert_bytes)):
            try:
                load(slot_bytes)
            except Exception as error:
                report[name] = f"{type(error).__name__}: {error}"
    report["experts"] = experts
    return report


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
