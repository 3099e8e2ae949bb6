"""Limits of running processes, lowered and lifted again as an operator's `ulimit` would."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def limited(process: int, what: int, limit: int) -> Iterator[None]:
    """what: a resource.RLIMIT_*."""
    soft, hard = resource.prlimit(process, what)
    resource.prlimit(process, what, (limit, hard))
    try:
        yield
    finally:
        resource.prlimit(process, what, (soft, hard))
