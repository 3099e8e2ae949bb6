"""Which adapters the workers keep in host memory, as far as they have said."""

from collections.abc import Collection

from molehill.api.adapters.events import LifecycleMetrics
from molehill.api.adapters.generation import Generation


class HostCopies:
    """Of adapters that have left their slots, or are ready for one and were there before."""

    def __init__(self, events: LifecycleMetrics) -> None:
        self._events = events
        self._names: dict[int, str] = {}

    def __contains__(self, generation: Generation) -> bool:
        return generation.lora_int_id in self._names

    def keep(self, generation: Generation) -> None:
        self._names[generation.lora_int_id] = generation.name

    def drop(self, generation: Generation) -> None:
        self._names.pop(generation.lora_int_id, None)

    def record_evictions(self, lora_int_ids: Collection[int]) -> None:
        """What had to leave for others."""
        for lora_int_id in lora_int_ids:
            if lora_int_id in self._names:
                self._events.evicted(self._names.pop(lora_int_id), "host")
