"""The nucleus of the distribution."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from molehill.kernels.policy.base import (
    JsonFields,
    Policy,
    Routing,
    never_soft,
    ranked,
    shannon,
    unranked,
)


@dataclass(frozen=True)
class TopP(Policy):
    """Nucleus that includes the expert crossing `top_p`; weights are not renormalised.

    `temperature` > 0 divides the probabilities (not the logits) before the selection and in the
    weights, as the reference does (MoE-PEFT, mixlora-dynamic). The defaults are the reference's.
    """

    top_p: float = 0.8
    temperature: float = 0.0

    @classmethod
    def from_json(cls, fields: JsonFields) -> Self:
        return cls(
            top_p=fields.number("top_p", cls.top_p, above=0, at_most=1),
            temperature=fields.number("temperature", cls.temperature, at_least=0),
        )

    @property
    def sums_to_one(self) -> bool:
        return False

    def route(self, probabilities: Tensor) -> Routing:
        scaled = probabilities / self.temperature if self.temperature > 0 else probabilities
        values, order = ranked(scaled)
        crossed_before = values.cumsum(-1).roll(1, -1) > self.top_p
        crossed_before[..., 0] = False
        weights = unranked(values.masked_fill(crossed_before, 0), order)
        return Routing(weights, shannon(probabilities), never_soft(probabilities))
