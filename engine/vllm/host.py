"""Adapters ready for a slot, and those of them that wait in host memory, out of the slots."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from molehill.engine.figures import Costs
from molehill.kernels.backend import MoePiece, Packed, SlotWeights


@dataclass(frozen=True)
class Prepared:
    """One rank's share of an adapter. num_bytes: of its serving copy.

    weights: as the backend keeps them, or as they were cut where there was no room to pack them.
    """

    costs: Costs
    moes: Mapping[int, MoePiece]
    num_bytes: int
    is_empty: bool
    weights: SlotWeights | Packed


class HostMemory:
    """The prepared adapters that left the slots last, by path, in at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._evicted: list[str] = []
        self._adapters: OrderedDict[str, Prepared] = OrderedDict()

    def sizes(self) -> dict[str, int]:
        """Bytes by path."""
        return {path: adapter.num_bytes for path, adapter in self._adapters.items()}

    def __contains__(self, path: str) -> bool:
        return path in self._adapters

    def put(self, path: str, adapter: Prepared) -> None:
        """Makes room by letting go of those that left before; what is larger than all is left out.

        Adapters on a base model's experts are left out too: theirs are not packed.
        """
        if adapter.num_bytes > self.limit or adapter.moes:
            return
        self._adapters.pop(path, None)
        while sum(self.sizes().values()) + adapter.num_bytes > self.limit:
            self._evicted.append(self._adapters.popitem(last=False)[0])
        self._adapters[path] = adapter

    def evicted(self) -> list[str]:
        """Paths of what made room for others since the last call."""
        gone, self._evicted = self._evicted, []
        return gone

    def take(self, path: str) -> Prepared | None:
        """The adapter, which is not kept here any more."""
        return self._adapters.pop(path, None)

    def drop(self, path: str) -> None:
        self._adapters.pop(path, None)
