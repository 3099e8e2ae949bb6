"""What a request about adapters can be refused for, as HTTP status and OpenAI error body."""

from http import HTTPStatus
from typing import Any

from molehill.engine.errors import AdapterError, AdapterNotFoundError


class RequestError(Exception):
    """A refusal. `kind` is a stable name for machines: the error body's `type`."""

    status = HTTPStatus.BAD_REQUEST
    kind = "bad_request"


class BadNameError(RequestError):
    """An adapter name that cannot be served."""

    kind = "invalid_name"


class BadPathError(RequestError):
    """A path that is no path."""

    kind = "invalid_path"


class AlreadyLoadedError(RequestError):
    """The name serves other weights, and the request did not ask to replace them."""

    kind = "already_loaded"


class MergedIntoBaseError(RequestError):
    """The adapter is part of the base weights: it can be neither replaced nor unloaded."""

    status = HTTPStatus.CONFLICT
    kind = "merged_into_base"


class ForbiddenPathError(RequestError):
    """The path, or a file below it, leads out of the adapter roots."""

    status = HTTPStatus.FORBIDDEN
    kind = "path_forbidden"


class NotLoadedError(RequestError):
    """No adapter of that name is served."""

    status = HTTPStatus.NOT_FOUND
    kind = "adapter_not_loaded"


class EngineRefusedError(RequestError):
    """The engine could not take a valid adapter, for want of memory or slots."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    kind = "engine_refused"


def status_of(error: RequestError | AdapterError) -> HTTPStatus:
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, AdapterNotFoundError):
        return HTTPStatus.NOT_FOUND
    return HTTPStatus.UNPROCESSABLE_ENTITY


def body(message: str, kind: str, status: HTTPStatus) -> dict[str, Any]:
    """The OpenAI protocol's error shape, as vLLM writes it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status.value}}
