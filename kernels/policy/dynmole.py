"""Sparse or soft, by the entropy of the router."""

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from molehill.kernels.policy.base import JsonFields, Policy, Routing, never_soft, ranked, unranked


@dataclass(frozen=True)
class DynMoLE(Policy):
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

    @classmethod
    def from_json(cls, fields: JsonFields) -> Self:
        kind = fields.choice("entropy_type", ("tsallis", "renyi"), cls.entropy_type)
        return cls(
            top_p=fields.number("top_p", cls.top_p, above=0, at_most=1),
            keep_top_k=fields.integer("keep_top_k", cls.keep_top_k),
            entropy_threshold=fields.number("entropy_threshold", cls.entropy_threshold, at_least=0),
            entropy_index=fields.number("entropy_index", cls.entropy_index, above=0, at_most=2),
            entropy_type="renyi" if kind == "renyi" else "tsallis",
            entropy_eps=fields.number("entropy_eps", cls.entropy_eps, at_least=0, at_most=1),
            normalize_weights=fields.flag("normalize_weights", cls.normalize_weights),
            include_crossing=fields.flag("include_crossing", cls.include_crossing),
            normalize_entropy=fields.flag("normalize_entropy", cls.normalize_entropy),
        )

    @property
    def sums_to_one(self) -> bool:
        return self.normalize_weights

    def route(self, probabilities: Tensor) -> Routing:
        values, order = ranked(probabilities)
        keep = self._sparse_mask(values)
        entropy = self.entropy(probabilities)
        soft = never_soft(probabilities)
        if self.entropy_threshold < 1.0:
            soft = entropy > self.entropy_threshold
        kept = values.masked_fill(~(keep | soft.unsqueeze(-1)), 0)
        if self.normalize_weights:
            kept = kept / kept.sum(-1, keepdim=True)
        return Routing(unranked(kept, order), entropy, soft)

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
