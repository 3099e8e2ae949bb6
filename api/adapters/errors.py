"""What a request about adapters can be refused for."""


class RequestError(Exception):
    """A refusal. `kind` is a stable name for machines: the error body's `type`.

    retry_after: seconds after which the same request may succeed, or None.
    """

    kind = "bad_request"
    retry_after: int | None = None


class BadNameError(RequestError):
    """An adapter name that cannot be served."""

    kind = "invalid_name"


class BadMixError(RequestError):
    """A mix that is none: no adapters, too many, or weights that are no numbers within bounds."""

    kind = "invalid_mix"


class BadLimitsError(RequestError):
    """Limits of an adapter's traffic that are none."""

    kind = "invalid_limits"


class BadRoutingError(RequestError):
    """What a request asks to be told of its routing, where it cannot be."""

    kind = "invalid_routing"


class RoutingBusyError(RequestError):
    """No memory, for now, to keep what routers choose for one more request."""

    kind = "routing_memory_taken"
    retry_after = 1


class BadPathError(RequestError):
    """A path, repository or URL that is none."""

    kind = "invalid_path"


class UnknownParameterError(RequestError):
    """A query parameter that the route does not have."""

    kind = "unknown_parameter"


class BadUploadError(RequestError):
    """A body that holds no adapter's files, or not all of them."""

    kind = "invalid_upload"


class UploadTooLargeError(RequestError):
    """A body of more bytes than an upload may have."""

    kind = "upload_too_large"


class UploadStalledError(RequestError):
    """A client that sends nothing more of a body that is not at its end."""

    kind = "upload_stalled"


class AlreadyLoadedError(RequestError):
    """The name serves other weights, and the request did not ask to replace them."""

    kind = "already_loaded"


class MergedIntoBaseError(RequestError):
    """The adapter is part of the base weights: it can be neither replaced nor unloaded."""

    kind = "merged_into_base"


class GenerationMismatchError(RequestError):
    """The name does not serve the generation that the request expects."""

    kind = "generation_mismatch"


class ForbiddenPathError(RequestError):
    """The path, or a file below it, leads out of the adapter roots."""

    kind = "path_forbidden"


class ForbiddenSourceError(RequestError):
    """A repository or URL that this server may not fetch from."""

    kind = "source_forbidden"


class FetchError(RequestError):
    """A repository or URL that could not be fetched."""

    kind = "fetch_failed"


class NotLoadedError(RequestError):
    """No adapter of that name is served. The 404 of routes that change or show adapters."""

    kind = "adapter_not_loaded"

    @classmethod
    def of(cls, name: str) -> "NotLoadedError":
        return cls(f"The lora adapter {name!a} cannot be found.")


class UnknownModelError(RequestError):
    """No base model and no adapter of that name is served. The 404 of routes that ask a model for
    something, see molehill.api.http.unknown_model."""

    # As vLLM calls it, and says it.
    kind = "NotFoundError"

    def __init__(self, name: str) -> None:
        super().__init__(f"The model `{name}` does not exist.")


class TooManyAdaptersError(RequestError):
    """The server holds as many names as it may."""

    kind = "too_many_adapters"


class BusyError(RequestError):
    """As many loads are on their way as may be."""

    kind = "too_many_loads"
    retry_after = 1


class TooManyMixesError(RequestError):
    """As many mixes by request are in use as may be."""

    kind = "too_many_mixes"
    retry_after = 1


class LimitReachedError(RequestError):
    """An adapter is asked for more than its limits allow."""

    kind = "adapter_limit_reached"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SourceChangedError(RequestError):
    """The source does not hold what it held when the adapter was loaded, or was checked."""

    kind = "source_changed"


class StoreError(RequestError):
    """The disk that holds the canonical copies would not take one more."""

    kind = "store_failed"


class OutOfMemoryError(RequestError):
    """This process had no memory to read the adapter."""

    kind = "out_of_memory"


class EngineRefusedError(RequestError):
    """The engine could not take a valid adapter, for want of memory or slots."""

    kind = "engine_refused"


class NoRoomError(EngineRefusedError):
    """The workers' memory for adapters is spent, for now."""


class NotProbedError(EngineRefusedError):
    """The engine gave no answer that shows whether the adapter has an effect. Not its fault."""


class CannotPinError(RequestError):
    """One more pin would leave no slot for adapters that are not pinned."""

    kind = "cannot_pin"


class NoEffectError(RequestError):
    """The adapter does not change the base model's answer to the probe prompt."""

    kind = "no_effect"


class NotActivatedError(RequestError):
    """The adapter acts on every token: nothing activates it."""

    kind = "not_activated"


class NotInvokedError(RequestError):
    """A prompt without the tokens that activate the adapter."""

    # As vLLM calls it.
    kind = "BadRequestError"


def encodable(message: str) -> str:
    """`message` with escapes for lone surrogates; names of files that are no UTF-8 have them."""
    return message.encode(errors="backslashreplace").decode()
