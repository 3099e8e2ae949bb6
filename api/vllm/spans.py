"""OpenTelemetry spans of what an adapter adds to a request, beside vLLM's `llm_request`.

They go where vLLM's go (`--otlp-traces-endpoint`): into the trace that the client's `traceparent`
names, or else into one of their own, which vLLM's span of the same request then joins.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.tracing.otel import extract_trace_context
from vllm.tracing.utils import SpanAttributes

from molehill.api.adapters.generation import Generation
from molehill.api.adapters.status import AdapterState
from molehill.api.vllm.request_scope import SlotWait, request_scope

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

# What W3C's trace context is in headers.
TraceHeaders = Mapping[str, str]

RESIDENCY, PROBE = "adapter_residency", "adapter_probe"


class Spans:
    """tracer: OpenTelemetry's, of a process that vLLM has set up for it."""

    def __init__(self, tracer: "Tracer") -> None:
        self._tracer = tracer

    @contextmanager
    def residency(
        self, generation: Generation, given: Mapping[str, Any]
    ) -> Iterator[Callable[[SlotWait], TraceHeaders]]:
        """Around a request's wait for a slot, of which one that ends in an error is a span too.

        given: what the engine is asked, by name. What is yielded is called with the wait when it is
        over, and returns what `llm_request` is to be traced by.
        """
        headers, start = given.get("trace_headers"), time.time_ns()
        request_id = {SpanAttributes.GEN_AI_REQUEST_ID: given.get("request_id", "")}

        def entered(wait: SlotWait) -> TraceHeaders:
            end = time.time_ns()
            # It may have begun before the engine was asked.
            span = self._start(RESIDENCY, generation, headers, end - round(wait.seconds * 1e9))
            span.set_attributes(
                {
                    **request_id,
                    "molehill.tier": wait.tier,
                    "molehill.wait_seconds": wait.seconds,
                    "molehill.probed": wait.probed,
                }
            )
            span.end(end)
            return headers or self._headers(span)

        try:
            yield entered
        except Exception as error:
            span = self._start(RESIDENCY, generation, headers, start)
            span.set_attributes(request_id)
            self._fail(span, error)
            span.end()
            raise

    @contextmanager
    def probe(self, generation: Generation) -> Iterator[TraceHeaders]:
        """Around a probe: what its requests are traced by. It belongs to the load that waits for
        it; that of an adapter which serves already, to no single request."""
        request = request_scope.get()
        loading = generation.status.state is AdapterState.LOADING
        headers = request.trace_headers if request is not None and loading else None
        span = self._start(PROBE, generation, headers, time.time_ns())
        try:
            yield self._headers(span)
        except Exception as error:
            self._fail(span, error)
            raise
        finally:
            span.end()

    def _start(
        self, name: str, generation: Generation, headers: TraceHeaders | None, start_ns: int
    ) -> "Span":
        from opentelemetry.context import Context

        # Without headers a trace of its own, whatever this task was started by.
        context: Any = extract_trace_context(headers) or Context()
        attributes = {
            "molehill.adapter": generation.name,
            "molehill.generation": generation.digest,
        }
        return self._tracer.start_span(
            name, context=context, attributes=attributes, start_time=start_ns
        )

    def _headers(self, span: "Span") -> TraceHeaders:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers, trace.set_span_in_context(span))
        return headers

    def _fail(self, span: "Span", error: Exception) -> None:
        """Of the error its class: messages name files of the server."""
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR, type(error).__name__))


async def spans_of(engine_client: Any) -> Spans | None:
    """None for an engine that is not traced."""
    if not await engine_client.is_tracing_enabled():
        return None
    # An import for those that trace.
    from opentelemetry import trace

    return Spans(trace.get_tracer("molehill"))
