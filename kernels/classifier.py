"""Gate weights that one classifier gives to all linears of a token at once (X-LoRA).

arXiv 2402.07148, as PEFT computes it (tuners/xlora/classifier.py and layer.py, 0.18 and later):
a small MLP reads the last hidden state of the base itself, so the base runs before the adapter can.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from molehill.kernels.mixture import Experts


@dataclass(frozen=True)
class Classifier:
    """layers: weight `[out, in]` and bias `[out]` of each, float32, a ReLU between two; the first
    reads the hidden state, the last gives `places * experts` numbers, or `experts` that all places
    share. places: linears that it has gate weights for.

    softmax: over the experts of a place, of the numbers divided by `temperature`. top_k: only so
    many experts of a place keep their weight. softmax_top_k: the weights that are not 0 go through
    one more softmax, token by token. first_pass: the weight of every expert while the base's hidden
    state is made; 0 leaves the base as it is. non_granular_after: how many tokens of an answer have
    gate weights of their own, see `last_granular`; None: all.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    experts: int
    places: int
    layerwise: bool
    softmax: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    softmax_top_k: bool = False
    first_pass: float = 0.0
    non_granular_after: int | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """By name, from the first layer on."""
        for i, (weight, bias) in enumerate(self.layers):
            yield f"{i}.weight", weight
            yield f"{i}.bias", bias

    def to_json(self) -> dict[str, Any]:
        """All but the tensors."""
        later = (
            {}
            if self.non_granular_after is None
            else {"non_granular_after": self.non_granular_after}
        )
        return {
            "layers": len(self.layers),
            "experts": self.experts,
            "places": self.places,
            "layerwise": self.layerwise,
            "softmax": self.softmax,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "softmax_top_k": self.softmax_top_k,
            "first_pass": self.first_pass,
            **later,
        }

    def to(self, device: torch.device) -> "Classifier":
        """The same with its tensors on a device."""
        layers = tuple((weight.to(device), bias.to(device)) for weight, bias in self.layers)
        return replace(self, layers=layers)

    def scalings(self, hidden: Tensor) -> Tensor:
        """What the MLP says of hidden states `[T, hidden]`: float32 `[T, places, E]`, or
        `[T, 1, E]` where all places share it."""
        x = hidden.float()
        for i, (weight, bias) in enumerate(self.layers):
            x = F.linear(torch.relu(x) if i else x, weight, bias)
        x = x.view(len(x), self.places if self.layerwise else 1, self.experts)
        return torch.softmax(x / self.temperature, dim=-1) if self.softmax else x

    def selected(self, scalings: Tensor) -> Tensor:
        """Gate weights `[..., E]` of scalings `[..., E]`."""
        if self.top_k is not None:
            kept = torch.zeros_like(scalings, dtype=torch.bool)
            kept.scatter_(-1, scalings.topk(self.top_k, dim=-1).indices, True)
            scalings = scalings * kept
        if not self.softmax_top_k:
            return scalings
        zero = scalings == 0
        return torch.softmax(scalings.masked_fill(zero, -torch.inf), -1).masked_fill(zero, 0.0)

    def gate_weights(self, hidden: Tensor) -> Tensor:
        """Of hidden states `[T, hidden]`: float32 `[T, places or 1, E]`."""
        return self.selected(self.scalings(hidden))

    def last_granular(self, prompt: int) -> int | None:
        """The last position of a sequence with gate weights of its own, which all positions after
        it get too; None if every position has its own. prompt: tokens of it that were asked."""
        return None if self.non_granular_after is None else prompt + self.non_granular_after - 1

    def as_answered(self, gate_weights: Tensor, prompt: int) -> Tensor:
        """Of gate weights `[T, places or 1, E]` of all positions of one sequence, those that it is
        computed with. prompt: tokens of it that were asked, at least one."""
        last = self.last_granular(prompt)
        if last is None or last + 1 >= len(gate_weights):
            return gate_weights
        kept = gate_weights[last : last + 1].expand(len(gate_weights) - last - 1, -1, -1)
        return torch.cat([gate_weights[: last + 1], kept])

    def first_gate_weights(self, tokens: int) -> Tensor | None:
        """Those of the pass that makes the hidden states, `[tokens, 1, E]`; None for the base."""
        if self.first_pass == 0:
            return None
        like = self.layers[0][0]
        return self.selected(like.new_full((tokens, 1, self.experts), self.first_pass))


@dataclass(frozen=True)
class ClassifierPiece:
    """One original projection of a fused linear, cut to this rank, whose gate weights come from a
    classifier.

    experts.a `[R, in_local]`, experts.b `[out_local, R]` write columns `start` onwards. place: of
    the projection's gate weights among the classifier's.
    """

    site: str
    start: int
    experts: Experts
    place: int


@dataclass(frozen=True)
class ClassifierPieces:
    """What one adapter brings whose gate weights come from a classifier. linears: by handle."""

    classifier: Classifier
    linears: Mapping[int, Sequence[ClassifierPiece]]
