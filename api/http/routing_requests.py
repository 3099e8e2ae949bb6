"""Requests that ask what routers chose for their tokens: by a header, or a field of a JSON body."""

from collections.abc import Mapping
from typing import Any

from molehill.api.adapters.errors import BadRoutingError
from molehill.api.adapters.mix import shown
from molehill.api.vllm.routed_calls import RoutingAsked

# As OpenAI's clients can send it: `extra_headers`. Words of WORDS, with commas.
HEADER = "Molehill-Routing"
WORDS = ("experts", "weights", "usage")

# Whose answers have choices of their own tokens.
PATHS = ("/v1/completions", "/v1/chat/completions", "/inference/v1/generate")


def asked(in_headers: list[str], fields: Mapping[str, Any]) -> RoutingAsked | None:
    """None for a request that asks nothing. fields: of the body. Raises BadRoutingError."""
    words = in_header(in_headers) | in_body(fields.get("routing"))
    usage = fields.get("usage")
    if usage is not None and not isinstance(usage, bool):
        raise BadRoutingError(f"usage: found {shown(usage)}, expected true or false")
    if usage:
        words.add("usage")
    if not words:
        return None
    return RoutingAsked(bool(words & {"experts", "weights"}), "weights" in words, "usage" in words)


def in_header(values: list[str]) -> set[str]:
    words = {word.strip().lower() for value in values for word in value.split(",")}
    unknown = sorted(words - set(WORDS))
    if unknown:
        raise BadRoutingError(
            f"{HEADER}: found {shown(unknown[0])}, expected {', '.join(WORDS[:-1])} or {WORDS[-1]}"
        )
    return words


def in_body(value: Any) -> set[str]:
    if value is None or value is False:
        return set()
    if value is True or value == "experts":
        return {"experts"}
    if value == "weights":
        return {"weights"}
    raise BadRoutingError(f'routing: found {shown(value)}, expected true, false or "weights"')


def check_path(path: str) -> None:
    """Raises BadRoutingError for a route whose answer has no place for it."""
    if path.removesuffix("/") not in PATHS:
        raise BadRoutingError(f"routing: found a request of {path}, expected {', '.join(PATHS)}")
