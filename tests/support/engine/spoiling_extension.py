"""The worker extension with ways to break things, for tests: it runs in the engine's core."""

from __future__ import annotations

import os
import resource
from typing import Any

from service.engine.vllm.worker import weight_memory
from service.engine.vllm.worker.gate_access import routed_layers
from service.engine.vllm.worker.swap_extension import SwapExtension


class BreakableExtension(SwapExtension):
    """What can be done to a core's memory and weights from a test."""

    def coe_spoil(self, expert: str) -> None:
        """Change an expert's weights behind the probe's back."""
        for parameter in self._coe().held[expert].model.parameters():
            if parameter.numel():
                parameter.data.add_(1.0)

    def coe_running(self) -> str:
        """The expert that runs."""
        return self._coe().running

    def coe_environment(self) -> list[str]:
        """The names of the variables that this process has."""
        return sorted(os.environ)

    def coe_see(self) -> None:
        """From now on remember which experts the running model's layers choose."""
        self._seen: dict[int, list[Any]] = {}
        for layer in routed_layers(self.model_runner.model):
            rows = self._seen.setdefault(layer.layer, [])
            layer.router.set_capture_fn(lambda ids, rows=rows: rows.extend(ids.tolist()))

    def coe_seen(self) -> dict[int, list[list[int]]]:
        """What was chosen since `coe_see`: by layer, the experts of each token."""
        for layer in routed_layers(self.model_runner.model):
            layer.router.set_capture_fn(None)
        return self._seen

    def coe_no_memory(self, how: str) -> None:
        """From now on memory runs out: `told` before it is taken, `refused` when it is, or not."""
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * 4096
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = mapped + 100 * 1024**2 if how == "refused" else hard
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        weight_memory.free_bytes = (lambda: 10**6) if how == "told" else _free_bytes


_free_bytes = weight_memory.free_bytes
