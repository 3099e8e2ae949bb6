"""Directions that point both ways."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from molehill.kernels.policy.base import JsonFields, Policy, Routing
from molehill.kernels.policy.top_k import TopK


@dataclass(frozen=True)
class Arrow(Policy):
    """Arrow (arXiv 2405.11157) as PEFT runs it: router rows are directions in the input space that
    point both ways, so p = softmax(|logits| / temperature); the k most probable, renormalised."""

    k: int
    temperature: float = 1.0

    @classmethod
    def from_json(cls, fields: JsonFields) -> Self:
        return cls(fields.integer("k"), fields.number("temperature", above=0))

    @property
    def sums_to_one(self) -> bool:
        return True

    def most_experts(self, experts: int) -> int:
        return min(self.k, experts)

    def fewest_experts(self, experts: int) -> int:
        return min(self.k, experts)

    def decide(self, logits: Tensor, parameters: Tensor | None = None) -> tuple[Tensor, Routing]:
        return super().decide(logits.abs() / self.temperature)

    def route(self, probabilities: Tensor) -> Routing:
        return TopK(self.k).route(probabilities)
