"""The part of a replica's GPUs that one engine takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuShare:
    """The GPUs of an engine, and vLLM's share of each.

    Attributes:
        utilization: vLLM's `gpu_memory_utilization`. An engine starts only where this share of a
            GPU's whole memory is free.
        device_ids: Indices into the replica's GPUs. It is empty where the engine takes all of them.
        layer_bytes: Bytes of each of these GPUs beside vLLM's share, in which a layer of another
            expert is made ready for its kernels.
    """

    utilization: float
    device_ids: tuple[int, ...] = ()
    layer_bytes: int = 0

    def reserved_bytes(self, gpu_bytes: int) -> int:
        """Return the bytes that are kept for the engine on a GPU of this size."""
        return round(self.utilization * gpu_bytes) + self.layer_bytes
