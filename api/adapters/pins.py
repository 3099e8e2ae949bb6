"""Pins keep adapters in the workers' slots."""

from molehill.api.adapters.errors import CannotPinError, EngineRefusedError
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.generations import Generations
from molehill.api.adapters.residency import Residency


class Pins:
    """All slots but one may be pinned."""

    def __init__(self, residency: Residency, generations: Generations) -> None:
        self._residency = residency
        self._generations = generations

    async def set(self, generation: Generation, pinned: bool) -> None:
        """Brings it in first. Raises CannotPinError, EngineRefusedError."""
        if not pinned:
            self._residency.pin(generation, False)
            return
        lease = self._generations.lease(generation)
        try:
            await lease.acquire_slot()
            self.hand_over(None, generation, True)
        except EngineRefusedError as error:
            raise relabelled(error, generation, generation.status.source.public) from error
        finally:
            lease.release()

    def hand_over(self, old: Generation | None, new: Generation, pinned: bool) -> None:
        """old: the generation whose place `new`, which is in a slot, takes at once, its pin too.

        Raises CannotPinError; then both are as before.
        """
        frees = old is not None and old.status.slot.pinned
        if pinned and not new.status.slot.pinned and not frees and not self._residency.pinnable:
            raise CannotPinError(
                f"pins: found no more than one of {self._residency.slots} slots left for adapters "
                "that are not pinned, expected two"
            )
        if old is not None:
            self._residency.pin(old, False)
        self._residency.pin(new, pinned)


def relabelled(error: EngineRefusedError, generation: Generation, label: str) -> EngineRefusedError:
    """The same error with `label` in place of the server's path."""
    return type(error)(str(error).replace(str(generation.content.path), label))
