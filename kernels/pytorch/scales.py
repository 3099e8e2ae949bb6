"""The torch backend's tables of mixed vectors: u *= sum_e w_e l_e, head by head."""

import torch
from torch import Tensor

from molehill.kernels.capture import Record
from molehill.kernels.interface import ScalePiece
from molehill.kernels.pytorch.tables import Router


class ScaleTable:
    """One adapter's vectors for one projection's output, or for an FFN's intermediate.

    As in the other tables, logits may be summed over tensor-parallel ranks between the two steps.
    by_head: what is recorded of it has an axis of heads.
    """

    def __init__(self, piece: ScalePiece, device: torch.device, *, by_head: bool) -> None:
        self.by_head = by_head
        self.router = Router((piece.site,), piece.router.shape[0], piece.policy)
        self.columns = piece.columns
        self.g = piece.router.to(device, torch.float32)
        self.vectors = piece.vectors.to(device, torch.float32)

    def logits(self, u: Tensor) -> Tensor:
        """u `[T, columns]` of any dtype: float32 `[T, heads, E]`."""
        logits: Tensor = self._heads(u) @ self.g.T
        return logits

    def scale(self, u: Tensor, logits: Tensor, record: Record | None) -> None:
        """Multiplies u in place."""
        by_head = record if record is None or not self.by_head else self._by_head(record)
        routing = self.router.route(logits.flatten(0, 1), by_head)
        weights = routing.weights.view_as(logits)
        factor = torch.einsum("the,hew->thw", weights, self.vectors)
        u.copy_((self._heads(u) * factor).flatten(1))

    def _heads(self, u: Tensor) -> Tensor:
        heads: Tensor = u.float().unflatten(1, (len(self.vectors), -1))
        return heads

    def _by_head(self, record: Record) -> Record:
        """Takes what was decided for `[T * heads]`."""

        def split(site: str, *decided: Tensor) -> None:
            p, w, entropy = (t.unflatten(0, (-1, len(self.vectors))) for t in decided)
            record(site, p, w, entropy)

        return split

    @property
    def num_bytes(self) -> int:
        return self.g.nbytes + self.vectors.nbytes
