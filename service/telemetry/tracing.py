"""OpenTelemetry spans. No other module imports OpenTelemetry.

Each request has one trace. The gateway's server span holds `route` (parsing and classification),
`choose` (selection) and one span per attempt, named by the GenAI conventions, as `chat EXPERT`. An
attempt holds the pool's span with `queue`, `swap` and `engine`; streamed answers add `prefill` and
`decode`. The trace continues the client's W3C context and passes it to pools and remote experts.
Attributes are names, numbers and codes, never prompts, answers or keys.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service import __version__
from service.config import TelemetryConfig
from service.errors import CoeError
from service.rpc.call_headers import Call, Times

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "rerank",
    "/v1/score": "score",
    "/v1/classify": "classify",
    "/v1/audio/transcriptions": "transcription",
}
# Numeric fields of the request body, and their span attributes.
_NUMERIC_FIELDS = {
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "max_output_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "n": "gen_ai.request.choice.count",
    "seed": "gen_ai.request.seed",
}
# A collector that does not answer delays the end of a process by this time.
_EXPORT_TIMEOUT_S = 2
_PROPAGATOR = TraceContextTextMapPropagator()


class Traces:
    """The tracer of one process.

    Args:
        config: Sampling and the collector's URL.
        process: gateway or pool.
        instance: Id of the process.
        exporter: Replaces the OTLP exporter.
    """

    def __init__(
        self,
        config: TelemetryConfig,
        process: str,
        instance: str,
        exporter: SpanExporter | None = None,
    ) -> None:
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.traces_sample)),
            resource=Resource(
                {
                    "service.name": f"coe-{process}",
                    "service.instance.id": instance,
                    "service.version": __version__,
                }
            ),
            shutdown_on_exit=False,
        )
        out = exporter or OTLPSpanExporter(endpoint=config.traces_url, timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(out))
        self._tracer = self._provider.get_tracer("coe", __version__)

    def stop(self) -> None:
        """Export the remaining spans; blocks until that is done."""
        self._provider.shutdown()

    def begin(self, given: Mapping[str, str], path: str, began_s: float) -> Trace:
        """Start the span of a request in the gateway.

        Args:
            given: The request's W3C trace headers.
            path: The request's path.
            began_s: Time of its arrival, of `time.monotonic`.
        """
        span = self._tracer.start_span(
            f"POST {path}",
            _PROPAGATOR.extract(given),
            SpanKind.SERVER,
            {"http.request.method": "POST", "http.route": path, "url.path": path},
            start_time=_epoch_ns(began_s),
        )
        return Trace(self._tracer, span, path)

    def pooled(self, call: Call, times: Times, fault: str) -> None:
        """Export the spans of a finished call in this pool."""
        operation = _OPERATIONS.get(call.endpoint, "other")
        span = self._tracer.start_span(
            f"{operation} {call.expert}",
            _PROPAGATOR.extract(call.trace),
            SpanKind.SERVER,
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "coe",
                "gen_ai.request.model": call.expert,
                "coe.tenant": call.tenant.name,
                "coe.request_id": call.request_id,
            },
            start_time=_epoch_ns(times.arrived_s),
        )
        if span.is_recording():
            inner = set_span_in_context(span)
            # A call that never started waited until its end.
            granted_s = times.began_s or times.ended_s
            queue = self._child("queue", inner, times.arrived_s, granted_s)
            if times.swap_s:
                # The last swap ends when the request starts, and there is rarely more than one.
                within = set_span_in_context(queue)
                self._child("swap", within, granted_s - times.swap_s, granted_s)
            if times.began_s:
                engine = set_span_in_context(
                    self._child("engine", inner, times.began_s, times.ended_s)
                )
                if call.stream and times.first_s:
                    self._child("prefill", engine, times.began_s, times.first_s)
                    self._child("decode", engine, times.first_s, times.ended_s)
        _end(span, fault, times.ended_s)

    def _child(self, name: str, parent: Context, began_s: float, ended_s: float) -> Span:
        span = self._tracer.start_span(name, parent, start_time=_epoch_ns(began_s))
        span.end(_epoch_ns(ended_s))
        return span


class Trace:
    """The spans of one request in the gateway."""

    def __init__(self, tracer: Any, span: Span, path: str) -> None:
        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span)
        self._operation = _OPERATIONS.get(path, "other")

    @property
    def trace_id(self) -> str:
        """The trace id in hex, for log lines."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def routed(self, category: str, confidence: float, began_s: float, route_s: float) -> None:
        """Export the span of parsing and classification."""
        span = self._tracer.start_span(
            "route",
            self._context,
            attributes={"coe.category": category, "coe.confidence": confidence},
            start_time=_epoch_ns(began_s),
        )
        span.end(_epoch_ns(began_s + route_s))

    def chose(self, began_s: float, took_s: float) -> None:
        """Export the span of the choice among candidates, after admission."""
        span = self._tracer.start_span("choose", self._context, start_time=_epoch_ns(began_s))
        span.end(_epoch_ns(began_s + took_s))

    def set_request(
        self, request_id: str, model: str, stream: bool, data: Mapping[str, Any]
    ) -> None:
        """Set the attributes that describe the client's request."""
        self._span.set_attribute("gen_ai.operation.name", self._operation)
        self._span.set_attribute("gen_ai.request.model", model)
        self._span.set_attribute("gen_ai.request.stream", stream)
        self._span.set_attribute("coe.request_id", request_id)
        for name, attribute in _NUMERIC_FIELDS.items():
            value = data.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._span.set_attribute(attribute, value)

    @contextmanager
    def attempt(self, expert: str, pool: str | None) -> Iterator[Mapping[str, str]]:
        """Trace one attempt at an expert.

        Args:
            expert: Name of the expert.
            pool: Its pool; None for a remote expert.

        Yields:
            W3C headers for the call.
        """
        span = self._tracer.start_span(
            f"{self._operation} {expert}",
            self._context,
            SpanKind.CLIENT,
            {
                "gen_ai.operation.name": self._operation,
                "gen_ai.provider.name": "coe" if pool is not None else "openai",
                "gen_ai.request.model": expert,
                "coe.pool": pool or "",
            },
        )
        headers: dict[str, str] = {}
        _PROPAGATOR.inject(headers, set_span_in_context(span))
        fault = "client_gone"
        try:
            yield headers
            fault = ""
        except CoeError as error:
            fault = error.code
            raise
        finally:
            _end(span, fault)

    def end(self, attributes: Mapping[str, str | int | float], fault: str) -> None:
        """End the request's span.

        Args:
            attributes: Attributes of the span.
            fault: The code of the error that ended the request; empty where it succeeded.
        """
        for name, value in attributes.items():
            self._span.set_attribute(name, value)
        _end(self._span, fault)


def _end(span: Span, fault: str, ended_s: float | None = None) -> None:
    if fault:
        span.set_attribute("error.type", fault)
        span.set_status(StatusCode.ERROR)
    span.end(_epoch_ns(ended_s) if ended_s is not None else None)


def _epoch_ns(monotonic_s: float) -> int:
    """Convert a time of `time.monotonic` to nanoseconds since 1970."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)
