"""The k most probable experts."""

from dataclasses import dataclass

from torch import Tensor

from molehill.kernels.policy.base import Gate, Routing, never_soft, ranked, shannon, unranked


@dataclass(frozen=True)
class TopK(Gate):
    """The k most probable experts (MixLoRA, MoLA; `TopK(1, normalize=False)` is MixLoRA's switch).

    normalize: divide the kept probabilities by their sum.
    """

    k: int
    normalize: bool = True

    def route(self, probabilities: Tensor) -> Routing:
        values, order = ranked(probabilities)
        kept = values.clone()
        kept[..., self.k :] = 0
        if self.normalize:
            kept = kept / kept.sum(-1, keepdim=True)
        weights = unranked(kept, order)
        return Routing(weights, shannon(probabilities), never_soft(probabilities))
