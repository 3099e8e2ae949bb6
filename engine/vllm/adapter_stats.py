"""What a worker's adapters did, by `lora_int_id`, also while they are out of its slots."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from molehill.engine.routing_stats import (
    Costs,
    RoutingStats,
    SiteRoutingStats,
    cost_table,
    site_stats,
    total_stats,
)
from molehill.engine.vllm.protocol import AdapterReport
from molehill.kernels.counters import SlotCounters, joined

# Adapters outside of the slots that are remembered if nobody asks, the ones that left last.
OUTSIDE = 2048


@dataclass
class AdapterRecord:
    """An adapter. slot: None out of the slots. past: counters of earlier stays. stats: its total
    when it was reported last. stale: it has run since. final: its total, once it will not come
    back."""

    name: str
    slot: int | None
    costs: Costs
    past: SlotCounters = field(default_factory=SlotCounters)
    stats: RoutingStats = field(default_factory=RoutingStats)
    stale: bool = False
    final: RoutingStats | None = None


class AdapterStats:
    """Counters live and die with a slot; this remembers them until the API lets go of the id.

    A scrape costs little: the total of an adapter without new tokens is not worked out again.
    """

    def __init__(
        self,
        counters: Callable[[int], SlotCounters],
        resident_bytes: Callable[[int], int],
    ) -> None:
        """counters, resident_bytes: of a slot, since something was stored in it."""
        self._of_slot = counters
        self._resident_bytes = resident_bytes
        self._op_seconds = 0.0
        self._inside: dict[int, AdapterRecord] = {}
        self._by_slot: dict[int, AdapterRecord] = {}
        # In the order in which they left.
        self._outside: dict[int, AdapterRecord] = {}

    def enter_slot(self, lora_id: int, name: str, slot: int, costs: Costs) -> None:
        """The adapter is stored in `slot`."""
        record = AdapterRecord(name, slot, costs)
        before = self._outside.pop(lora_id, None)
        # Where no API gives the ids out, one may come back with other weights.
        if before is not None and before.costs == costs:
            record.past, record.stats = before.past, before.stats
            record.stale = before.stale
        self._inside[lora_id] = self._by_slot[slot] = record

    def leave_slot(self, lora_id: int) -> None:
        """The adapter's slot is about to be erased."""
        record = self._inside.pop(lora_id)
        if record.slot is not None:
            del self._by_slot[record.slot]
        record.past, record.slot = self._counters(record), None
        self._outside[lora_id] = record
        while len(self._outside) > OUTSIDE:
            del self._outside[next(iter(self._outside))]

    def finish(self, lora_id: int) -> None:
        """The adapter, which is out of the slots, will not come back: all that is kept of it until
        it is reported for the last time is a total."""
        record = self._outside.get(lora_id)
        if record is not None and record.final is None:
            record.final = total_stats(record.past, record.costs)
            record.past, record.costs = SlotCounters(), cost_table(())

    def mark_active(self, slots: Iterable[int]) -> None:
        """A step has tokens of these slots."""
        for slot in slots:
            if slot in self._by_slot:
                self._by_slot[slot].stale = True

    def report(self, known: Collection[int], op_seconds: float = 0.0) -> dict[int, AdapterReport]:
        """By id, of adapters in the slots and outside.

        op_seconds: what the ops of all adapters took so far. Adapters outside that are not `known`
        any more are reported for the last time.
        """
        self._refresh([*self._outside.values(), *self._inside.values()], op_seconds)
        outside = {lora_id: self._report(record) for lora_id, record in self._outside.items()}
        for lora_id in self._outside.keys() - set(known):
            del self._outside[lora_id]
        return outside | {lora_id: self._report(record) for lora_id, record in self._inside.items()}

    def sites(self, lora_id: int) -> tuple[int, dict[str, SiteRoutingStats]]:
        """Tokens and sites of one adapter; none if it is not known here."""
        record = self._inside.get(lora_id) or self._outside.get(lora_id)
        if record is None:
            return 0, {}
        counters = self._counters(record)
        return counters.tokens, site_stats(counters, record.costs)

    def costs(self, lora_id: int) -> Costs | None:
        """Of one adapter; None if it is not known here."""
        record = self._inside.get(lora_id) or self._outside.get(lora_id)
        return None if record is None else record.costs

    def _refresh(self, records: Iterable[AdapterRecord], op_seconds: float) -> None:
        """The ops serve the adapters of a batch together: their seconds since the last time are
        shared out by the FLOPs since then."""
        done: list[tuple[RoutingStats, int]] = []
        for record in records:
            if record.stale:
                before, record.stale = record.stats, False
                record.stats = record.final or total_stats(self._counters(record), record.costs)
                record.stats.op_seconds = before.op_seconds
                done.append((record.stats, record.stats.flops_done - before.flops_done))
        work = sum(flops for _, flops in done)
        if not work:
            return
        for stats, flops in done:
            stats.op_seconds += (op_seconds - self._op_seconds) * flops / work
        self._op_seconds = op_seconds

    def _report(self, record: AdapterRecord) -> AdapterReport:
        taken = None if record.slot is None else self._resident_bytes(record.slot)
        return AdapterReport(record.name, taken, record.stats)

    def _counters(self, record: AdapterRecord) -> SlotCounters:
        if record.slot is None:
            return record.past
        return joined(record.past, self._of_slot(record.slot))
