"""The application: `serve run molehill.api.ray.application:application model=MODEL`."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from molehill.api.ray.replica import Replica
from molehill.api.ray.requests import (
    Asked,
    Head,
    end_to_end,
    error_body,
    is_routed,
    with_adapter,
)
from molehill.api.ray.settings import RaySettings

logger = logging.getLogger("ray.serve")

# How often a request that no replica has begun to answer is given to one, and the pause between.
ATTEMPTS = 5
PAUSE_SECONDS = 0.5
UNAVAILABLE = 503
EVENTS = "text/event-stream"


class Ingress:
    """Reads which adapter a request names, and passes it to a replica.

    A request that was not begun to be answered is given to another replica; one that was ends with
    an error.
    """

    def __init__(self, replicas: Any, base: str) -> None:
        """replicas: a DeploymentHandle. base: the base's name."""
        self._replicas = replicas
        self._base = base

    async def __call__(self, request: Request) -> Response:
        path = request.url.path
        if not is_routed(request.method, path):
            return refusal(404, f"no such route here: {request.method} {path[:200]}")
        query = f"?{request.url.query}" if request.url.query else ""
        headers = end_to_end(request.headers.items(), ("content-length", "accept-encoding"))
        asked = Asked(request.method, f"{path}{query}", headers, await request.body())
        asked, adapter = with_adapter(asked, self._base)
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE_SECONDS)
            # The second time anybody may have it, not only who is said to have the adapter.
            replicas = self._replicas.options(
                stream=True, multiplexed_model_id=adapter or "" if attempt == 0 else ""
            )
            parts = replicas.answer.remote(asked, adapter)
            try:
                head = await anext(parts)
            except BackPressureError:
                return refusal(UNAVAILABLE, "too many requests wait for a replica")
            except Exception as error:
                if not is_loss(error):
                    raise
                logger.warning("a replica was lost before it answered: %s", type(error).__name__)
                continue
            if head.status != UNAVAILABLE or attempt == ATTEMPTS - 1:
                return answer(head, parts)
        return refusal(UNAVAILABLE, "no replica answered")


def is_loss(error: Exception) -> bool:
    """Of the replica, or of its server; not a fault in what was asked."""
    return isinstance(error, RayActorError | aiohttp.ClientConnectionError)


def answer(head: Head, parts: AsyncIterator[Any]) -> Response:
    types = [value for name, value in head.headers if name.lower() == "content-type"]
    events = any(value.startswith(EVENTS) for value in types)
    response = StreamingResponse(rest(parts, events), status_code=head.status)
    response.raw_headers = [(n.lower().encode(), v.encode("latin-1")) for n, v in head.headers]
    return response


async def rest(parts: AsyncIterator[Any], events: bool) -> AsyncIterator[bytes]:
    """events: the last one says that the answer broke off, as clients would not see otherwise."""
    try:
        async for part in parts:
            yield part
    except Exception as error:
        logger.warning("an answer broke off: %s", type(error).__name__)
        if not events:
            raise
        text = json.dumps(error_body("the server was lost", "InternalServerError", 500))
        yield f"data: {text}\n\n".encode()


def refusal(status: int, message: str) -> Response:
    kinds = {404: "NotFoundError", UNAVAILABLE: "ServiceUnavailableError"}
    headers = {"Retry-After": "1"} if status == UNAVAILABLE else None
    return JSONResponse(error_body(message, kinds[status], status), status, headers)


def application(settings: RaySettings) -> serve.Application:
    """Replicas of one model behind one ingress. Ray Serve checks what it is given."""
    replicas = serve.deployment(Replica, name="molehill").options(**settings.deployment())
    ingress = serve.deployment(Ingress, name="ingress").options(
        max_ongoing_requests=settings.max_ongoing_requests * settings.max_replicas,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replicas.bind(settings), settings.base)
