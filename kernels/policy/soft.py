"""Every expert, by its probability."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from molehill.kernels.policy.base import JsonFields, Policy, Routing, never_soft, shannon


@dataclass(frozen=True)
class Soft(Policy):
    """Every expert, weighted by its probability (LoRAMoE, MoLoRA, HydraLoRA)."""

    @classmethod
    def from_json(cls, fields: JsonFields) -> Self:
        return cls()

    @property
    def sums_to_one(self) -> bool:
        return True

    def fewest_experts(self, experts: int) -> int:
        return experts

    def route(self, probabilities: Tensor) -> Routing:
        return Routing(probabilities, shannon(probabilities), never_soft(probabilities))
