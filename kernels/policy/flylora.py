"""The k greatest scores, with a bias for each."""

from dataclasses import dataclass
from typing import Self

import torch
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
class FlyLoRA(Policy):
    """The k experts with the greatest logit + bias, with the weight 1 (FlyLoRA, arXiv 2510.08396).

    Router rows are the A of experts of rank 1, so logits are what the experts shrink the input to;
    a negative one can be among the greatest. The parameters are the biases of `experts` experts.
    There are no probabilities: their place have the scores, logit + bias, and the entropy is that
    of the scores' softmax.
    """

    k: int
    experts: int

    @classmethod
    def from_json(cls, fields: JsonFields) -> Self:
        return cls(fields.integer("k"), fields.integer("experts"))

    @property
    def sums_to_one(self) -> bool:
        return False

    def most_experts(self, experts: int) -> int:
        return min(self.k, experts)

    def fewest_experts(self, experts: int) -> int:
        return min(self.k, experts)

    @property
    def only_experts(self) -> int:
        return self.experts

    @property
    def num_parameters(self) -> int:
        return self.experts

    def decide(self, logits: Tensor, parameters: Tensor | None = None) -> tuple[Tensor, Routing]:
        assert parameters is not None
        scores = logits + parameters
        return scores, self.route(scores)

    def route(self, probabilities: Tensor) -> Routing:
        """Of scores `[..., E]`."""
        values, order = ranked(probabilities)
        kept = torch.ones_like(values)
        kept[..., self.k :] = 0
        return Routing(
            unranked(kept, order), self.entropy(probabilities), never_soft(probabilities)
        )

    def entropy(self, probabilities: Tensor) -> Tensor:
        """Of scores `[..., E]`: `[...]`."""
        return shannon(torch.softmax(probabilities, dim=-1))
