"""Fixed gate weights."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from molehill.kernels.policy.base import JsonFields, Policy, Routing, never_soft, shannon


@dataclass(frozen=True)
class Constant(Policy):
    """Fixed gate weights, whatever the token: plain LoRA is `Constant((1.0,))`."""

    weights: tuple[float, ...]

    @classmethod
    def from_json(cls, fields: JsonFields) -> Self:
        return cls(tuple(fields.numbers("weights")))

    @property
    def sums_to_one(self) -> bool:
        """Not asked for: its weights need no router to be known."""
        return False

    @property
    def constant_weights(self) -> tuple[float, ...]:
        return self.weights

    def route(self, probabilities: Tensor) -> Routing:
        weights = probabilities.new_tensor(self.weights).expand(probabilities.shape)
        return Routing(weights, shannon(probabilities), never_soft(probabilities))
