"""Experts above a threshold that the token sets."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from molehill.kernels.policy.base import (
    JsonFields,
    Policy,
    Routing,
    divided_by_sum,
    never_soft,
    shannon,
)


@dataclass(frozen=True)
class AdaMoLE(Policy):
    """Experts above a threshold that depends on the token (AdaMoLE, arXiv 2405.00361).

    The last router row and the one parameter make t = sigmoid(logit + parameter) * max_threshold;
    w = max(p - t, 0), divided by its sum. No expert above t: no weights.
    """

    max_threshold: float

    @classmethod
    def from_json(cls, fields: JsonFields) -> Self:
        return cls(fields.number("max_threshold", at_least=0))

    @property
    def sums_to_one(self) -> bool:
        """No: it may leave no expert."""
        return False

    @property
    def extra_rows(self) -> int:
        return 1

    @property
    def num_parameters(self) -> int:
        return 1

    def decide(self, logits: Tensor, parameters: Tensor | None = None) -> tuple[Tensor, Routing]:
        assert parameters is not None
        probabilities = torch.softmax(logits[..., :-1], dim=-1)
        threshold = torch.sigmoid(logits[..., -1:] + parameters) * self.max_threshold
        weights = divided_by_sum((probabilities - threshold).clamp(min=0))
        entropy = shannon(probabilities)
        return probabilities, Routing(weights, entropy, never_soft(probabilities))
