"""A request's stay on a generation, from its admission until all that works for it has ended."""

from molehill.api.adapters.events import Tier
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.registry import AdapterRegistry


class Stay:
    """Counts as one request, however many prompts, beams or turns are made of it.

    It begins with one holder and is over when the last one has left. asked: for output of the
    engine. found: where the adapter was when it was brought in before that.
    """

    def __init__(self, registry: AdapterRegistry, generation: Generation) -> None:
        self.registry = registry
        self.generation = generation
        self.asked = False
        self.found: Tier | None = None
        self._holders = 1
        registry.enter(generation)

    @property
    def over(self) -> bool:
        return not self._holders

    def join(self) -> None:
        self._holders += 1

    def leave(self) -> None:
        self._holders -= 1
        if not self._holders:
            self.registry.leave(self.generation)
