"""Sets up tracing and node metrics for a process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from service.config import Config
from service.telemetry.node_scrape_target import NodeTarget

if TYPE_CHECKING:
    from service.telemetry.tracing import Traces


def traces_of(config: Config, process: str, instance: str) -> Traces | None:
    if config.telemetry.traces_url is None:
        return None
    # Imported here: OpenTelemetry is slow to import, and most configs do not use it.
    from service.telemetry.tracing import Traces

    return Traces(config.telemetry, process, instance)


def node_target(
    config: Config, folder: Path | None, name: str, text: Callable[[], Awaitable[str]]
) -> NodeTarget | None:
    if folder is None:
        return None
    telemetry = config.telemetry
    return NodeTarget(folder, name, text, host=telemetry.metrics_host, port=telemetry.metrics_port)
