"""The k most probable experts."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from molehill.kernels.policy.base import (
    JsonFields,
    Policy,
    Routing,
    never_soft,
    ranked,
    shannon,
    unranked,
)


@dataclass(frozen=True)
class TopK(Policy):
    """The k most probable experts (MixLoRA, MoLA; `TopK(1, normalize=False)` is MixLoRA's switch).

    normalize: divide the kept probabilities by their sum.
    """

    k: int
    normalize: bool = True

    @classmethod
    def from_json(cls, fields: JsonFields) -> Self:
        return cls(fields.integer("k"), fields.flag("normalize", True))

    @property
    def sums_to_one(self) -> bool:
        return self.normalize

    def most_experts(self, experts: int) -> int:
        return min(self.k, experts)

    def fewest_experts(self, experts: int) -> int:
        return min(self.k, experts)

    def route(self, probabilities: Tensor) -> Routing:
        values, order = ranked(probabilities)
        kept = values.clone()
        kept[..., self.k :] = 0
        if self.normalize:
            kept = kept / kept.sum(-1, keepdim=True)
        weights = unranked(kept, order)
        return Routing(weights, shannon(probabilities), never_soft(probabilities))
