"""Which adapters are served: the one place that knows, in the one API process.

A name points at its current generation: one version of the weights, with an engine id of its own.
Replacing or unloading a name retires the generation. What runs on it finishes on it, then its
memory goes.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
from weakref import WeakValueDictionary

from vllm.exceptions import VLLMNotFoundError
from vllm.lora.request import LoRARequest

from molehill.api import names
from molehill.api.errors import (
    AlreadyLoadedError,
    EngineRefusedError,
    MergedIntoBaseError,
    NotLoadedError,
)
from molehill.api.paths import Source
from molehill.api.store import AdapterStore
from molehill.engine.adapter import Adapter
from molehill.engine.errors import AdapterError, CorruptFileError

# Below vLLM's logger, whose handlers are the only ones that a server has.
logger = logging.getLogger("vllm.molehill")

T = TypeVar("T")
Reader = Callable[[Path], Adapter]


class Engine(Protocol):
    """What the registry asks of vLLM's engine client."""

    async def add_lora(self, lora_request: Any) -> bool:
        """Loads an adapter on every worker; raises with the worker's message."""

    async def remove_lora(self, lora_id: int) -> bool:
        """Frees an adapter on every worker."""


@dataclass
class Generation:
    """One version of one adapter in the engine.

    num_bytes: of its tensors in canonical float32. created: Unix seconds.
    in_flight: requests that run on it. retired: no new request may.
    """

    name: str
    digest: str
    kind: str
    num_bytes: int
    warnings: tuple[str, ...]
    request: Any
    created: int = field(default_factory=lambda: int(time.time()))
    in_flight: int = 0
    retired: bool = False


@dataclass(frozen=True)
class Loaded:
    """What a load came to."""

    generation: Generation
    status: Literal["loaded", "replaced", "unchanged"]


class AdapterRegistry:
    """Loads, replaces and unloads adapters by name. All methods run on the event loop's thread.

    read: parses and validates a directory; runs in a thread, raises AdapterError.
    served: name to LoRARequest, which vLLM looks a request's model up in; the registry writes it.
    resident: name and digest of the adapter that is merged into the base weights.
    """

    def __init__(
        self,
        engine: Engine,
        read: Reader,
        store: AdapterStore,
        served: dict[str, Any],
        base_models: Collection[str],
        resident: tuple[str, str] | None = None,
    ) -> None:
        self._engine = engine
        self._read = read
        self._store = store
        self._served = served
        self._base_models = base_models
        self._resident = resident
        self._current: dict[str, Generation] = {}
        self._in_engine: dict[int, Generation] = {}
        self._ids = itertools.count(1)
        # Weak, so that a lock lives only while somebody holds it or waits for it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # One adapter at a time is in this process's memory, and takes a core from the engine.
        self._reading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._current)

    def __iter__(self) -> Iterator[Generation]:
        """What the names point at."""
        return iter(self._current.values())

    def in_engine(self) -> list[Generation]:
        """Every generation that still takes memory, retired ones too."""
        return list(self._in_engine.values())

    async def load(self, name: str, source: Source, *, replace: bool = False) -> Loaded:
        """Serves `source` as `name`; when this returns, it serves.

        The same bytes again change nothing. Raises BadNameError, AdapterError, AlreadyLoadedError
        (other bytes without `replace`), MergedIntoBaseError or EngineRefusedError; then everything
        is as before.
        """
        names.check(name, self._base_models)
        return await self._see_through(self._load(name, source, replace))

    async def unload(self, name: str) -> Generation:
        """Takes the name away at once; memory goes when the last running request ends.

        Raises NotLoadedError, MergedIntoBaseError.
        """
        return await self._see_through(self._unload(name))

    def admit(self, request: Any) -> Generation:
        """The generation that a request runs on, the current one of its name if its own retired.

        Raises VLLMNotFoundError (404) if the name is gone: the base must never answer for it.
        """
        generation = self._in_engine.get(request.lora_int_id)
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

    async def _load(self, name: str, source: Source, replace: bool) -> Loaded:
        async with self._lock(name):
            async with self._reading:
                adapter, path = await self._take_in(source)
            if self._resident and name == self._resident[0] and adapter.digest != self._resident[1]:
                self._store.release(adapter.digest)
                raise MergedIntoBaseError(
                    f"The lora adapter '{name}' is merged into the base weights with other weights "
                    "than these. It cannot be replaced; restart the server to change it."
                )
            old = self._current.get(name)
            if old is not None and (old.digest == adapter.digest or not replace):
                self._store.release(adapter.digest)
                if old.digest == adapter.digest:
                    return Loaded(old, "unchanged")
                raise AlreadyLoadedError(
                    f"The lora adapter '{name}' has already been loaded with other weights. If "
                    "you want to replace them, set 'load_inplace' to True."
                )
            new = await self._install(name, adapter, path, source)
            self._current[name] = new
            self._served[name] = new.request
            logger.info("Loaded adapter %s: %s, %s", name, new.kind, new.digest)
            if old is not None:
                await self._retire(old)
            return Loaded(new, "loaded" if old is None else "replaced")

    async def _take_in(self, source: Source) -> tuple[Adapter, Path]:
        try:
            adapter = await asyncio.to_thread(self._read, source.directory)
        except AdapterError as error:
            raise source.relabel_error(error) from error
        except OSError as error:
            raise CorruptFileError(source.label, error.strerror, "a readable directory") from error
        try:
            return adapter, await asyncio.to_thread(self._store.acquire, adapter)
        except OSError as error:
            raise EngineRefusedError(f"adapter store: {error.strerror}") from error

    async def _install(self, name: str, adapter: Adapter, path: Path, source: Source) -> Generation:
        request = LoRARequest(name, next(self._ids), str(path))
        generation = Generation(
            name, adapter.digest, adapter.kind, adapter.num_bytes, adapter.warnings, request
        )
        self._in_engine[request.lora_int_id] = generation
        try:
            await self._engine.add_lora(request)
        except Exception as error:
            # Some of several workers may have taken it.
            await self._free(generation)
            message = source.relabel(str(error)).replace(str(path), source.label)
            raise EngineRefusedError(message) from error
        return generation

    async def _unload(self, name: str) -> Generation:
        async with self._lock(name):
            if name not in self._current:
                raise NotLoadedError(f"The lora adapter {name!a} cannot be found.")
            if self._resident and name == self._resident[0]:
                raise MergedIntoBaseError(
                    f"The lora adapter {name!a} is merged into the base weights and cannot be "
                    "unloaded."
                )
            generation = self._current.pop(name)
            del self._served[name]
            logger.info("Unloaded adapter %s: %s", name, generation.digest)
            await self._retire(generation)
            return generation

    async def _retire(self, generation: Generation) -> None:
        generation.retired = True
        if not generation.in_flight:
            await self._free(generation)

    async def _free(self, generation: Generation) -> None:
        try:
            await self._engine.remove_lora(generation.request.lora_int_id)
        except Exception:
            logger.exception("The engine could not free adapter %s", generation.name)
        del self._in_engine[generation.request.lora_int_id]
        self._store.release(generation.digest)

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
