"""Requests to an API process without a registry: it answers those that ask a model for something,
each admitted by the owner of the registry first. The owner answers all others, through it."""

import json
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from molehill.api.followers.followed_adapters import FollowedAdapters
from molehill.api.followers.owner import OwnerGoneError
from molehill.api.http import mix_requests, routing_requests
from molehill.api.http.auth import is_below
from molehill.api.http.forwarding import Forwarder, send_owner_gone
from molehill.api.http.request_fields import MARK, Body, is_json, may_ask, path_of
from molehill.api.vllm.request_scope import request_scope
from molehill.api.vllm.served_models import ServedPaths

# Requests that the owner alone can answer: it makes mixes, and asks the workers for routing.
OWNERS_HEADERS = (mix_requests.HEADER, routing_requests.HEADER)


@dataclass(frozen=True)
class FollowerServices:
    """base_models: names that need no admission. names: that are shown to who asks for another.
    owners: paths below which the owner answers all."""

    followed: FollowedAdapters
    forward: Forwarder
    base_models: Collection[str]
    names: ServedPaths
    owners: tuple[str, ...] = ()


class Following:
    """Pure ASGI, inside of GenerationHeader."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = request_scope.get()
        if scope["type"] != "http" or request is None:
            await self._app(scope, receive, send)
            return
        services: FollowerServices = scope["app"].state.molehill
        if not may_answer(scope, services.owners):
            await services.forward(scope, receive, send)
            return
        body = Body(receive)
        text = await body.text()
        if MARK.search(text) is not None:
            await services.forward(scope, body.receive, send)
            return
        model = model_in(text)
        if model is None or model in services.base_models:
            await self._app(scope, body.receive, send)
            return
        try:
            async with services.followed.admitted(model, request.request) as served:
                if served:
                    await self._app(scope, body.receive, send)
        except OwnerGoneError:
            await send_owner_gone(scope, send)
            return
        if not served:
            # Who says so also says what is served instead.
            await services.forward(scope, body.receive, send)


def may_answer(scope: Scope, owners: tuple[str, ...]) -> bool:
    """Whether it asks for an answer that needs nothing of the owner but an adapter. owners: see
    FollowerServices."""
    headers = Headers(scope=scope)
    return (
        may_ask(scope)
        and is_json(headers)
        and not any(name in headers for name in OWNERS_HEADERS)
        and not is_below(path_of(scope), owners)
    )


def model_in(text: bytes) -> str | None:
    """What a body asks; None of the base, and of a body that its route will refuse."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    model = document.get("model") if isinstance(document, dict) else None
    return model if isinstance(model, str) and model else None
