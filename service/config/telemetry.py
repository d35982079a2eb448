"""Section `telemetry`."""

from __future__ import annotations

from pydantic import Field

from service.config.section_base import Section


class TelemetryConfig(Section):
    """Metrics and traces. The service sends nothing unless `traces_url` is set."""

    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port on every node with the metrics of all coe processes there: one scrape "
        "target per node, without a key. Default: none. On a single node, /metrics on the HTTP "
        "port has all metrics; if keys are required, it needs the admin key.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address that `metrics_port` listens on.")
    model_server_metrics: bool = Field(
        False,
        description="Answer GET /metrics/model-server without a key: how many requests wait and "
        "run, how full KV caches are, and the names of adapters. For an endpoint picker of "
        "Kubernetes' Gateway API Inference Extension, which has no key.",
    )
    traces_url: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Full URL of a collector for spans by OTLP over HTTP, such as "
        "http://collector:4318/v1/traces. The environment variable OTEL_EXPORTER_OTLP_HEADERS "
        "holds its headers. Default: no traces.",
    )
    traces_sample: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of traced requests among those without a traceparent header. With one, "
        "its sampled flag decides.",
    )
