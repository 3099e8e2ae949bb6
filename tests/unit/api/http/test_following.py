"""Which requests a process without a registry answers, and which it has the owner answer."""

from typing import Any

import pytest

from molehill.api.http.following import may_answer, model_in

JSON = "application/json; charset=utf-8"


def scope(path: str, method: str = "POST", **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    encoded = [(name.lower().encode(), value.encode()) for name, value in named.items()]
    return {"type": "http", "method": method, "path": path, "headers": encoded}


@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/v1/responses"],
)
def test_it_answers_what_asks_a_model_for_something(path: str) -> None:
    assert may_answer(scope(path, content_type=JSON), ())


@pytest.mark.parametrize(
    "request_scope",
    [
        scope("/v1/completions", method="GET", content_type=JSON),
        scope("/v1/completions", content_type="text/plain"),
        scope("/v1/completions"),
        scope("/v1/audio/transcriptions", content_type="multipart/form-data; boundary=x"),
        scope("/v1/completions", content_type=JSON, Molehill_Mix="a=1"),
        scope("/v1/completions", content_type=JSON, Molehill_Routing="experts"),
        scope("/v1/adapters", content_type=JSON),
        scope("/v1/load_lora_adapter", content_type=JSON),
        scope("/pause", content_type=JSON),
        scope("/metrics", method="GET"),
        scope("/v1/responses", content_type=JSON),
        scope("/v1/responses/r/cancel", content_type=JSON),
    ],
    ids=lambda given: f"{given['method']} {given['path']}",
)
def test_the_owner_answers_all_else(request_scope: Any) -> None:
    assert not may_answer(request_scope, ("/invocations", "/v1/responses"))


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model": "a"}', "a"),
        (b'{"model": "a", "model": "b"}', "b"),
        ('{"model": "ä"}'.encode("utf-16"), "ä"),
        (b'{"model": ""}', None),
        (b'{"model": null}', None),
        (b'{"model": 3}', None),
        (b"{}", None),
        (b"[]", None),
        (b"{", None),
        (b"", None),
        (b"[" * 100_000, None),
        (b"\xff", None),
    ],
    ids=lambda given: repr(given)[:20],
)
def test_a_bodys_model_is_what_its_route_will_read(body: bytes, model: str | None) -> None:
    assert model_in(body) == model
