"""What each name stands for: the weights that it serves, or why it serves none.

Names that nobody has given, or that were taken away, have no entry.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any
from weakref import WeakValueDictionary

from molehill.api.adapters.errors import NotLoadedError
from molehill.api.adapters.generation import Failure, Generation, Loading, failure_of

# Of a name that should serve and does not, or not yet.
Absent = Failure | Loading


class NameTable:
    """Names to their current generation, to the failure of a name that a restart, a watched root or
    the adapters file should serve, or to the load that a restart is still to begin.

    served: names to the engine's requests, where the engine looks a request's model up; written
    here. changed: awaited by whoever has changed names, or their pins.
    """

    def __init__(self, served: dict[str, Any]) -> None:
        self.changed: Callable[[], Coroutine[Any, Any, None]] = nothing_to_write
        self._served = served
        self._entries: dict[str, Generation | Absent] = {}
        # Weak, so that a lock lives only while somebody holds it or waits for it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def lock(self, name: str) -> asyncio.Lock:
        """Held by whoever changes what the name serves."""
        return self._locks.setdefault(name, asyncio.Lock())

    def __len__(self) -> int:
        return len(self._served)

    def __iter__(self) -> Iterator[Generation]:
        """What is served, in the order in which the names came to serve."""
        return (entry for entry in self._entries.values() if isinstance(entry, Generation))

    def get(self, name: str) -> Generation | None:
        entry = self._entries.get(name)
        return entry if isinstance(entry, Generation) else None

    def current(self, name: str) -> Generation:
        """Raises NotLoadedError."""
        generation = self.get(name)
        if generation is None:
            raise NotLoadedError.of(name)
        return generation

    @property
    def failures(self) -> dict[str, Failure]:
        return {name: e for name, e in self._entries.items() if isinstance(e, Failure)}

    @property
    def awaited(self) -> dict[str, Loading]:
        return {name: e for name, e in self._entries.items() if isinstance(e, Loading)}

    def serve(self, generation: Generation) -> None:
        """The name points at it from here on."""
        self.dismiss(generation.name)
        self._entries[generation.name] = generation
        self._served[generation.name] = generation.request
        generation.status.serve()

    def withdraw(self, generation: Generation) -> bool:
        """The name serves nothing any more; False if it does not serve this generation."""
        if self.get(generation.name) is not generation:
            return False
        del self._entries[generation.name]
        del self._served[generation.name]
        return True

    def await_load(self, loading: Loading) -> None:
        """Of a name that nothing is known of yet."""
        self._entries[loading.name] = loading

    def fail(self, name: str, source: str, error: Exception, desired: bool = False) -> None:
        """Notes why a name that should serve does not, unless it does by now. desired: see
        Source."""
        if self.get(name) is None:
            self._entries[name] = failure_of(name, source, error, desired)

    def dismiss(self, name: str) -> Absent | None:
        """Of a name that should serve and does not: it need not any more. None if it is no such
        name."""
        absent = self._entries.get(name)
        if absent is None or isinstance(absent, Generation):
            return None
        del self._entries[name]
        return absent


async def nothing_to_write() -> None:
    """Where no restart is to know of it."""
