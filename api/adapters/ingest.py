"""Takes adapters in: from a source, checked, into the store, where nobody changes them any more."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from molehill.api.adapters.background import Background
from molehill.api.adapters.chat import AdapterChat, ReadChat, digest_of
from molehill.api.adapters.errors import OutOfMemoryError, StoreError
from molehill.api.adapters.generation import Content, Loading, content_of
from molehill.api.adapters.load_options import LoadOptions, check_content
from molehill.api.adapters.mix import Mix
from molehill.api.adapters.read_budget import ReadBudget, most_bytes
from molehill.api.adapters.source import Source
from molehill.api.adapters.store import AdapterStore
from molehill.engine.adapter.errors import AdapterError, CorruptFileError
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native
from molehill.engine.system.out_of_memory import is_out_of_memory
from molehill.engine.transform.weighted_sum import Part

# What a disk answers that is full, or has a quota that is.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

P = ParamSpec("P")
T = TypeVar("T")
ReadAdapter = Callable[[Path, Layout | None, bool, int | None], Adapter]
Combine = Callable[[Sequence[Part]], Adapter]

# A source on its way here: entered in a thread, it is there; left, whatever was fetched is gone.
Fetch = AbstractContextManager[Source]


class Intake:
    """read: parses and validates a directory, in any thread, with the layout that a source names
    and what it says of the base; raises AdapterError. combine: sums up and validates; likewise.
    background: where they run. memory: bytes that the largest adapter may take. read_chat: see
    ReadChat; None where all chat as the base does. num_tokens: of the base's own vocabulary.

    read_budget: bounds what is read at a time. What waits for it is still `fetching`.
    """

    def __init__(
        self,
        read: ReadAdapter,
        combine: Combine,
        store: AdapterStore,
        background: Background,
        memory: int,
        read_chat: ReadChat | None = None,
        num_tokens: int | None = None,
    ) -> None:
        self._read = read
        self._combine = combine
        self._read_chat = read_chat
        self._num_tokens = num_tokens
        self._store = store
        self._background = background
        self.read_budget = ReadBudget(memory)

    async def take_in(
        self, loading: Loading, fetch: Fetch, options: LoadOptions | None = None
    ) -> tuple[Content, Source]:
        """What `fetch` brings, held in the store until `release`.

        options: its `content` and `chat` must be the source's. Raises SourceChangedError,
        AdapterError, StoreError, OutOfMemoryError and what `fetch` raises.
        """
        loading.stage = "fetching"
        try:
            async with fetched(fetch) as source:
                size = await asyncio.to_thread(self._most_bytes, source)
                async with self.read_budget.beside(size):
                    loading.stage = "reading"
                    read = self._background.run(
                        self._read_into_store, source, options or LoadOptions()
                    )
                    return await read, source
        except (RuntimeError, MemoryError, OSError) as error:
            # What fetches it, and a thread to do that in, takes memory too.
            if is_out_of_memory(error):
                raise no_memory(loading.source) from None
            raise

    async def alone(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` returns or raises, which reads an adapter for something else."""
        async with self.read_budget:
            return await self._background.run(work, *args, **kwargs)

    def copy(self, digest: str) -> Path:
        """Where the store has what is held there by that digest."""
        return self._store.path(digest)

    async def release(self, content: Content) -> None:
        """In a thread: the store may be writing, and files take time to delete."""
        await asyncio.to_thread(self._store.release, content.digest)
        if content.chat is not None:
            await asyncio.to_thread(self._store.release_chat, content.chat.digest)

    def chat_of(self, source: Source) -> AdapterChat | None:
        """How the source's adapter is talked to. Raises AdapterError, OSError."""
        if self._read_chat is None:
            return None
        if source.canonical:
            return self._store.read_chat(source.chat) if source.chat else None
        return self._read_chat(source.directory)

    def _read_into_store(self, source: Source, options: LoadOptions) -> Content:
        try:
            if source.mix is not None and not source.canonical:
                adapter, chat = self._sum_up(source), None
            else:
                adapter, chat = self._read_untouched(source)
            if chat is not None and (
                options.chat_template == "base" or digest_of(chat.tokens_alone) == options.chat
            ):
                chat = chat.tokens_alone
            check_content(source.label, adapter.digest, options.content)
            if self._read_chat is not None:
                check_content(f"{source.label}: tokenizer", digest_of(chat), options.chat)
            path = self._store.acquire(adapter, source.directory)
            content = content_of(adapter, path, chat, self._num_tokens)
            if chat is not None:
                self._acquire_chat(chat, content)
            return content
        except Exception as error:
            if is_out_of_memory(error):
                raise no_memory(source.label) from None
            if isinstance(error, OSError):
                raise StoreError(f"adapter store: {error.strerror}") from error
            raise

    def _acquire_chat(self, chat: AdapterChat, content: Content) -> None:
        try:
            self._store.acquire_chat(chat)
        except Exception:
            self._store.release(content.digest)
            raise

    def _most_bytes(self, source: Source) -> int:
        if source.mix is None or source.canonical:
            return most_bytes(source.directory)
        return sum(most_bytes(self.copy(digest)) for digest, _ in source.mix.key)

    def _sum_up(self, source: Source) -> Adapter:
        """Of the parts' copies, which somebody holds, in an order that does not depend on how the
        mix is written. Raises AdapterError, StoreError."""
        assert source.mix is not None
        return self._combine([self._part(source.mix, *part) for part in source.mix.key])

    def _part(self, mix: Mix, digest: str, weight: float) -> Part:
        name = mix.name_of(digest)
        try:
            return Part(name, native.read_stored(self.copy(digest)), weight)
        except CorruptFileError as error:
            raise StoreError(f"{name}: its copy in the store is damaged; load it again") from error

    def _read_untouched(self, source: Source) -> tuple[Adapter, AdapterChat | None]:
        """Raises AdapterError, SourceChangedError, OSError where there is no room to read it."""
        try:
            asked = (source.asked_layout, source.asked_residual, source.asked_non_granular)
            adapter = self._read(source.directory, *asked)
            chat = self.chat_of(source)
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
        return adapter, chat


def no_memory(label: str) -> OutOfMemoryError:
    return OutOfMemoryError(f"{label}: the server ran out of memory while reading the adapter")


# Of their own: a source that keeps its readers waiting must not hold up files and digests.
FETCHERS = ThreadPoolExecutor(128, thread_name_prefix="molehill-fetch")


@asynccontextmanager
async def fetched(fetch: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enters and leaves `fetch` in a thread."""
    loop = asyncio.get_running_loop()
    entered = await loop.run_in_executor(FETCHERS, fetch.__enter__)
    try:
        yield entered
    finally:
        await loop.run_in_executor(FETCHERS, fetch.__exit__, None, None, None)
