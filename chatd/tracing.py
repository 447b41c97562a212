"""Traces, where the extra `chatd[otel]` is installed and the configuration asks for them.

Without, nothing of OpenTelemetry is imported. Spans hold names, numbers and ids, and nothing that was
said.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from chatd.errors import PluginError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

outgoing: ContextVar[Mapping[str, str] | None] = ContextVar("outgoing", default=None)
"""Headers that tell a service which span it is called in; None while nothing is traced."""

CLOSE_MILLIS = 3000
"""How long the last spans may take to be sent."""


class Tracing:
    """Makes spans, and sends them over OTLP to where the standard variables `OTEL_…` say.

    Raises `PluginError` when the extra is not installed.

    :param version: chatd's own.
    """

    def __init__(self, version: str) -> None:
        try:
            from opentelemetry import context, trace  # noqa: PLC0415 (an extra)
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.resources import (  # noqa: PLC0415
                OTELResourceDetector,
                Resource,
            )
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
                TraceContextTextMapPropagator,
            )
        except ImportError:
            raise PluginError(
                'server.tracing needs OpenTelemetry: pip install "chatd[otel]"'
            ) from None
        own = Resource.create({"service.name": "chatd", "service.version": version})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("chatd", version)
        self._propagator = TraceContextTextMapPropagator()
        self._trace, self._context = trace, context

    def close(self) -> None:
        """Sends what is left, for so long; blocks meanwhile."""
        self._provider.force_flush(CLOSE_MILLIS)
        self._provider.shutdown()

    def begin(
        self,
        name: str,
        kind: str,
        attributes: Mapping[str, Any],
        *,
        since: float | None = None,
        parent: Span | None = None,
    ) -> Span:
        """A span that begins, within the current one or within `parent`.

        :param kind: `server`, `client` or `internal`.
        :param since: when it began, on `time.monotonic`, if not now.
        """
        within = self._trace.set_span_in_context(parent) if parent is not None else None
        return self._tracer.start_span(
            name,
            context=within,
            kind=self._trace.SpanKind[kind.upper()],
            attributes={key: value for key, value in attributes.items() if value is not None},
            start_time=None if since is None else unix_nanoseconds(since),
        )

    def end(
        self,
        span: Span,
        attributes: Mapping[str, Any],
        *,
        error: str | None = None,
        at: float | None = None,
    ) -> None:
        """Ends a span.

        :param error: the kind of what went wrong; no text, which may be anybody's words.
        :param at: when it ended, on `time.monotonic`, if not now.
        """
        for key, value in attributes.items():
            if value is not None:
                span.set_attribute(key, value)
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(self._trace.StatusCode.ERROR)
        span.end(None if at is None else unix_nanoseconds(at))

    @property
    def is_within(self) -> bool:
        """Whether anything is traced of what goes on in this task."""
        return self._trace.get_current_span().get_span_context().is_valid

    def enter(self, span: Span) -> None:
        """Makes a span the current one for the rest of the task."""
        self._context.attach(self._trace.set_span_in_context(span))

    @contextmanager
    def within(self, span: Span) -> Iterator[None]:
        """Makes a span the current one for a while, and for the tasks that begin meanwhile."""
        token = self._context.attach(self._trace.set_span_in_context(span))
        try:
            yield
        finally:
            self._context.detach(token)

    def enter_caller(self, headers: Mapping[str, str]) -> None:
        """Makes the span current that the caller's `traceparent` names, if there is one."""
        given = {name: headers.get(name, "") for name in ("traceparent", "tracestate")}
        self._context.attach(self._propagator.extract(given))

    def call_within(self, span: Span) -> None:
        """Lets services that are called from this task on be told of a span."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._trace.set_span_in_context(span))
        outgoing.set(carrier)


def unix_nanoseconds(moment: float) -> int:
    """A moment on `time.monotonic`, in nanoseconds of Unix time."""
    return time.time_ns() - round((time.monotonic() - moment) * 1e9)
