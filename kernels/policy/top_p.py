"""The nucleus of the distribution."""

from dataclasses import dataclass

from torch import Tensor

from molehill.kernels.policy.base import Gate, Routing, never_soft, ranked, shannon, unranked


@dataclass(frozen=True)
class TopP(Gate):
    """Nucleus that includes the expert crossing `top_p`; weights are not renormalised.

    `temperature` > 0 divides the probabilities (not the logits) before the selection and in the
    weights, as the reference does (MoE-PEFT, mixlora-dynamic).
    """

    top_p: float
    temperature: float = 0.0

    def route(self, probabilities: Tensor) -> Routing:
        scaled = probabilities / self.temperature if self.temperature > 0 else probabilities
        values, order = ranked(scaled)
        crossed_before = values.cumsum(-1).roll(1, -1) > self.top_p
        crossed_before[..., 0] = False
        weights = unranked(values.masked_fill(crossed_before, 0), order)
        return Routing(weights, shannon(probabilities), never_soft(probabilities))
