"""Fixed gate weights."""

from dataclasses import dataclass

from torch import Tensor

from molehill.kernels.policy.base import Gate, Routing, never_soft, shannon


@dataclass(frozen=True)
class Constant(Gate):
    """Fixed gate weights, whatever the token: plain LoRA is `Constant((1.0,))`."""

    weights: tuple[float, ...]

    def route(self, probabilities: Tensor) -> Routing:
        weights = probabilities.new_tensor(self.weights).expand(probabilities.shape)
        return Routing(weights, shannon(probabilities), never_soft(probabilities))
