"""What a worker's adapters did, by `lora_int_id`, also while they are out of its slots."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from molehill.engine.routing_stats import (
    Costs,
    Figures,
    SiteFigures,
    site_figures,
    tabulated,
    total,
)
from molehill.kernels.counters import SlotCounters, joined

# Adapters outside of the slots that are remembered if nobody asks, the ones that left last.
OUTSIDE = 2048


@dataclass
class Account:
    """An adapter. slot: None out of the slots. past: counters of earlier stays. figures: its total
    when it was told last. stale: it has run since. final: its total, once it will not come back."""

    name: str
    slot: int | None
    costs: Costs
    past: SlotCounters = field(default_factory=SlotCounters)
    figures: Figures = field(default_factory=Figures)
    stale: bool = False
    final: Figures | None = None


class Ledger:
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
        self._inside: dict[int, Account] = {}
        self._by_slot: dict[int, Account] = {}
        # In the order in which they left.
        self._outside: dict[int, Account] = {}

    def enter(self, lora_id: int, name: str, slot: int, costs: Costs) -> None:
        """The adapter is stored in `slot`."""
        account = Account(name, slot, costs)
        before = self._outside.pop(lora_id, None)
        # Where no API gives the ids out, one may come back with other weights.
        if before is not None and before.costs == costs:
            account.past, account.figures = before.past, before.figures
            account.stale = before.stale
        self._inside[lora_id] = self._by_slot[slot] = account

    def leave(self, lora_id: int) -> None:
        """The adapter's slot is about to be erased."""
        account = self._inside.pop(lora_id)
        if account.slot is not None:
            del self._by_slot[account.slot]
        account.past, account.slot = self._counters(account), None
        self._outside[lora_id] = account
        while len(self._outside) > OUTSIDE:
            del self._outside[next(iter(self._outside))]

    def close(self, lora_id: int) -> None:
        """The adapter, which is out of the slots, will not come back: all that is kept of it until
        it is told for the last time is a total."""
        account = self._outside.get(lora_id)
        if account is not None and account.final is None:
            account.final = total(account.past, account.costs)
            account.past, account.costs = SlotCounters(), tabulated(())

    def touch(self, slots: Iterable[int]) -> None:
        """A step has tokens of these slots."""
        for slot in slots:
            if slot in self._by_slot:
                self._by_slot[slot].stale = True

    def settle(self, known: Collection[int], op_seconds: float = 0.0) -> dict[int, dict[str, Any]]:
        """By id: `name`, `resident_bytes` (None outside of the slots) and `figures`, as a dict.

        op_seconds: what the ops of all adapters took so far. Adapters outside that are not `known`
        any more are told for the last time.
        """
        self._renew([*self._outside.values(), *self._inside.values()], op_seconds)
        told = {lora_id: self._told(account) for lora_id, account in self._outside.items()}
        for lora_id in self._outside.keys() - set(known):
            del self._outside[lora_id]
        return told | {lora_id: self._told(account) for lora_id, account in self._inside.items()}

    def sites(self, lora_id: int) -> tuple[int, dict[str, SiteFigures]]:
        """Tokens and sites of one adapter; none if it is not known here."""
        account = self._inside.get(lora_id) or self._outside.get(lora_id)
        if account is None:
            return 0, {}
        counters = self._counters(account)
        return counters.tokens, site_figures(counters, account.costs)

    def _renew(self, accounts: Iterable[Account], op_seconds: float) -> None:
        """The ops serve the adapters of a batch together: their seconds since the last time are
        shared out by the FLOPs since then."""
        done: list[tuple[Figures, int]] = []
        for account in accounts:
            if account.stale:
                before, account.stale = account.figures, False
                account.figures = account.final or total(self._counters(account), account.costs)
                account.figures.op_seconds = before.op_seconds
                done.append((account.figures, account.figures.flops_done - before.flops_done))
        work = sum(flops for _, flops in done)
        if not work:
            return
        for figures, flops in done:
            figures.op_seconds += (op_seconds - self._op_seconds) * flops / work
        self._op_seconds = op_seconds

    def _told(self, account: Account) -> dict[str, Any]:
        taken = None if account.slot is None else self._resident_bytes(account.slot)
        return {"name": account.name, "resident_bytes": taken, "figures": vars(account.figures)}

    def _counters(self, account: Account) -> SlotCounters:
        if account.slot is None:
            return account.past
        return joined(account.past, self._of_slot(account.slot))
