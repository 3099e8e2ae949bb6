"""The header that names the generation which answers."""

from http import HTTPStatus

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError
from vllm.tracing.utils import extract_trace_headers

from molehill.api.vllm.request_scope import RequestScope, request_scope

HEADER = "Molehill-Generation"


class Refused(Exception):
    """Ends a route whose answer must not begin."""


class GenerationHeader:
    """Names the generation in the header of every answer that an adapter gave (pure ASGI).

    A stream begins when its adapter is there, so that a refusal has its own status.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers = Headers(scope=scope)
        request = RequestScope(
            path.removesuffix("/"),
            request_id=headers.get("x-request-id", ""),
            trace_headers=extract_trace_headers(headers) or None,
        )

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start" and request.leases:
                try:
                    if message["status"] == HTTPStatus.OK:
                        await request.begin(begins_events(message))
                except GracefulHTTPError as error:
                    await refusal(error)(scope, receive, send)
                    raise Refused from error
                generation = next(iter(request.leases.values())).generation
                MutableHeaders(scope=message)[HEADER] = generation.digest
            await send(message)

        token = request_scope.set(request)
        try:
            await self._app(scope, receive, named)
        except Refused:
            pass
        finally:
            request_scope.reset(token)
            request.end()


def begins_events(start: Message) -> bool:
    return Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream")


def refusal(error: GracefulHTTPError) -> Response:
    """As vLLM's routes answer it where they do not stream."""
    body = create_error_response(error)
    return JSONResponse(body.model_dump(), body.error.code)
