"""Experts above a fixed probability."""

from dataclasses import dataclass
from typing import Self

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
class Threshold(Policy):
    """Experts whose probability is at least `threshold`, divided by their sum; maybe none (MoLE of
    the AdaMoLE code)."""

    threshold: float

    @classmethod
    def from_json(cls, fields: JsonFields) -> Self:
        return cls(fields.number("threshold", at_least=0))

    @property
    def sums_to_one(self) -> bool:
        """No: it may leave no expert."""
        return False

    def route(self, probabilities: Tensor) -> Routing:
        weights = divided_by_sum(probabilities.masked_fill(probabilities < self.threshold, 0))
        return Routing(weights, shannon(probabilities), never_soft(probabilities))
