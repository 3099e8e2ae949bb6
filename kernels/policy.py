"""Routing policies: how a router's logits become gate weights.

A policy is a frozen dataclass with one pure function, `decide`. It is the definition that every
kernel is tested against. A router has a row for each of the E experts, and after those the
policy's `extra_rows`; what a policy learned beside the router are its `num_parameters` parameters.
Most policies route on the softmax of the logits alone (`route`). Probabilities are float32
`[..., E]` and sum to 1 over the last axis. Ties go to the lower expert index.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


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


def _divided_by_sum(kept: Tensor) -> Tensor:
    """Rows `[..., E]` that sum to 1; a row of zeros stays one."""
    total = kept.sum(-1, keepdim=True)
    return kept / total.where(total != 0, 1.0)


class _Gate:
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


@dataclass(frozen=True)
class Constant(_Gate):
    """Fixed gate weights, whatever the token: plain LoRA is `Constant((1.0,))`."""

    weights: tuple[float, ...]

    def route(self, probabilities: Tensor) -> Routing:
        weights = probabilities.new_tensor(self.weights).expand(probabilities.shape)
        return Routing(weights, shannon(probabilities), _never_soft(probabilities))


@dataclass(frozen=True)
class Soft(_Gate):
    """Every expert, weighted by its probability (LoRAMoE, MoLoRA, HydraLoRA)."""

    def route(self, probabilities: Tensor) -> Routing:
        return Routing(probabilities, shannon(probabilities), _never_soft(probabilities))


@dataclass(frozen=True)
class TopK(_Gate):
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
class TopP(_Gate):
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
class DynMoLE(_Gate):
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


@dataclass(frozen=True)
class Threshold(_Gate):
    """Experts whose probability is at least `threshold`, divided by their sum; maybe none (MoLE of
    the AdaMoLE code)."""

    threshold: float

    def route(self, probabilities: Tensor) -> Routing:
        weights = _divided_by_sum(probabilities.masked_fill(probabilities < self.threshold, 0))
        return Routing(weights, shannon(probabilities), _never_soft(probabilities))


@dataclass(frozen=True)
class Arrow(_Gate):
    """Arrow (arXiv 2405.11157) as PEFT runs it: router rows are directions in the input space that
    point both ways, so p = softmax(|logits| / temperature); the k most probable, renormalised."""

    k: int
    temperature: float = 1.0

    def decide(self, logits: Tensor, parameters: Tensor | None = None) -> tuple[Tensor, Routing]:
        return super().decide(logits.abs() / self.temperature)

    def route(self, probabilities: Tensor) -> Routing:
        return TopK(self.k).route(probabilities)


@dataclass(frozen=True)
class AdaMoLE(_Gate):
    """Experts above a threshold that depends on the token (AdaMoLE, arXiv 2405.00361).

    The last router row and the one parameter make t = sigmoid(logit + parameter) * max_threshold;
    w = max(p - t, 0), divided by its sum. No expert above t: no weights.
    """

    max_threshold: float

    @property
    def extra_rows(self) -> int:
        return 1

    @property
    def num_parameters(self) -> int:
        return 1

    def decide(self, logits: Tensor, parameters: Tensor | None = None) -> tuple[Tensor, Routing]:
        assert parameters is not None
        probabilities = torch.softmax(logits[..., :-1], dim=-1)
        threshold = torch.sigmoid(logits[..., -1:] + parameters) * self.max_threshold
        weights = _divided_by_sum((probabilities - threshold).clamp(min=0))
        entropy = shannon(probabilities)
        return probabilities, Routing(weights, entropy, _never_soft(probabilities))


SPARSEGEN_EPS = 1e-2


@dataclass(frozen=True)
class Sparsegen(_Gate):
    """Sparse routing whose sparsity depends on the token (LD-MoLE, arXiv 2509.25684).

    The last `hidden` router rows are the hidden layer of an MLP, whose biases b [hidden], output
    weights c [hidden] and output bias d are the parameters, in this order:
    1 - lambda = eps + softplus(-(c relu(h + b) + d)) and p = w = sparsemax(u / (1 - lambda)) of the
    experts' logits u, which is LD-MoLE's sparsegen (arXiv 1810.11975) written down shortly.
    """

    hidden: int

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
        return probabilities, Routing(probabilities, entropy, _never_soft(probabilities))


def sparsemax(logits: Tensor) -> Tensor:
    """The distribution nearest to `[..., E]` (arXiv 1602.02068), with zeros where it is far."""
    values = torch.sort(logits, dim=-1, descending=True).values
    places = torch.arange(1, values.shape[-1] + 1, device=values.device)
    support = 1 + places * values > values.cumsum(-1)
    total = values.where(support, 0.0).sum(-1, keepdim=True)
    return F.relu(logits - (total - 1) / support.sum(-1, keepdim=True))


Policy = Constant | Soft | TopK | TopP | DynMoLE | Threshold | Arrow | AdaMoLE | Sparsegen
