"""Spans of waits and probes, in OpenTelemetry's own memory exporter."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from support.world import World
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import SamplingParams

from molehill.api.adapters.errors import NoEffectError
from molehill.api.adapters.generation import Generation
from molehill.api.vllm.request_scope import RequestScope, request_scope
from molehill.api.vllm.spans import Spans

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Spans:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Spans(provider.get_tracer("test"))


def play(world: World, scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario(world), 60))


async def ask(w: World, name: str, request_id: str = "id", params: Any = None, **more: Any) -> None:
    outputs = w.engine.generate("p", params, request_id, lora_request=w.served[name], **more)
    assert [output async for output in outputs] == ["first", "last"]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_wait_says_where_the_adapter_was(
    tmp_path: Path, spans: Spans, exporter: InMemorySpanExporter
) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        for number, name in enumerate("ab"):
            await w.load(name, number)
        for name in ("b", "a"):
            await ask(w, name, f"of-{name}", trace_headers=HEADERS)
        assert w.engine.traced[-2:] == [HEADERS, HEADERS]

    play(World(tmp_path, slots=1, spans=spans), scenario)
    finished = exporter.get_finished_spans()
    assert {span.name for span in finished} == {"adapter_residency"}
    seen = [
        [attributes(span)[key] for key in ("molehill.adapter", "molehill.tier")]
        for span in finished
    ]
    assert seen == [["b", "worker"], ["a", "host"]]
    for span in finished:
        assert span.parent is not None
        assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
        assert attributes(span)["gen_ai.request.id"] == f"of-{attributes(span)['molehill.adapter']}"


def test_a_wait_that_ends_in_a_refusal_is_a_span_with_the_error(
    tmp_path: Path, spans: Spans, exporter: InMemorySpanExporter
) -> None:
    async def scenario(w: World) -> None:
        w.engine.capacity = 1
        await w.load("a", 1)
        await w.load("pinned", 2, pinned=True)
        with pytest.raises(GracefulHTTPError):
            await ask(w, "a")

    play(World(tmp_path, spans=spans), scenario)
    (span,) = exporter.get_finished_spans()
    assert (span.status.status_code, span.status.description) == (
        StatusCode.ERROR,
        "GracefulHTTPError",
    )


def test_steps_of_a_beam_search_are_one_span(
    tmp_path: Path, spans: Spans, exporter: InMemorySpanExporter
) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        await w.load("a", 1)
        token = request_scope.set(RequestScope())
        for step in range(3):
            beam = SamplingParams(max_tokens=1, detokenize=False)
            await ask(w, "a", f"x-{step:016x}-beam-0", beam)
        request_scope.reset(token)

    play(World(tmp_path, spans=spans), scenario)
    assert len(exporter.get_finished_spans()) == 1


def test_a_probe_belongs_to_its_load_alone(
    tmp_path: Path, spans: Spans, exporter: InMemorySpanExporter
) -> None:
    """One that was put off runs beside some request, which may be of another adapter."""

    async def probe(generation: Generation) -> None:
        with spans.probe(generation) as headers:
            assert headers.keys() == {"traceparent"}
            if generation.name == "bad":
                raise NoEffectError("nothing")

    async def scenario(w: World) -> None:
        w.engine.more.set()
        token = request_scope.set(RequestScope(trace_headers=HEADERS))
        await w.load("first", 1)
        await w.load("late", 2, eager=False)
        await ask(w, "late", trace_headers=HEADERS)
        with pytest.raises(NoEffectError):
            await w.load("bad", 3)
        request_scope.reset(token)

    play(World(tmp_path, slots=1, probe=probe, spans=spans), scenario)
    finished = exporter.get_finished_spans()
    probes = {
        attributes(span)["molehill.adapter"]: span
        for span in finished
        if span.name == "adapter_probe"
    }
    traces = {name: f"{span.context.trace_id:032x}" for name, span in probes.items()}
    assert (traces["first"], traces["bad"]) == (TRACE, TRACE)
    assert traces["late"] != TRACE
    assert probes["late"].parent is None
    assert probes["bad"].status.status_code is StatusCode.ERROR
    (wait,) = [attributes(span) for span in finished if span.name == "adapter_residency"]
    assert (wait["molehill.adapter"], wait["molehill.probed"]) == ("late", True)
