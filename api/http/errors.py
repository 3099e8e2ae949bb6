"""Refusals as HTTP status, headers and OpenAI error body."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from molehill.api.adapters.errors import (
    BadLimitsError,
    BusyError,
    CannotPinError,
    EngineRefusedError,
    FetchError,
    ForbiddenPathError,
    ForbiddenSourceError,
    GenerationMismatchError,
    LimitReachedError,
    MergedIntoBaseError,
    NoEffectError,
    NotLoadedError,
    OutOfMemoryError,
    RequestError,
    RoutingBusyError,
    SourceChangedError,
    StoreError,
    TooManyAdaptersError,
    TooManyMixesError,
    UnknownModelError,
    UnknownParameterError,
    UploadStalledError,
    UploadTooLargeError,
    encodable,
)
from molehill.engine.adapter.errors import AdapterError, AdapterNotFoundError

# Of each refusal and of those that derive from it. Of others, see `status_of`.
STATUSES: Mapping[type[Exception], HTTPStatus] = {
    UnknownParameterError: HTTPStatus.UNPROCESSABLE_ENTITY,
    BadLimitsError: HTTPStatus.UNPROCESSABLE_ENTITY,
    UploadStalledError: HTTPStatus.REQUEST_TIMEOUT,
    UploadTooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    MergedIntoBaseError: HTTPStatus.CONFLICT,
    GenerationMismatchError: HTTPStatus.CONFLICT,
    ForbiddenPathError: HTTPStatus.FORBIDDEN,
    ForbiddenSourceError: HTTPStatus.FORBIDDEN,
    FetchError: HTTPStatus.BAD_GATEWAY,
    NotLoadedError: HTTPStatus.NOT_FOUND,
    UnknownModelError: HTTPStatus.NOT_FOUND,
    TooManyAdaptersError: HTTPStatus.INSUFFICIENT_STORAGE,
    BusyError: HTTPStatus.TOO_MANY_REQUESTS,
    LimitReachedError: HTTPStatus.TOO_MANY_REQUESTS,
    TooManyMixesError: HTTPStatus.TOO_MANY_REQUESTS,
    SourceChangedError: HTTPStatus.CONFLICT,
    StoreError: HTTPStatus.INSUFFICIENT_STORAGE,
    OutOfMemoryError: HTTPStatus.INSUFFICIENT_STORAGE,
    EngineRefusedError: HTTPStatus.SERVICE_UNAVAILABLE,
    RoutingBusyError: HTTPStatus.SERVICE_UNAVAILABLE,
    CannotPinError: HTTPStatus.CONFLICT,
    NoEffectError: HTTPStatus.UNPROCESSABLE_ENTITY,
    AdapterNotFoundError: HTTPStatus.NOT_FOUND,
    # What is left: a wrong request, and files that are no adapter for this server.
    RequestError: HTTPStatus.BAD_REQUEST,
    AdapterError: HTTPStatus.UNPROCESSABLE_ENTITY,
}


def status_of(error: RequestError | AdapterError) -> HTTPStatus:
    """That of the nearest class that has one."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def headers_of(error: RequestError | AdapterError) -> dict[str, str]:
    seconds = getattr(error, "retry_after", None)
    return {} if seconds is None else {"Retry-After": str(seconds)}


def body(message: str, kind: str, status: HTTPStatus, param: str | None = None) -> dict[str, Any]:
    """The OpenAI protocol's error shape, as vLLM writes it. param: the field that is wrong."""
    text = encodable(message)
    return {"error": {"message": text, "type": kind, "param": param, "code": status.value}}
