"""What can be wrong with an adapter: where, what was found, what was expected."""

from pathlib import Path
from typing import Any


class AdapterError(ValueError):
    """An adapter that cannot be served.

    where: the file, tensor or field. `kind` is a stable name for machines (API error `type`).
    """

    kind = "adapter_error"

    def __init__(self, where: str | Path, found: Any, expected: Any) -> None:
        self.where, self.found, self.expected = str(where), str(found), str(expected)
        super().__init__(f"{self.where}: found {self.found}, expected {self.expected}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.where, self.found, self.expected)


class AdapterNotFoundError(AdapterError):
    """The path does not exist or is no directory."""

    kind = "adapter_not_found"


class ConfigError(AdapterError):
    """adapter_config.json is missing, malformed, or has a field of the wrong type or range."""

    kind = "invalid_config"


class UnsupportedError(AdapterError):
    """A well-formed adapter that asks for something molehill does not do."""

    kind = "unsupported"


class CorruptFileError(AdapterError):
    """A weights file that cannot be read safely or fully."""

    kind = "corrupt_file"


class MissingTensorError(AdapterError):
    """A router, or one half of a low-rank pair, is not in the file."""

    kind = "missing_tensor"


class ShapeError(AdapterError):
    """A tensor whose shape does not fit its partner or the base model."""

    kind = "wrong_shape"


class NonFiniteError(AdapterError):
    """A tensor with NaN or Inf."""

    kind = "non_finite"


class UnknownTargetError(AdapterError):
    """The adapter names a module that the base model does not have."""

    kind = "unknown_target"


class NothingBoundError(AdapterError):
    """The adapter changes nothing: serving it would be the base model in disguise."""

    kind = "nothing_bound"


class LimitError(AdapterError):
    """Rank, expert count or bytes over the configured limit."""

    kind = "limit_exceeded"


class BaseMismatchError(AdapterError):
    """The adapter was trained on a base model of another architecture or size."""

    kind = "base_mismatch"
