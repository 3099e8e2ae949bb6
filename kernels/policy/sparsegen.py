"""A sparse projection whose sparsity the token sets."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from molehill.kernels.policy.base import JsonFields, Policy, Routing, never_soft, shannon

SPARSEGEN_EPS = 1e-2


@dataclass(frozen=True)
class Sparsegen(Policy):
    """Sparse routing whose sparsity depends on the token (LD-MoLE, arXiv 2509.25684).

    The last `hidden` router rows are the hidden layer of an MLP, whose biases b [hidden], output
    weights c [hidden] and output bias d are the parameters, in this order:
    1 - lambda = eps + softplus(-(c relu(h + b) + d)) and p = w = sparsemax(u / (1 - lambda)) of the
    experts' logits u, which is LD-MoLE's sparsegen (arXiv 1810.11975) written down shortly.
    """

    hidden: int

    @classmethod
    def from_json(cls, fields: JsonFields) -> Self:
        return cls(fields.integer("hidden"))

    @property
    def sums_to_one(self) -> bool:
        return True

    @property
    def extra_rows(self) -> int:
        return self.hidden

    @property
    def num_parameters(self) -> int:
        return 2 * self.hidden + 1

    def decide(self, logits: Tensor, parameters: Tensor | None = None) -> tuple[Tensor, Routing]:
        assert parameters is not None
        u, h = logits[..., : -self.hidden], logits[..., -self.hidden :]
        b, c, d = parameters.split([self.hidden, self.hidden, 1], dim=-1)
        output = (c * F.relu(h + b)).sum(-1, keepdim=True) + d
        scale = SPARSEGEN_EPS + F.softplus(-output)
        # Sparsemax does not change if all logits move: small ones are divided more exactly.
        probabilities = sparsemax((u - u.amax(-1, keepdim=True)) / scale)
        entropy = shannon(probabilities)
        return probabilities, Routing(probabilities, entropy, never_soft(probabilities))


def sparsemax(logits: Tensor) -> Tensor:
    """The distribution nearest to `[..., E]` (arXiv 1602.02068), with zeros where it is far."""
    values = torch.sort(logits, dim=-1, descending=True).values
    places = torch.arange(1, values.shape[-1] + 1, device=values.device)
    support = 1 + places * values > values.cumsum(-1)
    total = values.where(support, 0.0).sum(-1, keepdim=True)
    return F.relu(logits - (total - 1) / support.sum(-1, keepdim=True))
