"""Takes adapters in: from a source, checked, into the store, where nobody changes them any more."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from molehill.api.adapters.background import Background
from molehill.api.adapters.errors import OutOfMemoryError, StoreError
from molehill.api.adapters.generation import Content, Loading, content_of
from molehill.api.adapters.load_options import check_content
from molehill.api.adapters.reading import Reading, most_bytes
from molehill.api.adapters.source import Source
from molehill.api.adapters.store import AdapterStore
from molehill.engine.adapter.errors import AdapterError, CorruptFileError
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.model import Adapter
from molehill.engine.system.out_of_memory import is_out_of_memory

# What a disk answers that is full, or has a quota that is.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

P = ParamSpec("P")
T = TypeVar("T")
ReadAdapter = Callable[[Path, Layout | None, bool], Adapter]

# A source on its way here: entered in a thread, it is there; left, whatever was fetched is gone.
Fetch = AbstractContextManager[Source]


class Intake:
    """read: parses and validates a directory, in any thread, with the layout that a source names
    and what it says of the base; raises AdapterError. background: where it runs. memory: bytes that
    the largest adapter may take.

    reading: held by whoever reads an adapter there. What is not read waits, and says so.
    """

    def __init__(
        self, read: ReadAdapter, store: AdapterStore, background: Background, memory: int
    ) -> None:
        self._read = read
        self._store = store
        self._background = background
        self.reading = Reading(memory)

    async def take_in(
        self, loading: Loading, fetch: Fetch, expected: str | None
    ) -> tuple[Content, Source]:
        """What `fetch` brings, held in the store until `release`.

        expected: digest that it must have, None for any. Raises SourceChangedError, AdapterError,
        StoreError, OutOfMemoryError and what `fetch` raises.
        """
        loading.stage = "fetching"
        try:
            async with fetched(fetch) as source:
                size = await asyncio.to_thread(most_bytes, source.directory)
                async with self.reading.beside(size):
                    loading.stage = "reading"
                    read = self._background.run(self._read_into_store, source, expected)
                    return await read, source
        except (RuntimeError, MemoryError, OSError) as error:
            # What fetches it, and a thread to do that in, takes memory too.
            if is_out_of_memory(error):
                raise no_memory(loading.source) from None
            raise

    async def alone(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` returns or raises, which reads an adapter for something else."""
        async with self.reading:
            return await self._background.run(work, *args, **kwargs)

    async def release(self, digest: str) -> None:
        """In a thread: the store may be writing, and files take time to delete."""
        await asyncio.to_thread(self._store.release, digest)

    def _read_into_store(self, source: Source, expected: str | None) -> Content:
        try:
            adapter = self._read_untouched(source)
            check_content(source.label, adapter.digest, expected)
            return content_of(adapter, self._store.acquire(adapter, source.directory))
        except Exception as error:
            if is_out_of_memory(error):
                raise no_memory(source.label) from None
            if isinstance(error, OSError):
                raise StoreError(f"adapter store: {error.strerror}") from error
            raise

    def _read_untouched(self, source: Source) -> Adapter:
        """Raises AdapterError, SourceChangedError, OSError where there is no room to read it."""
        try:
            adapter = self._read(source.directory, source.asked_layout, source.asked_residual)
        except AdapterError as error:
            # Half of one file and half of another are not the client's fault.
            source.check_untouched()
            raise source.relabel_error(error) from error
        except OSError as error:
            if error.errno in NO_ROOM or is_out_of_memory(error):
                raise
            source.check_untouched()
            raise CorruptFileError(source.label, error.strerror, "a readable directory") from error
        source.check_untouched()
        return adapter


def no_memory(label: str) -> OutOfMemoryError:
    return OutOfMemoryError(f"{label}: found no memory to read it into, expected some")


# Of their own: a source that keeps its readers waiting must not hold up files and digests.
FETCHERS = ThreadPoolExecutor(128, thread_name_prefix="molehill-fetch")


@asynccontextmanager
async def fetched(fetch: Fetch) -> AsyncIterator[Source]:
    """Enters and leaves `fetch` in a thread."""
    loop = asyncio.get_running_loop()
    source = await loop.run_in_executor(FETCHERS, fetch.__enter__)
    try:
        yield source
    finally:
        await loop.run_in_executor(FETCHERS, fetch.__exit__, None, None, None)
