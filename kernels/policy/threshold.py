"""Experts above a fixed probability."""

from dataclasses import dataclass

from torch import Tensor

from molehill.kernels.policy.base import Gate, Routing, divided_by_sum, never_soft, shannon


@dataclass(frozen=True)
class Threshold(Gate):
    """Experts whose probability is at least `threshold`, divided by their sum; maybe none (MoLE of
    the AdaMoLE code)."""

    threshold: float

    def route(self, probabilities: Tensor) -> Routing:
        weights = divided_by_sum(probabilities.masked_fill(probabilities < self.threshold, 0))
        return Routing(weights, shannon(probabilities), never_soft(probabilities))
