"""Adapters ready for a slot, and those of them that wait in host memory, out of the slots."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from molehill.engine.adapter.model import TokenAdapters
from molehill.engine.routing_stats import Costs
from molehill.kernels.interface import MoePiece, Packed, SlotWeights
from molehill.kernels.vocabulary_pieces import VocabularyPieces

Key = TypeVar("Key", bound=Hashable)


class AdapterKey(NamedTuple):
    """An adapter as a worker is asked for it. Names of the same bytes have a path in common, and
    each an id of its own: what is done for one is not undone for the other."""

    lora_id: int
    path: str

    @classmethod
    def of(cls, request: Any) -> "AdapterKey":
        """request: vLLM's LoRARequest."""
        return cls(request.lora_int_id, request.lora_path)


@dataclass(frozen=True)
class PreparedAdapter:
    """One rank's share of an adapter. num_bytes: of its serving copy.

    weights: as the backend keeps them, or as they were cut where there was no room to pack them.
    invocation_tokens: see Adapter. members: of one by token, the shares of its adapters, each for a
    slot of its own; by_token: which of them a token has.
    """

    costs: Costs
    moes: Mapping[int, MoePiece]
    num_bytes: int
    is_empty: bool
    weights: SlotWeights | Packed
    invocation_tokens: tuple[int, ...] = ()
    vocabulary: VocabularyPieces = field(default_factory=VocabularyPieces)
    by_token: TokenAdapters | None = None
    members: tuple["PreparedAdapter", ...] = ()


class HostCache(Generic[Key]):
    """The prepared adapters that left the slots last, each under a key of its own, in at most
    `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._evicted: list[Key] = []
        self._adapters: OrderedDict[Key, PreparedAdapter] = OrderedDict()

    def sizes(self) -> dict[Key, int]:
        """Bytes by key."""
        return {key: adapter.num_bytes for key, adapter in self._adapters.items()}

    def __contains__(self, key: Key) -> bool:
        return key in self._adapters

    def put(self, key: Key, adapter: PreparedAdapter) -> None:
        """Makes room by letting go of those that left before; what is larger than all is left out.

        Adapters on a base model's experts are left out too: theirs are not packed.
        """
        if adapter.num_bytes > self.limit or adapter.moes:
            return
        self._adapters.pop(key, None)
        while sum(self.sizes().values()) + adapter.num_bytes > self.limit:
            self._evicted.append(self._adapters.popitem(last=False)[0])
        self._adapters[key] = adapter

    def take_evicted(self) -> list[Key]:
        """Keys of what made room for others since the last call."""
        result, self._evicted = self._evicted, []
        return result

    def take(self, key: Key) -> PreparedAdapter | None:
        """The adapter, which is not kept here any more."""
        return self._adapters.pop(key, None)

    def drop(self, key: Key) -> None:
        self._adapters.pop(key, None)
