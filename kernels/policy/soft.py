"""Every expert, by its probability."""

from dataclasses import dataclass

from torch import Tensor

from molehill.kernels.policy.base import Gate, Routing, never_soft, shannon


@dataclass(frozen=True)
class Soft(Gate):
    """Every expert, weighted by its probability (LoRAMoE, MoLoRA, HydraLoRA)."""

    def route(self, probabilities: Tensor) -> Routing:
        return Routing(probabilities, shannon(probabilities), never_soft(probabilities))
