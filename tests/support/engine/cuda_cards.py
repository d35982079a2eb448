"""GPUs that tests pretend to have."""

from __future__ import annotations

# By name: compute capability, and memory in MiB as the driver tells it.
CARDS = {
    "NVIDIA H200": ((9, 0), 143_771),
    "NVIDIA GeForce RTX 4090": ((8, 9), 24_564),
    "NVIDIA A100-SXM4-80GB": ((8, 0), 81_920),
}
