"""What a worker's adapters did, by `lora_int_id`, also while they are out of its slots."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from molehill.engine.figures import (
    Figures,
    SiteCost,
    SiteFigures,
    joined,
    site_figures,
    total,
)
from molehill.kernels.backend import SiteCounters, SlotCounters

# Adapters outside of the slots that are remembered if nobody asks, the ones that left last.
OUTSIDE = 2048


@dataclass
class Account:
    """An adapter in a slot. past: counters of earlier stays. figures: its total, None when it has
    to be worked out again."""

    name: str
    slot: int
    costs: Mapping[str, SiteCost]
    past: SlotCounters = field(default_factory=SlotCounters)
    figures: Figures | None = None


@dataclass(frozen=True)
class Departed:
    """An adapter out of the slots. packed: its counters and costs as JSON, which take a tenth of
    the objects' memory."""

    name: str
    figures: Figures
    packed: str

    def unpack(self) -> tuple[SlotCounters, dict[str, SiteCost]]:
        counters, costs = json.loads(self.packed)
        sites = {site: SiteCounters(**fields) for site, fields in counters["sites"].items()}
        return SlotCounters(counters["tokens"], sites), {
            site: SiteCost(tuple(cost["experts"]), cost["router"]) for site, cost in costs.items()
        }


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
        self._inside: dict[int, Account] = {}
        self._by_slot: dict[int, Account] = {}
        # In the order in which they left.
        self._outside: dict[int, Departed] = {}

    def enter(self, lora_id: int, name: str, slot: int, costs: Mapping[str, SiteCost]) -> None:
        """The adapter is stored in `slot`."""
        account = Account(name, slot, costs)
        before = self._outside.pop(lora_id, None)
        if before is not None:
            past, old_costs = before.unpack()
            # Where no API gives the ids out, one may come back with other weights.
            if old_costs == costs:
                account.past = past
        self._inside[lora_id] = self._by_slot[slot] = account

    def leave(self, lora_id: int) -> None:
        """The adapter's slot is about to be erased."""
        account = self._inside.pop(lora_id)
        del self._by_slot[account.slot]
        counters = self._counters(account)
        # Not `asdict`, which copies: this happens between two steps.
        sites = {site: vars(own) for site, own in counters.sites.items()}
        costs = {site: vars(cost) for site, cost in account.costs.items()}
        packed = json.dumps(({"tokens": counters.tokens, "sites": sites}, costs))
        self._outside[lora_id] = Departed(account.name, self._figures(account), packed)
        while len(self._outside) > OUTSIDE:
            del self._outside[next(iter(self._outside))]

    def touch(self, slots: Iterable[int]) -> None:
        """A step has tokens of these slots."""
        for slot in slots:
            if slot in self._by_slot:
                self._by_slot[slot].figures = None

    def settle(self, known: Collection[int]) -> dict[int, dict[str, Any]]:
        """By id: `name`, `resident_bytes` (None outside of the slots) and `figures`, as a dict.

        Adapters outside that are not `known` any more are told for the last time.
        """
        told = {
            lora_id: _told(gone.name, None, gone.figures) for lora_id, gone in self._outside.items()
        }
        for lora_id in self._outside.keys() - set(known):
            del self._outside[lora_id]
        for lora_id, account in self._inside.items():
            taken = self._resident_bytes(account.slot)
            told[lora_id] = _told(account.name, taken, self._figures(account))
        return told

    def sites(self, lora_id: int) -> tuple[int, dict[str, SiteFigures]]:
        """Tokens and sites of one adapter; none if it is not known here."""
        counters, costs = SlotCounters(), dict[str, SiteCost]()
        if lora_id in self._outside:
            counters, costs = self._outside[lora_id].unpack()
        elif lora_id in self._inside:
            account = self._inside[lora_id]
            counters, costs = self._counters(account), dict(account.costs)
        return counters.tokens, site_figures(counters, costs)

    def _counters(self, account: Account) -> SlotCounters:
        return joined(account.past, self._of_slot(account.slot))

    def _figures(self, account: Account) -> Figures:
        if account.figures is None:
            account.figures = total(self._counters(account), account.costs)
        return account.figures


def _told(name: str, resident_bytes: int | None, figures: Figures) -> dict[str, Any]:
    return {"name": name, "resident_bytes": resident_bytes, "figures": asdict(figures)}
