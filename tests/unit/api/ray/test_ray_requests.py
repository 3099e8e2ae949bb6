"""What the ingress reads of a request."""

import json

import pytest

from molehill.api.ray.requests import Asked, end_to_end, is_routed, with_adapter


def asked(body: bytes, method: str = "POST") -> Asked:
    return Asked(method, "/v1/completions", (), body)


@pytest.mark.parametrize(
    ("model", "sent", "adapter"),
    [
        ("base", "base", None),
        ("sql", "sql", "sql"),
        ("base:sql", "sql", "sql"),
        ("base:team/sql:v2", "team/sql:v2", "team/sql:v2"),
        ("team/sql:v2", "team/sql:v2", "team/sql:v2"),
        ("base:", "base:", None),
        ("", "", None),
    ],
)
def test_an_adapter_is_named_by_itself_or_after_the_base(
    model: str, sent: str, adapter: str | None
) -> None:
    request, name = with_adapter(asked(json.dumps({"model": model, "n": 1}).encode()), "base")
    assert name == adapter
    assert json.loads(request.body) == {"model": sent, "n": 1}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"{}", b'{"model": 3}', b"\xff", b"[" * 100_000]
)
def test_what_cannot_be_read_goes_to_a_server_as_it_is(body: bytes) -> None:
    request = asked(body)
    assert with_adapter(request, "base") == (request, None)


def test_only_what_any_replica_can_answer_is_routed() -> None:
    assert is_routed("POST", "/v1/chat/completions")
    assert is_routed("GET", "/v1/models/team/sql")
    for method, path in (
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/adapters"),
        ("DELETE", "/v1/adapters/sql"),
        ("POST", "/v1/models/sql"),
        ("GET", "/metrics"),
        ("POST", "/collective_rpc"),
    ):
        assert not is_routed(method, path)


def test_headers_of_a_connection_stay_with_it() -> None:
    headers = (("Authorization", "k"), ("Connection", "close"), ("Content-Length", "3"))
    assert end_to_end(headers) == (headers[0], headers[2])
    assert end_to_end(headers, ("content-length",)) == headers[:1]
