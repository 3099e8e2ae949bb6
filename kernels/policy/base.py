"""What every policy is, and the steps that several have in common."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """What a router decided. `...` are the probabilities' leading axes.

    weights: float32 `[..., E]`, 0 for an expert that was not chosen.
    entropy: float32 `[...]`, entropy of the probabilities over its maximum (0 for one expert).
    soft:    bool `[...]`, whether the token fell back to soft routing (DynMoLE).
    """

    weights: Tensor
    entropy: Tensor
    soft: Tensor


def shannon(probabilities: Tensor) -> Tensor:
    """Shannon entropy of `[..., E]` divided by ln E: `[...]` in [0, 1]; 0 when E is 1."""
    experts = probabilities.shape[-1]
    if experts == 1:
        return torch.zeros_like(probabilities[..., 0])
    total: Tensor = torch.special.entr(probabilities).sum(-1)
    return total / math.log(experts)


def never_soft(probabilities: Tensor) -> Tensor:
    return torch.zeros_like(probabilities[..., 0], dtype=torch.bool)


def ranked(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Values and expert indices by falling probability, ties by index."""
    return torch.sort(probabilities, dim=-1, descending=True, stable=True)


def unranked(ranked: Tensor, order: Tensor) -> Tensor:
    """Puts values sorted by `ranked` back at their experts' places."""
    return torch.zeros_like(ranked).scatter(-1, order, ranked)


def divided_by_sum(kept: Tensor) -> Tensor:
    """Rows `[..., E]` that sum to 1; a row of zeros stays one."""
    total = kept.sum(-1, keepdim=True)
    return kept / total.where(total != 0, 1.0)


class Gate:
    """What a policy is unless it says otherwise: a function of p = softmax(logits)."""

    @property
    def extra_rows(self) -> int:
        return 0

    @property
    def num_parameters(self) -> int:
        return 0

    def decide(self, logits: Tensor, parameters: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Probabilities `[..., E]` and the routing of float32 logits `[..., E + extra_rows]`.

        parameters: float32 `[..., num_parameters]`, whose leading axes broadcast against the
        logits'; None if there are none.
        """
        probabilities = torch.softmax(logits, dim=-1)
        return probabilities, self.route(probabilities)

    def route(self, probabilities: Tensor) -> Routing:
        """Of `[..., E]`. Every policy has its own; this base class decides nothing."""
        raise NotImplementedError

    def entropy(self, probabilities: Tensor) -> Tensor:
        """Of `[..., E]`, as `decide` reports it: `[...]`."""
        return shannon(probabilities)
