"""Requests that ask for a mix of adapters: by a header, or by a field of a JSON body."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molehill.api.adapters.errors import BadMixError, RequestError
from molehill.api.adapters.mix import check_weights, parse, shown
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.http import errors
from molehill.api.http.auth import Kind, kind_of
from molehill.api.vllm.request_tracking import RequestScope, request_scope
from molehill.engine.adapter.errors import AdapterError

# As OpenAI's clients can send them: `extra_headers`, `extra_body`.
HEADER = "Molehill-Mix"
FIELD = "molehill"

# Bodies are not parsed for the sake of what most of them lack.
MARK = json.dumps(FIELD).encode()


class MixRequests:
    """Has the mix made, and the request run on it, before its route is found (pure ASGI)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = request_scope.get()
        if request is None or not may_ask(scope):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body = Body(receive)
        try:
            in_body = await body.mix() if is_json(headers) else None
            weights = chosen(headers.getlist(HEADER), in_body)
            if weights is not None:
                await run_on_mix(scope["app"].state.molehill.registry, request, weights)
        except (RequestError, AdapterError) as error:
            await refusal(error)(scope, body.receive, send)
            return
        await self._app(scope, body.receive, send)


def may_ask(scope: Scope) -> bool:
    """Whether it is for a route that computes an answer."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return kind_of("POST", path) is Kind.ASK


def is_json(headers: Headers) -> bool:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


class Body:
    """A request's body, which is read here once and goes on to the route."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []

    async def mix(self) -> Any:
        """What its field says, None where there is none. Raises BadMixError for other fields beside
        it; a body that is no JSON is its route's to refuse."""
        while not self._messages or self._messages[-1].get("more_body", False):
            self._messages.append(await self._receive())
        text = b"".join(message.get("body", b"") for message in self._messages)
        if MARK not in text:
            return None
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            return None
        fields = document.get(FIELD) if isinstance(document, dict) else None
        if fields is None:
            return None
        if not isinstance(fields, dict) or fields.keys() - {"mix"}:
            raise BadMixError(f'{FIELD}: found {shown(fields)}, expected {{"mix": ...}}')
        return fields.get("mix")

    async def receive(self) -> Message:
        return self._messages.pop(0) if self._messages else await self._receive()


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


def refusal(error: RequestError | AdapterError) -> JSONResponse:
    status = errors.status_of(error)
    body = errors.body(str(error), error.kind, status, param=FIELD)
    return JSONResponse(body, status.value, errors.headers_of(error))
