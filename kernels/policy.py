"""Routing policies: how a router's probabilities become gate weights.

A policy is a frozen dataclass with one pure function, `route`. It is the definition that every
kernel is tested against. Probabilities are float32 `[..., E]` and sum to 1 over the last axis.
Ties go to the lower expert index.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

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


def _never_soft(probabilities: Tensor) -> Tensor:
    return torch.zeros_like(probabilities[..., 0], dtype=torch.bool)


def _ranked(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Values and expert indices by falling probability, ties by index."""
    return torch.sort(probabilities, dim=-1, descending=True, stable=True)


def _unranked(ranked: Tensor, order: Tensor) -> Tensor:
    """Puts values sorted by `_ranked` back at their experts' places."""
    return torch.zeros_like(ranked).scatter(-1, order, ranked)


@dataclass(frozen=True)
class Constant:
    """Fixed gate weights, whatever the token: plain LoRA is `Constant((1.0,))`."""

    weights: tuple[float, ...]

    def route(self, probabilities: Tensor) -> Routing:
        weights = probabilities.new_tensor(self.weights).expand(probabilities.shape)
        return Routing(weights, shannon(probabilities), _never_soft(probabilities))


@dataclass(frozen=True)
class Soft:
    """Every expert, weighted by its probability (LoRAMoE, MoLoRA, HydraLoRA)."""

    def route(self, probabilities: Tensor) -> Routing:
        return Routing(probabilities, shannon(probabilities), _never_soft(probabilities))


@dataclass(frozen=True)
class TopK:
    """The k most probable experts (MixLoRA, MoLA; `TopK(1, normalize=False)` is MixLoRA's switch).

    normalize: divide the kept probabilities by their sum.
    """

    k: int
    normalize: bool = True

    def route(self, probabilities: Tensor) -> Routing:
        values, order = _ranked(probabilities)
        kept = values.clone()
        kept[..., self.k :] = 0
        if self.normalize:
            kept = kept / kept.sum(-1, keepdim=True)
        weights = _unranked(kept, order)
        return Routing(weights, shannon(probabilities), _never_soft(probabilities))


@dataclass(frozen=True)
class TopP:
    """Nucleus that includes the expert crossing `top_p`; weights are not renormalised.

    `temperature` > 0 divides the probabilities (not the logits) before the selection and in the
    weights, as the reference does (MoE-PEFT, mixlora-dynamic).
    """

    top_p: float
    temperature: float = 0.0

    def route(self, probabilities: Tensor) -> Routing:
        scaled = probabilities / self.temperature if self.temperature > 0 else probabilities
        values, order = _ranked(scaled)
        crossed_before = values.cumsum(-1).roll(1, -1) > self.top_p
        crossed_before[..., 0] = False
        weights = _unranked(values.masked_fill(crossed_before, 0), order)
        return Routing(weights, shannon(probabilities), _never_soft(probabilities))


@dataclass(frozen=True)
class DynMoLE:
    """Hybrid routing by the entropy of the router (DynMoLE, arXiv 2504.00661).

    Sparse: experts by falling probability while their running sum is at most `top_p`, and always
    the first `keep_top_k`. A token whose entropy exceeds `entropy_threshold` (< 1) keeps all.
    Weights are the kept probabilities. The defaults are the official code's semantics; the last
    three switches are other readings of the paper:

    normalize_weights: sparse weights sum to 1.
    include_crossing:  the expert that crosses `top_p` is kept.
    normalize_entropy: entropy of p + eps over its maximum; off: of p, not normalised.
    """

    top_p: float = 0.75
    keep_top_k: int = 2
    entropy_threshold: float = 0.9
    entropy_index: float = 1.1
    entropy_type: Literal["tsallis", "renyi"] = "tsallis"
    entropy_eps: float = 1e-5
    normalize_weights: bool = False
    include_crossing: bool = False
    normalize_entropy: bool = True

    def route(self, probabilities: Tensor) -> Routing:
        values, order = _ranked(probabilities)
        keep = self._sparse_mask(values)
        entropy = self.entropy(probabilities)
        soft = _never_soft(probabilities)
        if self.entropy_threshold < 1.0:
            soft = entropy > self.entropy_threshold
        kept = values.masked_fill(~(keep | soft.unsqueeze(-1)), 0)
        if self.normalize_weights:
            kept = kept / kept.sum(-1, keepdim=True)
        return Routing(_unranked(kept, order), entropy, soft)

    def _sparse_mask(self, values: Tensor) -> Tensor:
        total = values.cumsum(-1)
        keep = total - values < self.top_p if self.include_crossing else total <= self.top_p
        keep[..., : self.keep_top_k] = True
        return keep

    def entropy(self, probabilities: Tensor) -> Tensor:
        """Entropy of `[..., E]` by type and index: `[...]`, over its maximum if normalised."""
        experts = probabilities.shape[-1]
        if experts == 1:
            return torch.zeros_like(probabilities[..., 0])
        p = probabilities + self.entropy_eps if self.normalize_entropy else probabilities
        index = self.entropy_index
        value: Tensor
        if index == 1.0:
            value, most = torch.special.entr(p).sum(-1), math.log(experts)
        elif self.entropy_type == "tsallis":
            value = (1.0 - p.pow(index).sum(-1)) / (index - 1.0)
            most = (1.0 - experts ** (1.0 - index)) / (index - 1.0)
        else:
            value = torch.log(p.pow(index).sum(-1) + 1e-10) / (1.0 - index)
            most = math.log(experts)
        return value / most if self.normalize_entropy else value


Policy = Constant | Soft | TopK | TopP | DynMoLE
