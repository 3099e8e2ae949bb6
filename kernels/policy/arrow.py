"""Directions that point both ways."""

from dataclasses import dataclass

from torch import Tensor

from molehill.kernels.policy.base import Gate, Routing
from molehill.kernels.policy.top_k import TopK


@dataclass(frozen=True)
class Arrow(Gate):
    """Arrow (arXiv 2405.11157) as PEFT runs it: router rows are directions in the input space that
    point both ways, so p = softmax(|logits| / temperature); the k most probable, renormalised."""

    k: int
    temperature: float = 1.0

    def decide(self, logits: Tensor, parameters: Tensor | None = None) -> tuple[Tensor, Routing]:
        return super().decide(logits.abs() / self.temperature)

    def route(self, probabilities: Tensor) -> Routing:
        return TopK(self.k).route(probabilities)
