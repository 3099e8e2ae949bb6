"""What a request about adapters can be refused for, as HTTP status and OpenAI error body."""

from http import HTTPStatus
from typing import Any

from molehill.engine.adapter.errors import AdapterError, AdapterNotFoundError


class RequestError(Exception):
    """A refusal. `kind` is a stable name for machines: the error body's `type`.

    retry_after: seconds after which the same request may succeed, or None.
    """

    status = HTTPStatus.BAD_REQUEST
    kind = "bad_request"
    retry_after: int | None = None


class BadNameError(RequestError):
    """An adapter name that cannot be served."""

    kind = "invalid_name"


class BadPathError(RequestError):
    """A path, repository or URL that is none."""

    kind = "invalid_path"


class UnknownParameterError(RequestError):
    """A query parameter that the route does not have."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    kind = "unknown_parameter"


class AlreadyLoadedError(RequestError):
    """The name serves other weights, and the request did not ask to replace them."""

    kind = "already_loaded"


class MergedIntoBaseError(RequestError):
    """The adapter is part of the base weights: it can be neither replaced nor unloaded."""

    status = HTTPStatus.CONFLICT
    kind = "merged_into_base"


class GenerationMismatchError(RequestError):
    """The name does not serve the generation that the request expects."""

    status = HTTPStatus.CONFLICT
    kind = "generation_mismatch"


class ForbiddenPathError(RequestError):
    """The path, or a file below it, leads out of the adapter roots."""

    status = HTTPStatus.FORBIDDEN
    kind = "path_forbidden"


class ForbiddenSourceError(RequestError):
    """A repository or URL that this server may not fetch from."""

    status = HTTPStatus.FORBIDDEN
    kind = "source_forbidden"


class FetchError(RequestError):
    """A repository or URL that could not be fetched."""

    status = HTTPStatus.BAD_GATEWAY
    kind = "fetch_failed"


class NotLoadedError(RequestError):
    """No adapter of that name is served."""

    status = HTTPStatus.NOT_FOUND
    kind = "adapter_not_loaded"


class UnknownModelError(RequestError):
    """No base model and no adapter of that name is served."""

    status = HTTPStatus.NOT_FOUND
    # As vLLM calls it.
    kind = "NotFoundError"


class TooManyAdaptersError(RequestError):
    """The server holds as many names as it may."""

    status = HTTPStatus.INSUFFICIENT_STORAGE
    kind = "too_many_adapters"


class BusyError(RequestError):
    """As many loads are on their way as may be."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    kind = "too_many_loads"
    retry_after = 1


class SourceChangedError(RequestError):
    """The source does not hold what it held when the adapter was loaded, or was checked."""

    status = HTTPStatus.CONFLICT
    kind = "source_changed"


class StoreError(RequestError):
    """The disk that holds the canonical copies would not take one more."""

    status = HTTPStatus.INSUFFICIENT_STORAGE
    kind = "store_failed"


class OutOfMemoryError(RequestError):
    """This process had no memory to read the adapter."""

    status = HTTPStatus.INSUFFICIENT_STORAGE
    kind = "out_of_memory"


class EngineRefusedError(RequestError):
    """The engine could not take a valid adapter, for want of memory or slots."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    kind = "engine_refused"


class NoRoomError(EngineRefusedError):
    """The workers' memory for adapters is spent, for now."""


class NotProbedError(EngineRefusedError):
    """The engine gave no answer that shows whether the adapter has an effect. Not its fault."""


class CannotPinError(RequestError):
    """One more pin would leave no slot for adapters that are not pinned."""

    status = HTTPStatus.CONFLICT
    kind = "cannot_pin"


class NoEffectError(RequestError):
    """The adapter does not change the base model's answer to the probe prompt."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    kind = "no_effect"


def status_of(error: RequestError | AdapterError) -> HTTPStatus:
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, AdapterNotFoundError):
        return HTTPStatus.NOT_FOUND
    return HTTPStatus.UNPROCESSABLE_ENTITY


def headers_of(error: RequestError | AdapterError) -> dict[str, str]:
    seconds = getattr(error, "retry_after", None)
    return {} if seconds is None else {"Retry-After": str(seconds)}


def encodable(message: str) -> str:
    """`message` with escapes for lone surrogates; names of files that are no UTF-8 have them."""
    return message.encode(errors="backslashreplace").decode()


def body(message: str, kind: str, status: HTTPStatus, param: str | None = None) -> dict[str, Any]:
    """The OpenAI protocol's error shape, as vLLM writes it. param: the field that is wrong."""
    text = encodable(message)
    return {"error": {"message": text, "type": kind, "param": param, "code": status.value}}
