"""What the routes work with, and how they answer refusals."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from molehill.api import errors
from molehill.api.registry import AdapterRegistry
from molehill.api.restart import Restart
from molehill.api.sources import Sources
from molehill.api.stats import WorkerStats
from molehill.engine.errors import AdapterError


@dataclass(frozen=True)
class Services:
    """models: vLLM's OpenAIServingModels."""

    registry: AdapterRegistry
    sources: Sources
    stats: WorkerStats
    restart: Restart
    models: Any


def services(request: Request) -> Services:
    found: Services = request.app.state.molehill
    return found


Injected = Annotated[Services, Depends(services)]


class StrictBody(BaseModel):
    """A misspelt field is an error, not a default."""

    model_config = ConfigDict(extra="forbid", strict=True)


Handler = Callable[..., Awaitable[Any]]


def answering_errors(handler: Handler) -> Handler:
    """Turns refusals into error bodies. Not an exception handler of the app: vLLM has its own."""

    @wraps(handler)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return await handler(*args, **kwargs)
        except (errors.RequestError, AdapterError) as error:
            status = errors.status_of(error)
            body = errors.body(str(error), error.kind, status)
            return JSONResponse(body, status.value, errors.headers_of(error))

    return wrapped
