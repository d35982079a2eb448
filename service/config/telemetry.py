"""Section `telemetry`."""

from __future__ import annotations

from pydantic import Field

from service.config.base import Section


class TelemetryConfig(Section):
    """Metrics and traces. Nothing is sent anywhere unless `traces_url` is given."""

    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port on every node that serves the metrics of all our processes there: one "
        "scrape target per node. It asks for no key. Default: none; on a single node /metrics on "
        "the HTTP port has everything, where keys are needed for who shows the admin key.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address that `metrics_port` listens on.")
    traces_url: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Where spans go, as OTLP over HTTP: the whole URL, such as "
        "http://collector:4318/v1/traces. Headers that it needs are taken from the environment "
        "variable OTEL_EXPORTER_OTLP_HEADERS. Default: no traces.",
    )
    traces_sample: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of requests that are traced, of those that come without a traceparent "
        "header; with one, its sampled flag decides.",
    )
