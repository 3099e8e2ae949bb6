"""Mixtures of vectors beside the Triton kernels, by torch: u *= sum_e w_e l_e, head by head.

Their router reads the very output that they multiply, so they run after everything else. How many
of these operations there are depends on which adapters a step has: eager mode only. Nothing waits
for the device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from molehill.kernels.capture import Record
from molehill.kernels.counters import SiteCounters
from molehill.kernels.interface import Run, ScalePiece
from molehill.kernels.pytorch.scales import ScaleTable

# What takes the decisions for a run's rows, if anybody wants them.
Recording = Callable[[int, slice], Record | None]


@dataclass
class SlotVectors:
    """One slot's tables, by handles of linears and of FFNs."""

    linears: dict[int, list[ScaleTable]] = field(default_factory=dict)
    ffns: dict[int, ScaleTable] = field(default_factory=dict)

    @property
    def tables(self) -> list[ScaleTable]:
        return [
            *(table for tables in self.linears.values() for table in tables),
            *self.ffns.values(),
        ]


class Vectors:
    """The mixtures of vectors of all slots that have any, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: dict[int, SlotVectors] = {}

    def store(
        self,
        slot: int,
        scales: Mapping[int, Sequence[ScalePiece]],
        ffn_scales: Mapping[int, ScalePiece],
    ) -> None:
        """As SlotWeights has them."""
        if scales or ffn_scales:
            self._slots[slot] = SlotVectors(
                {
                    handle: [self._table(p, True) for p in pieces]
                    for handle, pieces in scales.items()
                },
                {handle: self._table(piece, False) for handle, piece in ffn_scales.items()},
            )

    def _table(self, piece: ScalePiece, by_head: bool) -> ScaleTable:
        table = ScaleTable(piece, self._device, by_head=by_head)
        table.router.counts = table.router.counts.to(self._device)
        return table

    def erase(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def num_bytes(self, slot: int) -> int:
        vectors = self._slots.get(slot, SlotVectors())
        return sum(table.num_bytes for table in vectors.tables)

    def counters(self, slot: int) -> dict[str, SiteCounters]:
        vectors = self._slots.get(slot, SlotVectors())
        return {
            site: counters for table in vectors.tables for site, counters in table.router.counters()
        }

    def scale_linear(
        self, out: Tensor, handle: int, runs: Sequence[Run], recording: Recording
    ) -> None:
        """Multiplies columns of `out [T, out]` in place."""
        for run in runs:
            vectors = self._slots.get(run.slot, SlotVectors())
            for table in vectors.linears.get(handle, ()):
                u = out[run.start : run.stop, table.columns]
                record = recording(run.slot, slice(run.start, run.stop))
                table.scale(u, table.logits(u), record)

    def scale_ffn(
        self,
        h: Tensor,
        handle: int,
        runs: Sequence[Run],
        reduce: Callable[[Tensor], Tensor] | None,
        recording: Recording,
    ) -> None:
        """Multiplies rows of `h [T, I]` in place. reduce: sums logits over the ranks."""
        work = [
            (run, h[run.start : run.stop], vectors.ffns[handle])
            for run in runs
            if (vectors := self._slots.get(run.slot)) is not None and handle in vectors.ffns
        ]
        logits = [table.logits(u) for _, u, table in work]
        if reduce is not None and logits:
            sizes = [part.numel() for part in logits]
            total = reduce(torch.cat([part.flatten() for part in logits])).split(sizes)
            logits = [part.view_as(local) for part, local in zip(total, logits, strict=True)]
        for (run, u, table), part in zip(work, logits, strict=True):
            table.scale(u, part, recording(run.slot, slice(run.start, run.stop)))
