"""Which adapters are served: the one place that knows, in the one API process.

A name points at its current generation: one version of the weights, with an engine id of its own.
Replacing or unloading a name retires the generation. What runs on it finishes on it, then its
memory goes.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from molehill.api.adapters import names
from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.background import Background
from molehill.api.adapters.chat import ReadChat
from molehill.api.adapters.errors import RequestError, UnknownModelError
from molehill.api.adapters.generation import Failure, Generation, Loaded, Loading
from molehill.api.adapters.generations import Generations, MakeRequest
from molehill.api.adapters.ingest import Combine, Fetch, Intake, ReadAdapter
from molehill.api.adapters.installer import Installer, Paused, Probe
from molehill.api.adapters.lease import Lease
from molehill.api.adapters.load_options import AnyGeneration, Expected, LoadOptions, check_expected
from molehill.api.adapters.loader import Loader
from molehill.api.adapters.loads import Loads
from molehill.api.adapters.merged_base import MergedBaseAdapter
from molehill.api.adapters.mix import Mix
from molehill.api.adapters.name_table import Absent, NameTable
from molehill.api.adapters.pins import Pins
from molehill.api.adapters.read_budget import MOST_AT_ONCE
from molehill.api.adapters.request_mixes import RequestMixes
from molehill.api.adapters.residency import Residency
from molehill.api.adapters.store import AdapterStore
from molehill.api.adapters.tasks import Tasks
from molehill.api.adapters.traffic import admitted
from molehill.api.adapters.traffic_limits import TrafficLimits
from molehill.engine.adapter.base_model import Limits
from molehill.engine.transform.weighted_sum import mix

# Below vLLM's logger, whose handlers are the only ones that a server has.
logger = logging.getLogger("vllm.molehill")


async def never_paused() -> bool:
    return False


class AdapterRegistry:
    """Loads, replaces and unloads adapters by name. All methods run on the event loop's thread.

    read, combine, store, background, memory, read_chat, num_tokens: see Intake. make_request: see
    Generations. probe, paused: see Installer. served: see NameTable. base_models: names that no
    adapter may have. merged_base: the adapter that is merged into the base weights. clock: see
    AdapterTraffic.

    names, loads: what each name stands for, and what is on its way to them. mixes: those that
    requests ask for.
    """

    def __init__(
        self,
        residency: Residency,
        read: ReadAdapter,
        store: AdapterStore,
        make_request: MakeRequest,
        served: dict[str, Any],
        base_models: Collection[str],
        admission: AdmissionLimits = AdmissionLimits(),  # noqa: B008
        probe: Probe | None = None,
        merged_base: MergedBaseAdapter | None = None,
        background: Background | None = None,
        memory: int = Limits().adapter_bytes,
        combine: Combine = mix,
        read_chat: ReadChat | None = None,
        num_tokens: int | None = None,
        paused: Paused = never_paused,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.residency = residency
        self.events = residency.events
        self.intake = Intake(
            read,
            combine,
            store,
            background or Background(threads=MOST_AT_ONCE),
            memory,
            read_chat,
            num_tokens,
        )
        self.names = NameTable(served)
        self.loads = Loads(admission, self.names)
        self.base_models = base_models
        self._merged_base = merged_base
        self._tasks = Tasks("registry", self.events)
        self._generations = Generations(
            residency, self.intake, make_request, self.events, self._tasks, clock
        )
        self.mixes = RequestMixes(
            self.names, self._generations, self.intake, self._tasks, admission.mixes
        )
        self._pins = Pins(residency, self._generations)
        installer = Installer(
            residency, self._generations, self._pins, probe, self._withdraw, paused
        )
        self._loader = Loader(
            self.names, self._generations, self.intake, installer, self._pins, merged_base
        )

    # What is known

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Generation]:
        """What the names point at."""
        return iter(self.names)

    def get(self, name: str) -> Generation | None:
        return self.names.get(name)

    def generation(self, lora_int_id: int) -> Generation | None:
        """By the id of its request, whatever its name serves now."""
        return self._generations.get(lora_int_id)

    @property
    def failures(self) -> dict[str, Failure]:
        """Names that a restart or a watched root should serve, and why they do not."""
        return self.names.failures

    def alive(self) -> list[Generation]:
        """Every generation that still takes memory or disk, retired ones too."""
        return list(self._generations)

    def loading(self) -> list[Loading]:
        """The loads on their way, and those that a restart will begin."""
        return self.loads.all()

    # What changes it

    async def load(
        self, name: str, label: str, fetch: Fetch, options: LoadOptions | None = None
    ) -> Loaded:
        """Serves what `fetch` brings as `name`; when this returns, it serves.

        label: the source as the client wrote it. The same bytes again change nothing. Raises
        BadNameError, BusyError, TooManyAdaptersError, GenerationMismatchError, AlreadyLoadedError,
        MergedIntoBaseError, NotActivatedError, AdapterError, StoreError, EngineRefusedError, and
        what `fetch` and the probe raise; then everything is as before.
        """
        with self.events.refusals():
            names.check(name, self.base_models)
            loading = self.loads.begin(name, label)
        return await self._tasks.shield(self._load(loading, fetch, options or LoadOptions()))

    async def load_mix(
        self, name: str, weights: Mapping[str, float], options: LoadOptions | None = None
    ) -> Loaded:
        """Serves the weighted sum of adapters that are served now, whatever becomes of those.

        Raises what `load` and `RequestMixes.of` raise.
        """
        with self.events.refusals():
            wanted = self.mixes.of(weights)
        return await self._tasks.shield(self._load_mix(name, wanted, options))

    async def unload(self, name: str, expected: Expected = AnyGeneration) -> Generation:
        """Takes the name away at once; memory goes when the last running request ends.

        A name that should serve and does not, or not yet, is forgotten. Raises NotLoadedError (for
        such a name too), GenerationMismatchError, MergedIntoBaseError.
        """
        return await self._tasks.shield(self._unload(name, expected))

    async def dismiss(self, name: str) -> Absent | None:
        """Forgets a name that should serve and does not, or not yet; None if it is no such name."""
        return await self._tasks.shield(self._dismiss(name))

    async def pin(self, name: str, pinned: bool) -> Generation:
        """Keeps the name's adapter in the workers, or lets it be taken out when idle.

        Raises NotLoadedError, CannotPinError, EngineRefusedError.
        """
        return await self._tasks.shield(self._pin(name, pinned))

    async def limit(self, name: str, limits: TrafficLimits) -> Generation:
        """Holds the name's requests to these limits from the next one on. Raises NotLoadedError."""
        return await self._tasks.shield(self._limit(name, limits))

    def admit(self, lora_request: Any, request: object) -> Lease:
        """On the generation that `lora_request` asks for, the current one of its name if that has
        been retired. request: see Hold.

        Raises UnknownModelError if the name is gone: the base must never answer for it, and
        LimitReachedError.
        """
        generation = self._generations.get(lora_request.lora_int_id)
        if generation is None or generation.status.draining:
            generation = self.names.get(lora_request.lora_name)
        if generation is None:
            raise UnknownModelError(lora_request.lora_name)
        traffics = (generation.status.traffic,)
        with admitted(traffics, request):
            return self._generations.lease(generation, request, traffics)

    async def _load_mix(self, name: str, wanted: Mix, options: LoadOptions | None) -> Loaded:
        with self.mixes.hold(wanted):
            return await self.load(name, wanted.label, self.mixes.fetch(wanted), options)

    async def _load(self, loading: Loading, fetch: Fetch, options: LoadOptions) -> Loaded:
        """Counted also where nobody waits for it any more."""
        with self.events.load(loading.name):
            try:
                return await self._loader.load(loading, fetch, options)
            finally:
                self.loads.end(loading)
                self.mixes.retire_unreachable()

    async def _unload(self, name: str, expected: Expected) -> Generation:
        async with self.names.lock(name):
            if self.names.dismiss(name) is not None:
                await self.names.changed()
            generation = self.names.current(name)
            check_expected(name, generation, expected)
            if self._merged_base is not None:
                self._merged_base.check_unload(name)
            self.names.withdraw(generation)
            logger.info("Unloaded adapter %s: %s", name, generation.digest)
            self.mixes.retire_unreachable()
            await self.names.changed()
            await self._generations.retire(generation)
            return generation

    async def _dismiss(self, name: str) -> Absent | None:
        # Behind a load that may be on its way: what comes of it is then unloaded, not dismissed.
        async with self.names.lock(name):
            absent = self.names.dismiss(name)
            if absent is not None:
                await self.names.changed()
            return absent

    async def _pin(self, name: str, pinned: bool) -> Generation:
        async with self.names.lock(name):
            generation = self.names.current(name)
            await self._pins.set(generation, pinned)
            await self.names.changed()
            return generation

    async def _limit(self, name: str, limits: TrafficLimits) -> Generation:
        async with self.names.lock(name):
            generation = self.names.current(name)
            generation.status.traffic.limit(limits)
            await self.names.changed()
            return generation

    def _withdraw(self, generation: Generation, error: RequestError) -> None:
        """Whoever has it in flight frees it."""
        generation.status.drain()
        if self.names.withdraw(generation):
            source = generation.status.source
            self.names.fail(generation.name, source.public, error, source.desired)
            self.mixes.retire_unreachable()
            logger.error("Adapter %s is not served any more: %s", generation.name, error)
            self._tasks.start(self.names.changed())
