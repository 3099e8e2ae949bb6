"""Memory that is not to be had."""

import errno

from molehill.engine.errors import AdapterError

_SIGNS = (
    "allocate memory",
    "not enough memory",
    "bad_alloc",
    "os error 12",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """torch, safetensors and C++ say it with errors of their own, whose texts alone tell."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, AdapterError):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return any(sign in str(error) for sign in _SIGNS)


def raise_if_out_of_memory(error: Exception) -> None:
    """Raises MemoryError in the place of such an error."""
    if is_out_of_memory(error):
        raise MemoryError(str(error)) from None
