"""What a request says to molehill alone: by headers, or by a field of its JSON body."""

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molehill.api.adapters.errors import BadMixError, RequestError
from molehill.api.adapters.mix import shown
from molehill.api.http import errors, mix_requests, routing_requests
from molehill.api.http.auth import Kind, kind_of
from molehill.api.http.routed_answers import RoutedAnswers
from molehill.api.vllm.request_scope import request_scope
from molehill.engine.adapter.errors import AdapterError

# As OpenAI's clients can send it: `extra_body`.
FIELD = "molehill"
FIELDS = ("mix", "routing", "usage")

# Bodies are not parsed for the sake of what most of them lack. JSON may escape a letter of the name
# and come in UTF-16 or UTF-32, which have zeros.
MARK = re.compile(json.dumps(FIELD).encode() + rb"|\\u006|\x00")


class RequestFields:
    """Has a mix made, and the request run on it, before its route is found; has what routers choose
    for it put into its answer (pure ASGI)."""

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
            fields = await body.fields() if is_json(headers) else {}
            weights = mix_requests.chosen(headers.getlist(mix_requests.HEADER), fields.get("mix"))
            request.routing = routing_requests.asked(
                headers.getlist(routing_requests.HEADER), fields
            )
            if request.routing is not None:
                routing_requests.check_path(path_of(scope))
            if weights is not None:
                registry = scope["app"].state.molehill.registry
                await mix_requests.run_on_mix(registry, request, weights)
        except (RequestError, AdapterError) as error:
            await refusal(error)(scope, body.receive, send)
            return
        if request.routing is not None:
            send = RoutedAnswers(request, send)
        await self._app(scope, body.receive, send)


def path_of(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def may_ask(scope: Scope) -> bool:
    """Whether it is for a route that computes an answer."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    return kind_of("POST", path_of(scope)) is Kind.ASK


def is_json(headers: Headers) -> bool:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


class Body:
    """A request's body, which is read here once and goes on to the route."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []

    async def text(self) -> bytes:
        """All of it; what there is where the client has gone."""
        while not self._messages or self._messages[-1].get("more_body", False):
            self._messages.append(await self._receive())
        return b"".join(message.get("body", b"") for message in self._messages)

    async def fields(self) -> Mapping[str, Any]:
        """Of its field for molehill, empty where there is none. Raises BadMixError for others than
        FIELDS; a body that is no JSON is its route's to refuse."""
        text = await self.text()
        if MARK.search(text) is None:
            return {}
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            return {}
        fields = document.get(FIELD) if isinstance(document, dict) else None
        if fields is None:
            return {}
        if not isinstance(fields, dict) or fields.keys() - set(FIELDS):
            expected = " or ".join(f'{{"{name}": ...}}' for name in FIELDS)
            raise BadMixError(f"{FIELD}: found {shown(fields)}, expected {expected}")
        return fields

    async def receive(self) -> Message:
        return self._messages.pop(0) if self._messages else await self._receive()


def refusal(error: RequestError | AdapterError) -> JSONResponse:
    status = errors.status_of(error)
    body = errors.body(str(error), error.kind, status, param=FIELD)
    return JSONResponse(body, status.value, errors.headers_of(error))
