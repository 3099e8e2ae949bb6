"""Every generation that takes memory or disk, from its making to the end of the last request on it,
whatever its name stands for by then."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from molehill.api.adapters.events import LifecycleMetrics
from molehill.api.adapters.generation import Content, Generation
from molehill.api.adapters.ingest import Intake
from molehill.api.adapters.lease import Lease
from molehill.api.adapters.residency import Residency
from molehill.api.adapters.source import Source
from molehill.api.adapters.status import GenerationStatus
from molehill.api.adapters.tasks import Tasks
from molehill.api.adapters.traffic import AdapterTraffic

logger = logging.getLogger("vllm.molehill")

# The engine's request for an adapter: of its name, an id that is never used again, and its path.
# It has them as `lora_name`, `lora_int_id` and `lora_path`.
MakeRequest = Callable[[str, int, str], Any]


class Generations:
    """make_request: see MakeRequest. intake: holds their copies in the store. clock: see
    AdapterTraffic."""

    def __init__(
        self,
        residency: Residency,
        intake: Intake,
        make_request: MakeRequest,
        events: LifecycleMetrics,
        tasks: Tasks,
        clock: Callable[[], float],
    ) -> None:
        self._residency = residency
        self._intake = intake
        self._make_request = make_request
        self._events = events
        self._tasks = tasks
        self._clock = clock
        self._by_id: dict[int, Generation] = {}
        self._ids = itertools.count(1)

    def __iter__(self) -> Iterator[Generation]:
        return iter(self._by_id.values())

    def get(self, lora_int_id: int) -> Generation | None:
        return self._by_id.get(lora_int_id)

    def create(self, name: str, content: Content, source: Source) -> Generation:
        """Of content that the intake holds, which is let go when the generation is freed."""
        request = self._make_request(name, next(self._ids), str(content.path))
        traffic = AdapterTraffic(name, partial(self._events.limited, name), self._clock)
        generation = Generation(name, content, request, GenerationStatus(source, traffic))
        self._by_id[generation.lora_int_id] = generation
        self._events.begin(name)
        return generation

    def lease(
        self,
        generation: Generation,
        request: object | None = None,
        traffics: Sequence[AdapterTraffic] = (),
    ) -> Lease:
        """Holds it until the lease is over, whatever happens to the name. request: see Hold.
        traffics: see Lease."""
        return Lease(self._residency, generation, self._free_if_unused, request, traffics)

    async def retire(self, generation: Generation) -> None:
        """No new request gets it. What runs on it finishes, then its memory goes."""
        generation.status.drain()
        self._residency.pin(generation, False)
        if not generation.status.holds:
            await self._free(generation)

    def _free_if_unused(self, generation: Generation) -> None:
        if generation.status.draining and not generation.status.holds:
            self._tasks.start(self._free(generation))

    async def _free(self, generation: Generation) -> None:
        # Whoever comes first frees it.
        if self._by_id.pop(generation.lora_int_id, None) is None:
            return
        if not any(other.name == generation.name for other in self):
            self._events.end(generation.name)
        await self._residency.free(generation)
        try:
            await self._intake.release(generation.content)
        except Exception:
            # Whoever unloads or replaces it has done so all the same.
            logger.exception("The copy of adapter %s could not be freed", generation.name)
            self._events.free_failed()
