"""Requests as they go from the ingress to a replica, and the start of their answers."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

Headers = tuple[tuple[str, str], ...]

# Of one connection, not of what it carries; and what the next client writes itself.
HOP_BY_HOP = {
    "connection",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}

# By method: what any replica can answer. What changes a server would reach one of them.
ROUTES = {
    "GET": ("/health", "/v1/models"),
    "POST": (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
    ),
}


@dataclass(frozen=True)
class Asked:
    """path: with its query."""

    method: str
    path: str
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Head:
    """Of an answer, whose body comes after it."""

    status: int
    headers: Headers


def end_to_end(headers: Iterable[tuple[str, str]], also: Iterable[str] = ()) -> Headers:
    """Those that are passed on. also: lower-case names of further ones that are not."""
    dropped = {*HOP_BY_HOP, *also}
    return tuple((name, value) for name, value in headers if name.lower() not in dropped)


def is_routed(method: str, path: str) -> bool:
    """path: without its query."""
    listed = ROUTES.get(method, ())
    return path in listed or (method == "GET" and path.startswith("/v1/models/"))


def with_adapter(asked: Asked, base: str) -> tuple[Asked, str | None]:
    """The request as a server takes it, and the adapter that it names; None where it names the base
    or, to be refused by a server, nothing that could be read.

    `base:adapter`, as Ray Serve LLM has it, becomes `adapter`.
    """
    if asked.method != "POST":
        return asked, None
    try:
        document = json.loads(asked.body)
    except (ValueError, RecursionError):
        return asked, None
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, str) or model in ("", base):
        return asked, None
    adapter = model.removeprefix(f"{base}:")
    if adapter == model:
        return asked, model
    if not adapter:
        return asked, None
    return replace(asked, body=json.dumps({**document, "model": adapter}).encode()), adapter


def error_body(message: str, kind: str, status: int) -> dict[str, object]:
    """The OpenAI protocol's error shape."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
