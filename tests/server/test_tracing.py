"""Spans of a real server at an OpenTelemetry collector: what an adapter adds to a request."""

import uuid

from support.api_client import Api, eventually
from support.collector import Collector, ReceivedSpan

CLIENT_SPAN = "00f067aa0ba902b7"


def new_trace() -> tuple[str, dict[str, str]]:
    """(id, headers of a client that is traced)."""
    trace = uuid.uuid4().hex
    return trace, {"traceparent": f"00-{trace}-{CLIENT_SPAN}-01"}


def traced(collector: Collector, trace: str, *names: str) -> list[ReceivedSpan]:
    """Its spans of these names, once they have come."""
    assert eventually(lambda: collector.of(trace).keys() >= set(names)), collector.of(trace)
    return [collector.of(trace)[name] for name in names]


def test_a_request_has_its_adapter_and_the_wait_for_it_in_the_clients_trace(
    clean: Api, collector: Collector
) -> None:
    assert clean.load("traced", "dynmole-soft").status_code == 200
    generation = clean.http.get("/v1/adapters/traced").json()["generation"]
    trace, headers = new_trace()
    clean.complete("traced", [5, 6, 7], 2, extra_headers=headers)
    ours, vllms = traced(collector, trace, "adapter_residency", "llm_request")
    assert ours.parent == vllms.parent == CLIENT_SPAN
    assert ours.attributes["molehill.adapter"] == "traced"
    assert ours.attributes["molehill.generation"] == generation
    assert ours.attributes["molehill.tier"] == "worker"
    assert ours.attributes["molehill.probed"] is False
    assert ours.attributes["gen_ai.request.id"] == vllms.attributes["gen_ai.request.id"]
    seconds = (ours.end - ours.start) / 1e9
    assert abs(seconds - ours.attributes["molehill.wait_seconds"]) < 1e-6
    assert ours.end <= vllms.end
    assert not ours.error


def test_vllms_span_joins_ours_where_the_client_is_not_traced(
    clean: Api, collector: Collector
) -> None:
    assert clean.load("alone", "dynmole-soft").status_code == 200
    clean.complete("alone", [5, 6, 7], 2)
    assert eventually(lambda: collector.named("adapter_residency", "alone"))
    (ours,) = collector.named("adapter_residency", "alone")
    assert ours.parent == ""
    (vllms,) = traced(collector, ours.trace, "llm_request")
    assert vllms.parent == ours.span


def test_a_load_has_its_probe_in_the_clients_trace(clean: Api, collector: Collector) -> None:
    trace, headers = new_trace()
    body = {"name": "probed", "source": "dynmole-soft"}
    answer = clean.http.post("/v1/adapters", json=body, headers=headers)
    assert answer.status_code == 200
    probe, vllms = traced(collector, trace, "adapter_probe", "llm_request")
    assert (probe.parent, vllms.parent) == (CLIENT_SPAN, probe.span)
    assert probe.attributes["molehill.adapter"] == "probed"
    assert probe.attributes["molehill.generation"] == answer.json()["generation"]
    assert (probe.start, probe.error) <= (vllms.start, "")


def test_the_base_model_has_vllms_span_alone(api: Api, collector: Collector) -> None:
    trace, headers = new_trace()
    api.complete("tiny", [5, 6, 7], 2, extra_headers=headers)
    traced(collector, trace, "llm_request")
    assert collector.of(trace).keys() == {"llm_request"}
