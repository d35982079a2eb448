"""Pool metrics that record an engine's routing samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from service.config import MoeCapture
from service.engine.engine_interface import RoutingSample
from service.telemetry.pool_metrics import PoolMetrics


class Watch(PoolMetrics):
    """The pool's own, which remembers what it was told."""

    def __init__(self, capture: MoeCapture) -> None:
        super().__init__(capture)
        self.told: list[RoutingSample] = []

    def on_routing_sample(self, chosen: RoutingSample) -> None:
        super().on_routing_sample(chosen)
        self.told.append(chosen)

    def load(self, expert: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        loads = [item.load for item in self.told if item.expert == expert and item.load is not None]
        return np.sum(loads, axis=0)
