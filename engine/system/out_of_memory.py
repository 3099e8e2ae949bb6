"""Memory that is not to be had, on the host or on a device."""

import errno
from collections.abc import Iterator

import torch

from molehill.engine.adapter.errors import AdapterError

# Of those who raise no error of their own for it, and of what crossed a process boundary as text.
_SIGNS = (
    "allocate memory",
    "not enough memory",
    "bad_alloc",
    "os error 12",
    "can't start new thread",
    "CUDA out of memory",
    "HIP out of memory",
    "XPU out of memory",
    # The driver and its libraries, past torch's allocator: pinned memory, handles, workspaces.
    "CUDA error: out of memory",
    "HIP error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or one that it was raised from, says so: by its class, else by its text."""
    return any(_says_so(link) for link in _links(error))


def raise_if_out_of_memory(error: Exception) -> None:
    """Raises MemoryError in the place of such an error."""
    if is_out_of_memory(error):
        raise MemoryError(str(error)) from None


def _links(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _says_so(error: BaseException) -> bool:
    # torch.cuda.OutOfMemoryError is the same class.
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # Its text has what a file says in it.
    if isinstance(error, AdapterError):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return any(sign in str(error) for sign in _SIGNS)
