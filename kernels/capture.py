"""Which experts a slot's routers chose, row by row: where a backend puts their gate weights.

Only of rows that somebody asks for. A captured row is float32 `[columns]`: by routed site, and head
by head of a router that reads heads, the gate weights of its experts as the kernels used them, 0
for an expert that was not chosen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from molehill.kernels.interface import SlotWeights, Trace
from molehill.kernels.policy import Policy
from molehill.kernels.routed_site import RoutedSite


def routed_sites(weights: SlotWeights) -> tuple[RoutedSite, ...]:
    """All that has a router, column after column."""
    sites: list[RoutedSite] = []
    for name, experts, heads, policy in _routers(weights):
        column = sites[-1].stop if sites else 0
        sites.append(RoutedSite(name, experts, heads, policy.most_experts(experts), column))
    return tuple(sites)


def _routers(weights: SlotWeights) -> Iterator[tuple[str, int, int, Policy]]:
    for piece in (piece for pieces in weights.linears.values() for piece in pieces):
        if piece.router is not None:
            yield piece.site, len(piece.experts.ranks), 1, piece.policy
    for ffn in weights.ffns.values():
        yield ffn.site, ffn.num_experts, 1, ffn.policy
    scales = [piece for pieces in weights.scales.values() for piece in pieces]
    for scale in (*scales, *weights.ffn_scales.values()):
        heads, experts, _ = scale.vectors.shape
        yield scale.site, experts, heads, scale.policy


class Capture:
    """The captured rows of one step, for backends in torch.

    rows: of the step. columns: of a captured row.
    """

    def __init__(self, rows: Sequence[int], columns: int, device: torch.device) -> None:
        self.weights = torch.zeros(len(rows), columns, device=device)
        self._places = torch.full((max(rows, default=-1) + 1,), -1)
        self._places[list(rows)] = torch.arange(len(rows))

    def keep(self, rows: slice | Tensor, site: RoutedSite, weights: Tensor) -> None:
        """weights: of the step's `rows`, `[rows, heads * E]`."""
        numbers = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        known = numbers < len(self._places)
        places = self._places[numbers[known]]
        kept = known.nonzero().flatten()[places >= 0].to(weights.device)
        target = places[places >= 0].to(weights.device)
        self.weights[target, site.column : site.stop] = weights[kept].float()


# Takes what the router of one site decided for a segment: probabilities, weights, entropy.
Record = Callable[[str, Tensor, Tensor, Tensor], None]


def recorder(
    traces: list[Trace] | None,
    capture: Capture | None,
    sites: Mapping[str, RoutedSite],
    rows: slice | Tensor,
) -> Record | None:
    """What takes the decisions for the step's `rows`, all of one slot; None if nobody wants them.

    sites: of the slot, by name.
    """
    if traces is None and capture is None:
        return None

    def record(site: str, *decided: Tensor) -> None:
        if traces is not None:
            traces.append(Trace(site, *(t.detach().clone() for t in decided)))
        if capture is not None:
            capture.keep(rows, sites[site], decided[1].flatten(1))

    return record
