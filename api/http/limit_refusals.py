"""Answers of requests that a limit refuses, an adapter's or the routing memory's, whatever their
route makes of it."""

from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molehill.api.adapters.errors import LimitReachedError
from molehill.api.http import errors
from molehill.api.vllm.request_scope import request_scope


class LimitRefusals:
    """Puts the refusal in the place of its route's answer (pure ASGI): vLLM's error bodies name no
    limit, and say nobody when to come back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = request_scope.get()
        if request is None or scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        replaced = False

        async def answer(message: Message) -> None:
            nonlocal replaced
            if replaced:
                return
            error = request.refused
            begins = message["type"] == "http.response.start"
            if error is not None and begins and message["status"] >= HTTPStatus.BAD_REQUEST:
                replaced = True
                status = errors.status_of(error)
                param = "model" if isinstance(error, LimitReachedError) else "molehill"
                body = errors.body(str(error), error.kind, status, param)
                response = JSONResponse(body, status.value, errors.headers_of(error))
                await response(scope, receive, send)
                return
            await send(message)

        await self._app(scope, receive, answer)
