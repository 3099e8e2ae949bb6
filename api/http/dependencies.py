"""What the routes work with, and how they answer and document refusals."""

import logging
from collections.abc import Callable, Coroutine, Set
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, ClassVar

from fastapi import Depends, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from molehill.api.adapters.background import Background
from molehill.api.adapters.errors import RequestError, UnknownParameterError
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.followers.messages import Welcome
from molehill.api.http import errors
from molehill.api.metrics.worker_stats import WorkerStats
from molehill.api.sources.desired_state import DesiredStateReconciler
from molehill.api.sources.fetch import Sources
from molehill.api.sources.restore import Restore
from molehill.api.sources.uploads import Uploads
from molehill.api.vllm.routed_experts import RoutedExperts
from molehill.api.vllm.served_models import ServedModels, ServedPaths
from molehill.engine.adapter.errors import AdapterError

# Below vLLM's logger, whose handlers are the only ones that a server has.
logger = logging.getLogger("vllm.molehill")

# Of what a client may write into the log: fields of one body, and letters of each.
LOGGED_FIELDS, LOGGED_LETTERS = 5, 40


@dataclass(frozen=True)
class Services:
    """scraping: where metrics are put into text: of a thousand adapters that takes as long as some
    steps do, and the event loop streams meanwhile. adapters_file: None for a server that follows
    none. routed_experts: None for one that gives no mixture's choices as vLLM's field. welcome: of
    processes that follow this one."""

    registry: AdapterRegistry
    sources: Sources
    uploads: Uploads
    stats: WorkerStats
    restore: Restore
    models: ServedModels
    scraping: Background
    welcome: Welcome
    adapters_file: DesiredStateReconciler | None = None
    routed_experts: RoutedExperts | None = None

    @property
    def names(self) -> ServedPaths:
        """That are shown to who asks for another model."""
        return self.models.names


def services(request: Request) -> Services:
    services: Services = request.app.state.molehill
    return services


Injected = Annotated[Services, Depends(services)]


class StrictBody(BaseModel):
    """A misspelt field is an error, not a default."""

    model_config = ConfigDict(extra="forbid", strict=True)


class VllmBody(BaseModel):
    """As vLLM: what it does not know is ignored. A misspelt field is at least told in the log."""

    model_config = ConfigDict(extra="allow", strict=True)
    route: ClassVar[str]

    def model_post_init(self, _: Any) -> None:
        unknown = list(self.model_extra or ())
        if unknown:
            shown = ", ".join(ascii(name[:LOGGED_LETTERS]) for name in unknown[:LOGGED_FIELDS])
            more = len(unknown) - LOGGED_FIELDS
            logger.warning(
                "%s: ignored fields that it does not know: %s%s",
                self.route,
                shown,
                f" and {more} more" if more > 0 else "",
            )


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class StrictRoute(APIRoute):
    """Answers refusals with error bodies, a misspelt query parameter too: it could be the condition
    of a deletion."""

    def unguarded(self) -> Handler:
        """What refuses by raising."""
        return super().get_route_handler()

    def get_route_handler(self) -> Handler:
        handler = self.unguarded()
        known = {parameter.alias for parameter in self.dependant.query_params}

        async def strict(request: Request) -> Response:
            try:
                check_parameters(request.query_params.keys(), known)
                return await handler(request)
            except (RequestError, AdapterError) as error:
                status = errors.status_of(error)
                body = errors.body(str(error), error.kind, status)
                return JSONResponse(body, status.value, errors.headers_of(error))

        return strict


def check_parameters(given: Set[str], known: Set[str]) -> None:
    """Raises UnknownParameterError."""
    unknown = sorted(given - known)
    if unknown:
        expected = ", ".join(sorted(known)) or "none"
        raise UnknownParameterError(
            f"query parameters: found {unknown[0][:100]!a}, expected {expected}"
        )


async def answer_http_error(_: Request, error: Exception) -> Response:
    """Of a path or method that no route has, and of a body that is no text: vLLM's own handler sees
    neither, and they too have the protocol's error body."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    body = errors.body(str(error.detail), status.name.lower(), status)
    return JSONResponse(body, status.value, error.headers)


class ErrorDetails(BaseModel):
    """type: a stable name for machines. code: the HTTP status."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorBody(BaseModel):
    """The OpenAI protocol's error."""

    error: ErrorDetails


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's documentation: what it refuses beside a missing key and a wrong parameter."""
    return {status: {"model": ErrorBody} for status in (401, *statuses, 422)}


# Of a route that changes the server: a body that is none, and a key that is not the admin key.
CHANGES = (400, 403)
# Of a load, what can be wrong with its source, its name, its time and this server's memory.
LOADS = (*CHANGES, 404, 409, 429, 502, 503, 507)
