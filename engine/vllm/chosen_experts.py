"""What routers chose for the tokens of one request: int16 ids and float16 gate weights."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from molehill.kernels.interface import Run
from molehill.kernels.routed_site import RoutedSite

# Where fewer experts were chosen than there is room for, and where no router ran.
NOBODY = -1


class RouterTable:
    """The routers of one adapter on this rank, head by head.

    routers: (site, head), in the order of the arrays that it makes. most: of experts that one
    decision has.
    """

    def __init__(self, sites: Sequence[RoutedSite]) -> None:
        every = [(site, head) for site in sites for head in range(site.heads)]
        self.routers = tuple((site.name, head) for site, head in every)
        self.most = max((site.most for site in sites), default=0)
        widest = max((site.experts for site in sites), default=0)
        # The last column is one of zeros.
        columns = torch.full((len(every), widest), -1)
        for row, (site, head) in enumerate(every):
            start = site.column + head * site.experts
            columns[row, : site.experts] = torch.arange(start, start + site.experts)
        self._columns = columns

    def encode(self, captured: Tensor) -> tuple[NDArray[np.int16], NDArray[np.float16]]:
        """Captured rows `[tokens, columns]` as ids and weights `[tokens, routers, most]`, by
        falling weight, ties by id."""
        weights = F.pad(captured, (0, 1))[:, self._columns]
        experts, values = strongest(weights, self.most)
        return experts, values.astype(np.float16)


def strongest(weights: Tensor, most: int) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Experts by falling gate weight `[..., E]`, ties by id, and those weights: `[..., most]`, -1
    and 0 where fewer have one."""
    # One that is no number is none.
    values, experts = torch.sort(weights.nan_to_num(0.0), dim=-1, descending=True, stable=True)
    values, experts = values[..., :most], experts[..., :most]
    chosen = torch.where(values > 0, experts, NOBODY)
    return chosen.to(torch.int16).numpy(), values.float().numpy()


@dataclass
class ChosenExperts:
    """One request's. capacity: tokens that it may have. weighted: whether weights are kept.

    A token that is computed again, after a preemption or in place of a rejected draft, has what was
    chosen last. size: tokens so far. acted: bool `[capacity]`, tokens that the adapter acted on.
    """

    table: RouterTable
    capacity: int
    weighted: bool
    size: int = 0
    acted: NDArray[np.bool_] = field(init=False)
    experts: NDArray[np.int16] = field(init=False)
    weights: NDArray[np.float16] = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.capacity, len(self.table.routers), self.table.most)
        # Memory that is not written to yet is not taken yet.
        self.acted = np.zeros(self.capacity, dtype=np.bool_)
        self.experts = np.empty(shape, dtype=np.int16)
        self.weights = np.empty(shape if self.weighted else (0, *shape[1:]), dtype=np.float16)

    def extend(self, stop: int) -> None:
        """Tokens up to `stop` are computed; nobody chose for them yet."""
        new = slice(self.size, min(stop, self.capacity))
        self.experts[new] = NOBODY
        if self.weighted:
            self.weights[new] = 0
        self.size = max(self.size, new.stop)

    def put(self, start: int, experts: NDArray[np.int16], weights: NDArray[np.float16]) -> None:
        """Of tokens from `start` on."""
        count = max(0, min(len(experts), self.capacity - start))
        there = slice(start, start + count)
        self.acted[there] = True
        self.experts[there] = experts[:count]
        if self.weighted:
            self.weights[there] = weights[:count]

    def put_dealt(self, start: int, slots: Sequence[int], runs: Iterable[Run], rows: range) -> None:
        """Of tokens from `start` on, which lie in a step's `rows`: the place among `slots` of the
        one that its `runs` deal each to, nobody for a token of none."""
        dealt = np.full((len(rows), 1, 1), NOBODY, dtype=np.int16)
        for run in runs:
            first, stop = max(run.start, rows.start), min(run.stop, rows.stop)
            if first < stop and run.slot in slots:
                dealt[first - rows.start : stop - rows.start] = slots.index(run.slot)
        self.put(start, dealt, (dealt >= 0).astype(np.float16))

    def expert_counts(self, stop: int, experts: int) -> NDArray[np.int64]:
        """Up to a token, how often each router chose each of so many experts: `[routers, E]`."""
        chosen = self.experts[: min(stop, self.size)]
        counts = [(chosen == expert).sum((0, 2)) for expert in range(experts)]
        return np.stack(counts, axis=1) if counts else np.zeros((chosen.shape[1], 0), np.int64)
