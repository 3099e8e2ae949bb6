"""Which adapters are served: the one place that knows, in the one API process.

A name points at its current generation: one version of the weights, with an engine id of its own.
Replacing or unloading a name retires the generation. What runs on it finishes on it, then its
memory goes.
"""

import asyncio
import errno
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from vllm.exceptions import VLLMNotFoundError
from vllm.lora.request import LoRARequest

from molehill.api import names
from molehill.api.admission import Admission
from molehill.api.background import Background
from molehill.api.errors import (
    AlreadyLoadedError,
    BusyError,
    CannotPinError,
    EngineRefusedError,
    MergedIntoBaseError,
    NotLoadedError,
    OutOfMemoryError,
    StoreError,
    TooManyAdaptersError,
)
from molehill.api.generation import (
    Content,
    Failure,
    Generation,
    Loaded,
    Loading,
    content_of,
)
from molehill.api.paths import Source
from molehill.api.residency import Residency
from molehill.api.store import AdapterStore
from molehill.api.terms import Anything, Expected, Terms, check_content, check_expected
from molehill.engine.adapter import Adapter
from molehill.engine.errors import AdapterError, CorruptFileError
from molehill.engine.memory import is_out_of_memory

# Below vLLM's logger, whose handlers are the only ones that a server has.
logger = logging.getLogger("vllm.molehill")

# What a disk answers that is full, or has a quota that is.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

T = TypeVar("T")
Reader = Callable[[Path], Adapter]
Probe = Callable[[Generation], Awaitable[None]]

# A source on its way here: entered in a thread, it is there; left, whatever was fetched is gone.
Fetch = AbstractContextManager[Source]


class AdapterRegistry:
    """Loads, replaces and unloads adapters by name. All methods run on the event loop's thread.

    read: parses and validates a directory; runs in a thread, raises AdapterError.
    served: name to LoRARequest, which vLLM looks a request's model up in; the registry writes it.
    probe: raises RequestError for a generation that must not be served, or None.
    failures: names that a restart or a watched root should serve, and why they do not.
    changed: called after the names or their pins have changed.
    resident: name and digest of the adapter that is merged into the base weights.
    background: reads.
    """

    def __init__(
        self,
        residency: Residency,
        read: Reader,
        store: AdapterStore,
        served: dict[str, Any],
        base_models: Collection[str],
        admission: Admission = Admission(),  # noqa: B008
        probe: Probe | None = None,
        resident: tuple[str, str] | None = None,
        background: Background | None = None,
    ) -> None:
        self.residency = residency
        self.events = residency.events
        self.changed: Callable[[], Awaitable[None]] = nobody_told
        self._read = read
        self._store = store
        self._served = served
        self._base_models = base_models
        self._admission = admission
        self._probe = probe
        self._resident = resident
        self._current: dict[str, Generation] = {}
        self._alive: dict[int, Generation] = {}
        self._loading: list[Loading] = []
        self.failures: dict[str, Failure] = {}
        self._ids = itertools.count(1)
        # Weak, so that a lock lives only while somebody holds it or waits for it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._background = background or Background()
        # What is not read waits, and says so.
        self._reading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._current)

    def __iter__(self) -> Iterator[Generation]:
        """What the names point at."""
        return iter(self._current.values())

    def get(self, name: str) -> Generation | None:
        return self._current.get(name)

    def alive(self) -> list[Generation]:
        """Every generation that still takes memory or disk, retired ones too."""
        return list(self._alive.values())

    def loading(self) -> list[Loading]:
        """The loads on their way."""
        return list(self._loading)

    async def load(self, name: str, label: str, fetch: Fetch, terms: Terms | None = None) -> Loaded:
        """Serves what `fetch` brings as `name`; when this returns, it serves.

        label: the source as the client wrote it. The same bytes again change nothing. Raises
        BadNameError, BusyError, TooManyAdaptersError, GenerationMismatchError, AlreadyLoadedError,
        MergedIntoBaseError, AdapterError, StoreError, EngineRefusedError, and what `fetch` and the
        probe raise; then everything is as before.
        """
        with self.events.load():
            names.check(name, self._base_models)
            self._admit_load(name)
            loading = Loading(name, label)
            self._loading.append(loading)
            return await self._see_through(self._load(loading, fetch, terms or Terms()))

    async def unload(self, name: str, expected: Expected = Anything) -> Generation:
        """Takes the name away at once; memory goes when the last running request ends.

        Raises NotLoadedError, GenerationMismatchError, MergedIntoBaseError.
        """
        return await self._see_through(self._unload(name, expected))

    async def dismiss(self, name: str) -> Failure | None:
        """Forgets a name that should serve and does not, if it is one."""
        failure = self.failures.pop(name, None)
        if failure is not None:
            await self.changed()
        return failure

    async def pin(self, name: str, pinned: bool) -> Generation:
        """Keeps the name's adapter in the workers, or lets it be taken out when idle.

        Raises NotLoadedError, CannotPinError, EngineRefusedError.
        """
        return await self._see_through(self._pin(name, pinned))

    def admit(self, request: Any) -> Generation:
        """The generation that a request runs on, the current one of its name if its own retired.

        Raises VLLMNotFoundError (404) if the name is gone: the base must never answer for it.
        """
        generation = self._alive.get(request.lora_int_id)
        if generation is None or generation.retired:
            generation = self._current.get(request.lora_name)
        if generation is None:
            raise VLLMNotFoundError(f"The model `{request.lora_name}` does not exist.")
        return generation

    def enter(self, generation: Generation) -> None:
        generation.in_flight += 1

    def leave(self, generation: Generation) -> None:
        generation.in_flight -= 1
        if generation.retired and not generation.in_flight:
            self._spawn(self._free(generation))

    def _admit_load(self, name: str) -> None:
        """Before anything is fetched, read or allocated."""
        if len(self._loading) >= self._admission.loads:
            raise BusyError(
                f"loads: found {len(self._loading)} on their way, expected fewer than "
                f"{self._admission.loads}"
            )
        coming = {loading.name for loading in self._loading} - self._current.keys()
        taken = len(self._current) + len(coming)
        is_new = name not in self._current and name not in coming
        if is_new and taken >= self._admission.adapters:
            raise TooManyAdaptersError(
                f"adapters: found {taken}, expected fewer than {self._admission.adapters}; "
                "unload one first"
            )

    async def _load(self, loading: Loading, fetch: Fetch, terms: Terms) -> Loaded:
        try:
            async with self._lock(loading.name):
                old = self._current.get(loading.name)
                check_expected(loading.name, old, terms.expected)
                content, source = await self._take_in(loading, fetch, terms.content)
                if self._is_resident_otherwise(loading.name, content.digest):
                    await self._let_go(content.digest)
                    raise MergedIntoBaseError(
                        f"The lora adapter '{loading.name}' is merged into the base weights with "
                        "other weights than these. It cannot be replaced; restart the server to "
                        "change it."
                    )
                if old is not None and (old.digest == content.digest or not terms.replace):
                    await self._let_go(content.digest)
                    if old.digest == content.digest:
                        return await self._unchanged(old, source, terms)
                    raise AlreadyLoadedError(
                        f"The lora adapter '{loading.name}' has already been loaded with other "
                        "weights. If you want to replace them, set 'load_inplace' to True."
                    )
                new = await self._install(loading, content, source, old, terms)
                await self._switch(new)
                if old is not None:
                    await self._retire(old)
                return Loaded(new, "loaded" if old is None else "replaced")
        finally:
            self._loading.remove(loading)

    def _is_resident_otherwise(self, name: str, digest: str) -> bool:
        if self._resident is None:
            return False
        resident, merged = self._resident
        return name == resident and digest != merged

    async def _unchanged(self, old: Generation, source: Source, terms: Terms) -> Loaded:
        old.source = source
        if terms.pinned is not None:
            await self._bring_and_pin(old, terms.pinned)
        await self.changed()
        return Loaded(old, "unchanged")

    async def _switch(self, new: Generation) -> None:
        self._current[new.name] = new
        self._served[new.name] = new.request
        self.failures.pop(new.name, None)
        logger.info("Loaded adapter %s: %s, %s", new.name, new.content.kind, new.digest)
        await self.changed()

    async def _take_in(
        self, loading: Loading, fetch: Fetch, expected: str | None
    ) -> tuple[Content, Source]:
        """Into the store, where nobody changes it any more."""
        loading.stage = "fetching"
        async with fetched(fetch) as source, self._reading:
            loading.stage = "reading"
            return await self._background.run(self._read_into_store, source, expected), source

    def _read_into_store(self, source: Source, expected: str | None) -> Content:
        try:
            adapter = self._read_untouched(source)
            check_content(source.label, adapter.digest, expected)
            return content_of(adapter, self._store.acquire(adapter, source.directory))
        except OSError as error:
            raise StoreError(f"adapter store: {error.strerror}") from error
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(
                    f"{source.label}: found no memory to read it into, expected some"
                ) from None
            raise

    def _read_untouched(self, source: Source) -> Adapter:
        """Raises AdapterError, SourceChangedError, OSError where there is no room to read it."""
        try:
            adapter = self._read(source.directory)
        except AdapterError as error:
            # Half of one file and half of another are not the client's fault.
            source.check_untouched()
            raise source.relabel_error(error) from error
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise CorruptFileError(source.label, error.strerror, "a readable directory") from error
        source.check_untouched()
        return adapter

    async def _install(
        self,
        loading: Loading,
        content: Content,
        source: Source,
        old: Generation | None,
        terms: Terms,
    ) -> Generation:
        request = LoRARequest(loading.name, next(self._ids), str(content.path))
        generation = Generation(loading.name, content, source, request)
        self._alive[request.lora_int_id] = generation
        self.enter(generation)
        try:
            if terms.eager or not self.residency.full:
                await self._try_out(loading, generation, old, terms)
        except Exception as error:
            generation.retired = True
            generation.in_flight -= 1
            await self._free(generation)
            if isinstance(error, EngineRefusedError):
                message = source.relabel(str(error)).replace(str(content.path), source.label)
                raise type(error)(message) from error
            raise
        self.leave(generation)
        return generation

    async def _try_out(
        self, loading: Loading, generation: Generation, old: Generation | None, terms: Terms
    ) -> None:
        """Brings it into the workers once: what cannot run there is not served."""
        loading.stage = "installing"
        await self.residency.acquire(generation)
        try:
            keep = old is not None and old.pinned if terms.pinned is None else terms.pinned
            self._set_pin(generation, keep, old)
            if self._probe is not None and not terms.allow_noop:
                loading.stage = "probing"
                await self._probe(generation)
        finally:
            self.residency.release(generation)

    async def _pin(self, name: str, pinned: bool) -> Generation:
        async with self._lock(name):
            generation = self._known(name)
            await self._bring_and_pin(generation, pinned)
            await self.changed()
            return generation

    async def _bring_and_pin(self, generation: Generation, pinned: bool) -> None:
        if not pinned:
            generation.pinned = False
            return
        self.enter(generation)
        try:
            await self.residency.acquire(generation)
            try:
                self._set_pin(generation, True)
            finally:
                self.residency.release(generation)
        finally:
            self.leave(generation)

    def _set_pin(self, generation: Generation, pinned: bool, old: Generation | None = None) -> None:
        """old: a pinned generation whose place this one takes."""
        frees = old is not None and old.pinned
        if pinned and not generation.pinned and not frees and not self.residency.pinnable():
            raise CannotPinError(
                f"pins: found no more than one of {self.residency.slots} slots left for adapters "
                "that are not pinned, expected two"
            )
        generation.pinned = pinned

    async def _unload(self, name: str, expected: Expected) -> Generation:
        async with self._lock(name):
            generation = self._known(name)
            check_expected(name, generation, expected)
            if self._resident and name == self._resident[0]:
                raise MergedIntoBaseError(
                    f"The lora adapter {name!a} is merged into the base weights and cannot be "
                    "unloaded."
                )
            del self._current[name]
            del self._served[name]
            logger.info("Unloaded adapter %s: %s", name, generation.digest)
            await self.changed()
            await self._retire(generation)
            return generation

    def _known(self, name: str) -> Generation:
        if name not in self._current:
            raise NotLoadedError(f"The lora adapter {name!a} cannot be found.")
        return self._current[name]

    async def _retire(self, generation: Generation) -> None:
        generation.retired = True
        generation.pinned = False
        if not generation.in_flight:
            await self._free(generation)

    async def _free(self, generation: Generation) -> None:
        # Whoever comes first frees it.
        if self._alive.pop(generation.lora_int_id, None) is None:
            return
        await self.residency.forget(generation)
        await self._let_go(generation.digest)

    async def _let_go(self, digest: str) -> None:
        """In a thread: the store may be writing, and files take time to delete."""
        await asyncio.to_thread(self._store.release, digest)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _see_through(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits `work`, which goes on to its end if the caller is cancelled (client gone)."""
        return await asyncio.shield(self._spawn(work))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


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


async def nobody_told() -> None:
    """Where nothing is remembered."""
