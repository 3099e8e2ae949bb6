"""Requests that ask for a mix of adapters: by a header, or by a field of a JSON body."""

from collections.abc import Mapping
from typing import Any

from molehill.api.adapters.errors import BadMixError
from molehill.api.adapters.mix import check_weights, parse
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.vllm.request_scope import RequestScope

# As OpenAI's clients can send it: `extra_headers`.
HEADER = "Molehill-Mix"


def chosen(in_headers: list[str], in_body: Any) -> dict[str, float] | None:
    """Raises BadMixError."""
    if in_headers and in_body is not None:
        raise BadMixError(f"mix: found one in {HEADER} and one in the body, expected one")
    if in_headers:
        return parse(", ".join(in_headers))
    return None if in_body is None else check_weights(in_body)


async def run_on_mix(
    registry: AdapterRegistry, request: RequestScope, weights: Mapping[str, float]
) -> None:
    lease = await registry.mixes.lease(weights, request.request)
    # vLLM takes a request without a model for one of the base.
    request.run_on(lease, {*weights, *registry.base_models, None, ""})
