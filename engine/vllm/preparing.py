"""Reads adapters in a thread, so that what a worker does between two steps is short."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Preparation(Generic[T]):
    """What was prepared last, by path. Loads come one at a time, so there is never more to keep.

    prepare: runs in the thread; what it raises, `take` raises.
    """

    def __init__(self, prepare: Callable[[str], T]) -> None:
        self._prepare = prepare
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="molehill-prepare")
        self._path = ""
        self._result: Future[T] | None = None

    def start(self, path: str) -> None:
        """Returns at once. Drops what was prepared before, unless it is the same."""
        if path != self._path or self._failed():
            self._path = path
            self._result = self._thread.submit(self._prepare, path)

    def done(self, path: str) -> bool:
        """Whether `take` would answer at once."""
        return path != self._path or self._result is None or self._result.done()

    def take(self, path: str) -> T:
        """What was prepared for `path`, or prepares it here and now. Raises what `prepare` does."""
        if path == self._path and self._result is not None:
            return self._result.result()
        return self._prepare(path)

    def drop(self, path: str) -> None:
        if path == self._path:
            self._path, self._result = "", None

    def _failed(self) -> bool:
        result = self._result
        return result is None or (result.done() and result.exception() is not None)
