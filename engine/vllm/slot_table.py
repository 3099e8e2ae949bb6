"""Which adapter is in which slot of a worker, and the memory that the slots take."""

from collections import Counter
from dataclasses import replace
from itertools import count, islice

from molehill.engine.adapter.errors import LimitError
from molehill.engine.adapter.model import TokenAdapters
from molehill.engine.routing_stats import TOKEN_IDS
from molehill.engine.system.out_of_memory import is_out_of_memory
from molehill.engine.vllm.host_cache import PreparedAdapter
from molehill.engine.vllm.rank_agreement import RankAgreement
from molehill.kernels.classified_linears import ClassifiedLinears
from molehill.kernels.counters import SiteCounters, SlotCounters
from molehill.kernels.interface import Backend, CapacityError, Packed
from molehill.kernels.moe_blocks import MoeBlocks
from molehill.kernels.vocabulary import Vocabulary

# The id that vLLM gives to rows without an adapter. They have a slot only if an adapter is merged
# into the base weights.
BASE = 0


class FullError(LimitError):
    """No room beside the adapters that are here now."""


class SlotTable:
    """The slots of one worker, in its backend, its MoE blocks and its vocabulary. Adapters go by
    `lora_int_id`.

    memory: bytes for all of them.
    """

    def __init__(
        self,
        backend: Backend,
        moes: MoeBlocks,
        vocabulary: Vocabulary,
        memory: int,
        ranks: RankAgreement,
        classified: ClassifiedLinears | None = None,
    ) -> None:
        """classified: for adapters with a classifier, where the worker can serve them."""
        self._backend, self._moes, self._vocabulary = backend, moes, vocabulary
        self._classified = classified
        self._memory = memory
        self._ranks = ranks
        self._slots: dict[int, int] = {}
        # Bytes by slot.
        self._taken: dict[int, int] = {}
        # Slots that hold nothing on this rank: their rows are plain, whatever their adapter.
        self._idle: set[int] = set()
        self._idle_tokens: Counter[int] = Counter()
        # Of an adapter by token, which of its adapters a token has, and their slots; its own slot
        # holds nothing.
        self._by_token: dict[int, tuple[TokenAdapters, tuple[int, ...]]] = {}

    def __contains__(self, lora_id: int) -> bool:
        return lora_id in self._slots

    def adapters(self) -> set[int]:
        """Ids of what is in the slots, but for the base's rows."""
        return self._slots.keys() - {BASE}

    def slot(self, lora_id: int) -> int | None:
        """None if it is in no slot."""
        return self._slots.get(lora_id)

    @property
    def free_bytes(self) -> int:
        return self._memory - sum(self._taken.values())

    def store(self, lora_id: int, adapter: PreparedAdapter) -> int:
        """Stores an adapter's share of this rank in a free slot; returns the slot.

        Raises FullError where it would fit beside fewer adapters, LimitError where it never will,
        OtherRankError where another rank raised; then no rank keeps anything of it.
        """
        slot, *members = self._free_slots(1 + len(adapter.members))
        with self._ranks.all_or_none(undo=lambda: self._erase(slot)):
            self._store(slot, tuple(members), adapter)
        self._slots[lora_id] = slot
        self._taken[slot] = self.resident_bytes(slot)
        if adapter.is_empty:
            self._idle.add(slot)
        return slot

    def _free_slots(self, number: int) -> list[int]:
        taken = {*self._slots.values(), *(n for _, slots in self._by_token.values() for n in slots)}
        return list(islice((slot for slot in count() if slot not in taken), number))

    def by_token(self, slot: int) -> tuple[TokenAdapters, tuple[int, ...]] | None:
        """Of an adapter by token: which of its adapters a token has, and their slots."""
        return self._by_token.get(slot)

    def erase(self, lora_id: int) -> Packed | None:
        """Frees the slot of an adapter that has one; what can be stored again, if anything."""
        slot = self._slots.pop(lora_id)
        packed = self._erase(slot)
        del self._taken[slot]
        self._idle.discard(slot)
        del self._idle_tokens[slot]
        return packed

    def resident_bytes(self, slot: int) -> int:
        holders = (self._backend, self._moes, self._vocabulary)
        slots = (slot, *self.members(slot))
        total = sum(holder.resident_bytes(n) for holder in holders for n in slots)
        return total + (self._classified.resident_bytes(slot) if self._classified else 0)

    def members(self, slot: int) -> tuple[int, ...]:
        """The slots of an adapter by token's adapters; none of others."""
        return self._by_token[slot][1] if slot in self._by_token else ()

    def is_idle(self, slot: int) -> bool:
        """Whether nothing of its adapter is on this rank."""
        return slot in self._idle

    def count_idle_tokens(self, slot: int, tokens: int) -> None:
        """Tokens of an idle slot, which the backend does not see."""
        self._idle_tokens[slot] += tokens

    def counters(self, slot: int) -> SlotCounters:
        """Since something was stored in it."""
        if slot in self._by_token:
            return self._counters_by_token(slot)
        counters = self._backend.counters(slot)
        return replace(counters, tokens=counters.tokens + self._idle_tokens[slot])

    def _counters_by_token(self, slot: int) -> SlotCounters:
        """Tokens of none of its adapters are decisions that chose none."""
        chosen = [self._backend.counters(member).tokens for member in self.members(slot)]
        tokens = sum(chosen) + self._idle_tokens[slot]
        return SlotCounters.of(tokens, {TOKEN_IDS: SiteCounters(tokens, 0, 0.0, chosen)})

    def _store(self, slot: int, members: tuple[int, ...], adapter: PreparedAdapter) -> None:
        """members: slots for those of an adapter by token. Raises LimitError before anything is
        written if the memory for adapters is spent."""
        needed, free = adapter.num_bytes, self.free_bytes
        if needed > free:
            raise self._over_memory(needed, f"at most {free} of {self._memory}")
        try:
            if adapter.by_token is None:
                self._write(slot, adapter)
            else:
                self._by_token[slot] = adapter.by_token, members
                for member, part in zip(members, adapter.members, strict=True):
                    self._write(member, part)
        except Exception as error:
            self._erase(slot)
            if isinstance(error, CapacityError):
                full = FullError if self.adapters() else LimitError
                raise full(error.where, error.found, error.expected) from error
            if is_out_of_memory(error):
                raise self._over_memory(needed, "memory to be had") from error
            raise

    def _write(self, slot: int, adapter: PreparedAdapter) -> None:
        self._moes.store(slot, adapter.moes)
        self._vocabulary.store(slot, adapter.vocabulary)
        if self._classified is not None:
            self._classified.store(slot, adapter.classified)
        self._backend.store(slot, adapter.weights)

    def _over_memory(self, needed: int, expected: str) -> LimitError:
        # A full memory may have room later, an adapter that is larger than all of it never fits.
        fits = needed <= self._memory and self.adapters()
        error = FullError if fits else LimitError
        return error("adapter memory", f"{needed} bytes", expected)

    def _erase(self, slot: int) -> Packed | None:
        """Of an adapter by token nothing is packed to be stored again."""
        _, members = self._by_token.pop(slot, (None, ()))
        for member in members:
            self._erase(member)
        if members:
            return None
        self._moes.erase(slot)
        self._vocabulary.erase(slot)
        if self._classified is not None:
            self._classified.erase(slot)
        return self._backend.erase(slot)
