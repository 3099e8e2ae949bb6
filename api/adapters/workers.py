"""What the slots need of the engine's workers; what asks a real engine is elsewhere."""

from dataclasses import dataclass
from typing import Any, Protocol

from molehill.api.adapters.events import Tier


@dataclass(frozen=True)
class Uninstalled:
    """kept: whether every worker has the adapter in host memory. evicted: ids of those that had to
    leave it for others, in any worker."""

    kept: bool
    evicted: set[int]


class Workers(Protocol):
    """Puts adapters of the store into all workers and takes them out.

    at_once: how many they may prepare, and hold prepared, at a time. A request is what a generation
    has under that name.
    """

    @property
    def at_once(self) -> int: ...

    async def start_prepare(self, request: Any) -> bool:
        """Has every worker read the adapter in a thread, unless it is in host memory; whether one
        does. Raises EngineRefusedError."""

    async def prepare(self, request: Any) -> Tier:
        """Returns when every worker has the adapter ready for a slot; where it was.

        Raises EngineRefusedError.
        """

    async def discard(self, request: Any) -> None:
        """Lets go of what was prepared. Raises EngineRefusedError."""

    async def install(self, request: Any) -> None:
        """Copies what was prepared into a slot of every worker.

        Raises NoRoomError if it would fit beside fewer adapters, EngineRefusedError if it never
        will. Some of several workers may have taken it then; `uninstall` makes sure.
        """

    async def uninstall(self, request: Any, keep: bool) -> Uninstalled:
        """Frees the adapter's slots. keep: in host memory, where that is possible, for it may come
        back; else all that is prepared of it goes too. Raises EngineRefusedError."""
