"""Mixes of served adapters: those that requests ask for, kept while they are wanted, and those that
a load gives a name.

A mix is made of its parts' copies in the store, so that no source is read again. Equal mixes are
one generation. A part that is replaced or unloaded makes the mixes of it unreachable: they drain.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakValueDictionary

from molehill.api.adapters.errors import BadMixError, NotLoadedError, TooManyMixesError
from molehill.api.adapters.generation import Generation, Loading
from molehill.api.adapters.generations import Generations
from molehill.api.adapters.ingest import Fetch, Intake
from molehill.api.adapters.lease import Lease
from molehill.api.adapters.mix import BY_REQUEST, Key, Mix, MixPart, shown
from molehill.api.adapters.name_table import NameTable
from molehill.api.adapters.source import Source, local
from molehill.api.adapters.tasks import Tasks
from molehill.api.adapters.traffic import AdapterTraffic, admitted
from molehill.api.adapters.traffic_limits import NO_LIMITS, TrafficLimits
from molehill.engine.adapter.errors import UnsupportedError

logger = logging.getLogger("vllm.molehill")


class RequestMixes:
    """most: that requests may keep alive at once; 0 refuses them all."""

    def __init__(
        self,
        names: NameTable,
        generations: Generations,
        intake: Intake,
        tasks: Tasks,
        most: int,
    ) -> None:
        self._names = names
        self._generations = generations
        self._intake = intake
        self._tasks = tasks
        self._most = most
        # In the order of their last use.
        self._by_key: OrderedDict[Key, Generation] = OrderedDict()
        self._begun = 0
        # Weak, so that a lock lives only while somebody makes the mix or waits for it.
        self._locks: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()

    def __iter__(self) -> Iterator[Generation]:
        """Those that requests have asked for, the last one asked for last."""
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    def of(self, weights: Mapping[str, float]) -> Mix:
        """Of what the names serve now. Raises NotLoadedError, which names all that are unknown,
        BadMixError, UnsupportedError for an activated adapter."""
        unknown = [name for name in weights if self._names.get(name) is None]
        if unknown:
            listed = ", ".join(map(shown, unknown))
            raise NotLoadedError(f"mix: found {listed}, expected names of served adapters")
        served = {name: self._names.current(name) for name in weights}
        parts = [MixPart(name, weights[name], served[name].digest) for name in weights]
        mix = Mix(tuple(parts))
        if not mix.key:
            raise BadMixError("mix: found weights that cancel out, expected a sum that is not 0")
        tokens = {name: served[name].content.invocation_tokens for name in weights}
        for name in weights:
            if tokens[name] and mix.lone is None:
                where = f"{name}: alora_invocation_tokens"
                raise UnsupportedError(where, list(tokens[name]), "none: a mix acts on every token")
        return mix

    async def lease(self, weights: Mapping[str, float], request: object) -> Lease:
        """On the mix for one request, made if it is not there. request: see Hold.

        A mix that is one adapter, or that a load gave a name, is that; the limits that hold are
        those of the names in `weights`. Raises what `of` raises, LimitReachedError,
        TooManyMixesError, AdapterError for parts that do not add up, StoreError, OutOfMemoryError.
        """
        if not self._most:
            raise BadMixError("mix: this server takes none by request (--max-request-mixes 0)")
        mix = self.of(weights)
        traffics = [self._names.current(name).status.traffic for name in weights]
        with admitted(traffics, request):
            there = self._there(mix)
            if there is not None:
                return self._generations.lease(there, request, traffics)
            made = self._made(mix, self._hold(mix), request, traffics)
            return await self._tasks.shield(made, Lease.release)

    def hold(self, mix: Mix) -> AbstractContextManager[None]:
        """Keeps the parts' copies."""
        return leaving(self._hold(mix))

    def fetch(self, mix: Mix) -> Fetch:
        """For a load of it by name."""
        return local(self._source(mix))

    def retire_unreachable(self) -> None:
        """Those with a part that no name serves any more. What runs on them finishes."""
        served = {generation.digest for generation in self._names}
        for key in [key for key in self._by_key if any(part not in served for part, _ in key)]:
            self._retire(key)

    def _there(self, mix: Mix) -> Generation | None:
        """By a name, else by an earlier request."""
        lone = mix.lone
        if lone is not None:
            return self._names.current(mix.name_of(lone))
        for generation in self._names:
            named = generation.status.source.mix
            if named is not None and named.key == mix.key:
                return generation
        made = self._by_key.get(mix.key)
        if made is not None:
            self._by_key.move_to_end(mix.key)
            # Which a load of a part may have changed.
            parts = (self._names.current(part.name) for part in mix.parts)
            made.status.traffic.limit(of_tenant(parts))
        return made

    async def _made(
        self, mix: Mix, parts: list[Lease], request: object, traffics: list[AdapterTraffic]
    ) -> Lease:
        """One of equal mixes is made, and the requests for the others find it."""
        with leaving(parts):
            async with self._locks.setdefault(mix.key, asyncio.Lock()):
                generation = self._by_key.get(mix.key) or await self._make(mix, parts)
                lease = self._generations.lease(generation, request, traffics)
                # What was unloaded while it was made did not see it.
                self.retire_unreachable()
                return lease

    async def _make(self, mix: Mix, parts: Sequence[Lease]) -> Generation:
        """parts: of the mix, in its order."""
        self._make_room()
        self._begun += 1
        try:
            source = self._source(mix)
            loading = Loading(BY_REQUEST, mix.label)
            content, _ = await self._intake.take_in(loading, local(source), None)
            generation = self._generations.create(BY_REQUEST, content, source)
        finally:
            self._begun -= 1
        generation.status.traffic.limit(of_tenant(part.generation for part in parts))
        generation.status.serve()
        self._by_key[mix.key] = generation
        logger.info("Made the mix %s: %s", mix.label, generation.digest)
        return generation

    def _make_room(self) -> None:
        """Of what was used least recently and is not in use. Raises TooManyMixesError."""
        while len(self._by_key) + self._begun >= self._most:
            idle = next((key for key, mix in self._by_key.items() if not mix.status.holds), None)
            if idle is None:
                raise TooManyMixesError(
                    f"mixes: found {self._most} in use, expected fewer; --max-request-mixes is "
                    "how many there may be"
                )
            self._retire(idle)

    def _retire(self, key: Key) -> None:
        self._tasks.start(self._generations.retire(self._by_key.pop(key)))

    def _hold(self, mix: Mix) -> list[Lease]:
        served = (self._names.current(part.name) for part in mix.parts)
        return [self._generations.lease(generation) for generation in served]

    def _source(self, mix: Mix) -> Source:
        """The part itself where the mix is that."""
        directory = self._intake.copy(mix.key[0][0])
        return Source(directory, mix.label, mix=mix, canonical=mix.lone is not None)


def of_tenant(parts: Iterable[Generation]) -> TrafficLimits:
    """The slots that a mix of them may take: those of the first that has a tenant."""
    limits = (part.status.traffic.limits for part in parts)
    return next((each.of_tenant for each in limits if each.tenant is not None), NO_LIMITS)


@contextmanager
def leaving(leases: list[Lease]) -> Iterator[None]:
    try:
        yield
    finally:
        for lease in leases:
            lease.release()
