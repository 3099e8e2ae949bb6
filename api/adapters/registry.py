"""Which adapters are served: the one place that knows, in the one API process.

A name points at its current generation: one version of the weights, with an engine id of its own.
Replacing or unloading a name retires the generation. What runs on it finishes on it, then its
memory goes.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from molehill.api.adapters import names
from molehill.api.adapters.admission import Admission
from molehill.api.adapters.background import Background
from molehill.api.adapters.errors import (
    AlreadyLoadedError,
    BusyError,
    CannotPinError,
    EngineRefusedError,
    MergedIntoBaseError,
    NotLoadedError,
    RequestError,
    TooManyAdaptersError,
    UnknownModelError,
)
from molehill.api.adapters.generation import (
    Content,
    Failure,
    Generation,
    Loaded,
    Loading,
    failure_of,
)
from molehill.api.adapters.ingest import Fetch, Intake, Reader
from molehill.api.adapters.invocation import check_activated
from molehill.api.adapters.lease import Lease
from molehill.api.adapters.load_options import Anything, Expected, Terms, check_expected
from molehill.api.adapters.reading import READERS
from molehill.api.adapters.slots import Residency
from molehill.api.adapters.source import Source
from molehill.api.adapters.status import GenerationStatus
from molehill.api.adapters.store import AdapterStore
from molehill.api.adapters.tasks import Tasks
from molehill.engine.adapter.base_model import Limits

# Below vLLM's logger, whose handlers are the only ones that a server has.
logger = logging.getLogger("vllm.molehill")

Probe = Callable[[Generation], Awaitable[None]]

# The engine's request for an adapter: of its name, an id that is never used again, and its path.
# It has them as `lora_name`, `lora_int_id` and `lora_path`.
MakeRequest = Callable[[str, int, str], Any]


class AdapterRegistry:
    """Loads, replaces and unloads adapters by name. All methods run on the event loop's thread.

    read, store, background, memory: see Intake.
    make_request: see MakeRequest. served: name to what that makes, which the engine looks a
    request's model up in; the registry writes it.
    probe: raises RequestError for a generation that must not be served, EngineRefusedError where
    that could not be found out, or None.
    failures: names that a restart or a watched root should serve, and why they do not.
    awaited: names that a restart is still to load. No name in either is served.
    changed: called after the names or their pins have changed.
    merged_base: name and digest of the adapter that is merged into the base weights.
    """

    def __init__(
        self,
        residency: Residency,
        read: Reader,
        store: AdapterStore,
        make_request: MakeRequest,
        served: dict[str, Any],
        base_models: Collection[str],
        admission: Admission = Admission(),  # noqa: B008
        probe: Probe | None = None,
        merged_base: tuple[str, str] | None = None,
        background: Background | None = None,
        memory: int = Limits().adapter_bytes,
    ) -> None:
        self.residency = residency
        self.events = residency.events
        self.changed: Callable[[], Coroutine[Any, Any, None]] = nobody_told
        self.intake = Intake(read, store, background or Background(threads=READERS), memory)
        self._make_request = make_request
        self._served = served
        self._base_models = base_models
        self._admission = admission
        self._probe = probe
        self._merged_base = merged_base
        self._current: dict[str, Generation] = {}
        self._alive: dict[int, Generation] = {}
        self._loading: list[Loading] = []
        self.failures: dict[str, Failure] = {}
        self.awaited: dict[str, Loading] = {}
        self._ids = itertools.count(1)
        # Weak, so that a lock lives only while somebody holds it or waits for it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks = Tasks("registry", residency.events)

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
        """The loads on their way, and those that a restart will begin."""
        begun = {loading.name for loading in self._loading}
        awaited = [loading for name, loading in self.awaited.items() if name not in begun]
        return [*self._loading, *awaited]

    async def load(self, name: str, label: str, fetch: Fetch, terms: Terms | None = None) -> Loaded:
        """Serves what `fetch` brings as `name`; when this returns, it serves.

        label: the source as the client wrote it. The same bytes again change nothing. Raises
        BadNameError, BusyError, TooManyAdaptersError, GenerationMismatchError, AlreadyLoadedError,
        MergedIntoBaseError, AdapterError, StoreError, EngineRefusedError, and what `fetch` and the
        probe raise; then everything is as before.
        """
        with self.events.refusals():
            names.check(name, self._base_models)
            self._admit_load(name)
        loading = Loading(name, label)
        self._loading.append(loading)
        return await self._tasks.see_through(self._counted(loading, fetch, terms or Terms()))

    async def unload(self, name: str, expected: Expected = Anything) -> Generation:
        """Takes the name away at once; memory goes when the last running request ends.

        A name that should serve and does not, or not yet, is forgotten. Raises NotLoadedError (for
        such a name too), GenerationMismatchError, MergedIntoBaseError.
        """
        return await self._tasks.see_through(self._unload(name, expected))

    async def dismiss(self, name: str) -> Failure | Loading | None:
        """Forgets a name that should serve and does not, or not yet; None if it is no such name."""
        return await self._tasks.see_through(self._dismiss(name))

    def fail(self, name: str, source: str, error: Exception) -> None:
        """Notes why a name that should serve does not, unless it does by now."""
        if name not in self._current:
            self.failures[name] = failure_of(name, source, error)

    async def pin(self, name: str, pinned: bool) -> Generation:
        """Keeps the name's adapter in the workers, or lets it be taken out when idle.

        Raises NotLoadedError, CannotPinError, EngineRefusedError.
        """
        return await self._tasks.see_through(self._pin(name, pinned))

    def admit(self, request: Any) -> Generation:
        """The generation that a request runs on, the current one of its name if its own retired.

        Raises UnknownModelError if the name is gone: the base must never answer for it.
        """
        generation = self._alive.get(request.lora_int_id)
        if generation is None or generation.status.draining:
            generation = self._current.get(request.lora_name)
        if generation is None:
            raise UnknownModelError(f"The model `{request.lora_name}` does not exist.")
        return generation

    def lease(self, generation: Generation) -> Lease:
        """Holds it until the lease is over, whatever happens to the name."""
        return Lease(self.residency, generation, self._free_unless_needed)

    def _free_unless_needed(self, generation: Generation) -> None:
        if generation.status.draining and not generation.status.in_flight:
            self._tasks.start(self._free(generation))

    @property
    def busy(self) -> bool:
        """Whether a load would be refused now, as others are on their way."""
        return len(self._loading) >= self._admission.loads

    def _admit_load(self, name: str) -> None:
        """Before anything is fetched, read or allocated."""
        if self.busy:
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

    async def _counted(self, loading: Loading, fetch: Fetch, terms: Terms) -> Loaded:
        """Also where nobody waits for it any more."""
        with self.events.load(loading.name):
            return await self._load(loading, fetch, terms)

    async def _load(self, loading: Loading, fetch: Fetch, terms: Terms) -> Loaded:
        try:
            async with self._lock(loading.name):
                old = self._current.get(loading.name)
                check_expected(loading.name, old, terms.expected)
                content, source = await self.intake.take_in(loading, fetch, terms.content)
                try:
                    self._check_content(loading.name, content, terms)
                except RequestError:
                    await self.intake.let_go(content.digest)
                    raise
                if old is not None and (old.digest == content.digest or not terms.replace):
                    await self.intake.let_go(content.digest)
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

    def _check_content(self, name: str, content: Content, terms: Terms) -> None:
        """Raises MergedIntoBaseError, NotActivatedError."""
        check_activated(name, content.invocation_tokens, terms.when_not_invoked)
        merged_base, merged = self._merged_base or ("", "")
        if name == merged_base and content.digest != merged:
            raise MergedIntoBaseError(
                f"The lora adapter '{name}' is merged into the base weights with other weights "
                "than these. It cannot be replaced; restart the server to change it."
            )

    async def _unchanged(self, old: Generation, source: Source, terms: Terms) -> Loaded:
        old.status.load_again(source)
        if terms.allow_noop:
            old.status.pass_check()
        if terms.when_not_invoked is not None:
            old.status.answer_not_invoked(terms.when_not_invoked)
        if terms.pinned is not None:
            await self._bring_and_pin(old, terms.pinned)
        await self.changed()
        return Loaded(old, "unchanged")

    async def _switch(self, new: Generation) -> None:
        self._current[new.name] = new
        new.status.serve()
        self._served[new.name] = new.request
        self._forget_absent(new.name)
        logger.info("Loaded adapter %s: %s, %s", new.name, new.content.kind, new.digest)
        await self.changed()

    async def _install(
        self,
        loading: Loading,
        content: Content,
        source: Source,
        old: Generation | None,
        terms: Terms,
    ) -> Generation:
        request = self._make_request(loading.name, next(self._ids), str(content.path))
        generation = Generation(loading.name, content, request, GenerationStatus(source))
        if content.invocation_tokens:
            before = None if old is None else old.status.when_not_invoked
            generation.status.answer_not_invoked(terms.when_not_invoked or before or "refuse")
        self._alive[request.lora_int_id] = generation
        self.events.begin(loading.name)
        lease = self.lease(generation)
        pinned = old is not None and old.status.pinned if terms.pinned is None else terms.pinned
        probed = self._probe is not None and not terms.allow_noop
        try:
            if terms.eager or pinned or not self.residency.full:
                await self._try_out(loading, lease, probed)
                self._set_pin(generation, pinned, old)
            elif probed:
                generation.status.check_later(partial(self._probe_late, generation))
        except Exception as error:
            lease.leave()
            generation.status.drain()
            await self._free(generation)
            if isinstance(error, EngineRefusedError):
                raise relabelled(error, generation, source.label) from error
            raise
        lease.leave()
        return generation

    async def _try_out(self, loading: Loading, lease: Lease, probed: bool) -> None:
        """Brings it into the workers once: what cannot run there is not served."""
        loading.stage = "installing"
        await lease.take_slot()
        try:
            if probed and self._probe is not None:
                loading.stage = "probing"
                await self._probe(lease.generation)
        finally:
            lease.give_slot_back()

    async def _probe_late(self, generation: Generation) -> None:
        """The probe of what was not brought into the workers when it was loaded."""
        assert self._probe is not None
        try:
            await self._probe(generation)
        except EngineRefusedError:
            # It is probed when it comes in again.
            raise
        except Exception as error:
            if isinstance(error, RequestError):
                self._withdraw(generation, error)
            raise EngineRefusedError(str(error)) from error

    def _withdraw(self, generation: Generation, error: RequestError) -> None:
        """Whoever has it in flight frees it."""
        generation.status.drain()
        if self._current.get(generation.name) is generation:
            del self._current[generation.name]
            del self._served[generation.name]
            self.fail(generation.name, generation.status.source.public, error)
            logger.error("Adapter %s is not served any more: %s", generation.name, error)
            self._tasks.start(self.changed())

    async def _pin(self, name: str, pinned: bool) -> Generation:
        async with self._lock(name):
            generation = self._known(name)
            await self._bring_and_pin(generation, pinned)
            await self.changed()
            return generation

    async def _bring_and_pin(self, generation: Generation, pinned: bool) -> None:
        if not pinned:
            self.residency.pin(generation, False)
            return
        lease = self.lease(generation)
        try:
            await lease.take_slot()
            try:
                self._set_pin(generation, True)
            finally:
                lease.give_slot_back()
        except EngineRefusedError as error:
            raise relabelled(error, generation, generation.status.source.public) from error
        finally:
            lease.leave()

    def _set_pin(self, generation: Generation, pinned: bool, old: Generation | None = None) -> None:
        """old: the generation whose place this one takes at once, its pin too."""
        frees = old is not None and old.status.pinned
        if pinned and not generation.status.pinned and not frees and not self.residency.pinnable():
            raise CannotPinError(
                f"pins: found no more than one of {self.residency.slots} slots left for adapters "
                "that are not pinned, expected two"
            )
        if old is not None:
            self.residency.pin(old, False)
        self.residency.pin(generation, pinned)

    async def _unload(self, name: str, expected: Expected) -> Generation:
        async with self._lock(name):
            if self._forget_absent(name) is not None:
                await self.changed()
            generation = self._known(name)
            check_expected(name, generation, expected)
            if self._merged_base and name == self._merged_base[0]:
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

    async def _dismiss(self, name: str) -> Failure | Loading | None:
        # Behind a load that may be on its way: what comes of it is then unloaded, not dismissed.
        async with self._lock(name):
            absent = self._forget_absent(name)
            if absent is not None:
                await self.changed()
            return absent

    def _forget_absent(self, name: str) -> Failure | Loading | None:
        awaited = self.awaited.pop(name, None)
        return self.failures.pop(name, None) or awaited

    def _known(self, name: str) -> Generation:
        if name not in self._current:
            raise NotLoadedError(f"The lora adapter {name!a} cannot be found.")
        return self._current[name]

    async def _retire(self, generation: Generation) -> None:
        generation.status.drain()
        self.residency.pin(generation, False)
        if not generation.status.in_flight:
            await self._free(generation)

    async def _free(self, generation: Generation) -> None:
        # Whoever comes first frees it.
        if self._alive.pop(generation.lora_int_id, None) is None:
            return
        if not any(other.name == generation.name for other in self._alive.values()):
            self.events.end(generation.name)
        await self.residency.forget(generation)
        try:
            await self.intake.let_go(generation.digest)
        except Exception:
            # Whoever unloads or replaces it has done so all the same.
            logger.exception("The copy of adapter %s could not be freed", generation.name)
            self.events.free_failed()

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


def relabelled(error: EngineRefusedError, generation: Generation, label: str) -> EngineRefusedError:
    """The same error with `label` in place of the server's path."""
    return type(error)(str(error).replace(str(generation.content.path), label))


async def nobody_told() -> None:
    """Where nothing is remembered."""
